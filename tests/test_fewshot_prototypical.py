"""Prototypical networks, and accuracy over episodes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

import fastda
from fastda.fewshot import Episode, EpisodeSampler, PrototypicalNetwork, evaluate_episodes

pytestmark = pytest.mark.usefixtures("one_thread")
METRICS = ("sqeuclidean", "euclidean", "cosine")
each_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def episodes(batch=(3,), ways=4, shots=2, queries=5) -> Episode:
    support_labels = torch.arange(ways).repeat_interleave(shots).expand(*batch, -1)
    query_labels = torch.arange(ways).repeat_interleave(queries).expand(*batch, -1)
    images = [
        torch.randn(*labels.shape, 1, 6, 6) + labels[..., None, None, None] for labels in (support_labels, query_labels)
    ]
    return Episode(images[0], support_labels, images[1], query_labels)


# Episodes


@each_metric
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("centring", ["none", "support", "base"])
@pytest.mark.parametrize("normalise", [True, False])
def test_scores_and_loss_are_those_of_the_formula(metric, batch, centring, normalise):
    network = PrototypicalNetwork(
        backbone(), metric=metric, temperature=0.5, learn_temperature=True, centring=centring, normalise=normalise
    )
    if centring == "base":
        network.fit_centre(torch.randn(9, 1, 6, 6))
    network.eval()
    episode = episodes(batch)
    support, labels, queries, query_labels = (x.flatten(0, len(batch) - 1) if batch else x[None] for x in episode)
    logits = []
    for s, y, q in zip(support, labels, queries):
        s, q = network.backbone(s).flatten(1), network.backbone(q).flatten(1)
        centre = {"none": 0, "support": s.mean(0), "base": network.centre}[centring]
        s, q = s - centre, q - centre
        if normalise:
            s, q = normalize(s, dim=-1), normalize(q, dim=-1)
        prototypes = torch.stack([s[y == c].mean(0) for c in range(4)])
        if metric == "cosine":
            distances = 1 - normalize(q, dim=-1) @ normalize(prototypes, dim=-1).T
        else:
            distances = (q[:, None] - prototypes).square().sum(-1)
            distances = distances.sqrt() if metric == "euclidean" else distances
        logits.append(-distances / 0.5)
    logits = torch.stack(logits)
    scores = network(*list(episode)[:3])
    assert_close(scores, logits.log_softmax(-1).view(scores.shape), rtol=1e-4, atol=1e-4)
    expected = cross_entropy(logits.flatten(0, 1), query_labels.flatten())
    assert_close(network.loss(*episode, num_classes=4), expected, rtol=1e-4, atol=1e-5)
    assert_close(network.loss(*episode, reduction="none").mean(), expected, rtol=1e-4, atol=1e-5)


def test_the_loss_trains_backbone_and_temperature():
    network = PrototypicalNetwork(backbone(), learn_temperature=True, temperature=20.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    test = episodes((50,))
    before = evaluate_episodes(network, [test]).mean
    for _ in range(30):
        optimizer.zero_grad()
        network.loss(*episodes()).backward()
        optimizer.step()
    assert network.temperature != 20 and network.temperature > 0
    assert evaluate_episodes(network, [test]).mean > before + 0.1


def test_in_training_batch_norm_sees_support_and_queries_together():
    network, episode = PrototypicalNetwork(backbone()), episodes(())
    network.loss(*episode)
    together = backbone()
    together.load_state_dict(
        {**network.backbone.state_dict(), "1.running_mean": torch.zeros(4), "1.running_var": torch.ones(4)}
    )
    together(torch.cat([episode.support, episode.queries]))
    assert_close(network.backbone[1].running_mean, together[1].running_mean)
    assert network.backbone[1].num_batches_tracked == 1


def test_mismatched_shapes_are_named():
    support, labels, queries, query_labels = episodes()
    with pytest.raises(ValueError, match="support, support_labels, queries: expected shapes"):
        PrototypicalNetwork(backbone())(support, labels[:2], queries)


# Use


@each_metric
@pytest.mark.parametrize("centring", ["none", "support", "base"])
def test_fit_and_predict_are_the_episode(metric, centring):
    network = PrototypicalNetwork(backbone(), metric=metric, centring=centring, normalise=True)
    if centring == "base":
        network.fit_centre(torch.randn(9, 1, 6, 6), batch_size=2)
    support, labels, queries, _ = episodes(())
    order, names = torch.randperm(len(labels)), torch.tensor([3, 50, 51, 90])
    network.fit_support(support[order], names[labels[order]], batch_size=3)
    assert network.training  # as it was
    assert torch.equal(network.classes, names)
    scores = network.eval()(support, labels, queries)
    assert_close(network.predict_proba(queries, batch_size=7), scores.exp(), rtol=1e-4, atol=1e-6)
    assert torch.equal(network.predict(queries), names[scores.argmax(-1)])
    assert torch.equal(network.predict(queries, k=4), names[scores.argsort(-1, descending=True)])


def test_a_class_added_later_is_as_if_it_had_been_there():
    support, labels, queries, _ = episodes((), ways=6, shots=4)
    names = torch.tensor([5, 1, 9, 7, 2, 8])
    whole = PrototypicalNetwork(backbone()).fit_support(support, names[labels])
    later = PrototypicalNetwork(whole.backbone)
    first = (labels < 4) & (torch.arange(24) % 4 < 3)  # three samples each of four classes
    later.fit_support(support[first], names[labels[first]])
    later.add_support(support[~first], names[labels[~first]])
    assert torch.equal(later.classes, whole.classes) and torch.equal(later.counts, whole.counts)
    assert_close(later.prototypes, whole.prototypes)
    assert torch.equal(later.predict(queries), whole.predict(queries))
    assert set(later.predict(queries).tolist()) <= set(names.tolist())


def test_one_query_among_100_000_classes():
    network = PrototypicalNetwork(nn.Identity())
    prototypes = torch.randn(100_000, 32)
    network.fit_support(prototypes, torch.arange(100_000))
    asked = torch.tensor([77_777])
    assert torch.equal(network.predict(prototypes[asked] + 0.01), asked)
    assert network.predict_proba(prototypes[asked])[0, 77_777] > 0.9


@pytest.mark.parametrize("centring", ["none", "support", "base"])
def test_prototypes_are_saved_and_loaded(centring, tmp_path):
    network = PrototypicalNetwork(backbone(), centring=centring)
    if centring == "base":
        network.fit_centre(torch.randn(9, 1, 6, 6))
    support, labels, queries, _ = episodes(())
    network.fit_support(support, labels)
    network.save_prototypes(tmp_path / "prototypes.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["prototypes.pt"]
    alone = PrototypicalNetwork(network.backbone, centring=centring).load_prototypes(tmp_path / "prototypes.pt")
    assert torch.equal(alone.predict_proba(queries), network.predict_proba(queries))
    other = PrototypicalNetwork(network.backbone, centring=centring, metric="cosine")
    with pytest.raises(
        ValueError, match="expected prototypes with metric='cosine', got 'sqeuclidean'; make the network so"
    ):
        other.load_prototypes(tmp_path / "prototypes.pt")


def test_other_files_are_refused(tmp_path):
    torch.save({"prototypes": torch.zeros(2, 3)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for file in ("other.pt", "text.pt"):
        with pytest.raises(ValueError, match=f"{file}: expected a file that save_prototypes wrote, got another file"):
            PrototypicalNetwork(nn.Identity()).load_prototypes(tmp_path / file)


def test_prototypes_are_part_of_the_state(tmp_path):
    support, labels, queries, _ = episodes(())
    network = nn.Sequential(PrototypicalNetwork(backbone(), learn_temperature=True))
    unfitted = network.state_dict()
    network[0].fit_support(support, labels)
    torch.save(network.state_dict(), tmp_path / "state.pt")
    other = nn.Sequential(PrototypicalNetwork(backbone(), learn_temperature=True))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other[0].predict_proba(queries), network[0].predict_proba(queries))
    assert "4 classes fitted" in repr(other)
    other.load_state_dict(unfitted)
    assert other[0].classes is None


def test_what_has_to_come_first_is_named():
    queries = torch.randn(2, 1, 6, 6)
    network = PrototypicalNetwork(backbone(), centring="base")
    for call in (network.predict, network.predict_proba):
        with pytest.raises(RuntimeError, match="call fit_support first"):
            call(queries)
    with pytest.raises(RuntimeError, match=r"call fit_centre\(base samples\) first"):
        network.fit_support(queries, torch.arange(2))
    with pytest.raises(RuntimeError, match="call fit_support first"):
        network.add_support(queries, torch.arange(2))
    with pytest.raises(RuntimeError, match="centring: expected 'base', got 'none'"):
        PrototypicalNetwork(backbone()).fit_centre(queries)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "manhattan"}, "metric: expected one of"),
        ({"temperature": 0.0}, "temperature: expected a number > 0"),
        ({"centring": "mean"}, "centring: expected one of 'none', 'support', 'base'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PrototypicalNetwork(backbone(), **options)


def test_a_class_without_support_has_probability_0():
    support, labels, queries, _ = episodes(())
    kept = labels != 2
    network = PrototypicalNetwork(nn.Flatten())
    scores = network(support[kept], labels[kept], queries, num_classes=4)
    others = network(support[kept], labels[kept] - (labels[kept] > 2).long(), queries)
    assert (scores[:, 2] == -math.inf).all()
    assert_close(scores[:, [0, 1, 3]], others)


def test_no_support_and_no_queries():
    support, labels, queries, query_labels = episodes(())
    network = PrototypicalNetwork(nn.Flatten())
    assert network(support, labels, queries[:0]).shape == (0, 4)
    assert network.loss(support, labels, queries[:0], query_labels[:0], reduction="sum") == 0
    with pytest.raises(ValueError, match="num_classes: expected a number where there is no support"):
        network(support[:0], labels[:0], queries)
    with pytest.raises(
        ValueError, match="support: expected shape .* with at least one sample, got .* shape \\(0, 1, 6, 6"
    ):
        network.fit_support(support[:0], labels[:0])


class Wrapped(nn.Module):
    """Its output looks like those of Hugging Face's models, but for the name."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return SimpleNamespace(**{self.name: x})


def test_pooled_outputs_are_features():
    wrapped, plain = (
        PrototypicalNetwork(backbone).fit_support(torch.eye(4), torch.arange(4))
        for backbone in (Wrapped("pooler_output"), nn.Identity())
    )
    assert torch.equal(wrapped.prototypes, plain.prototypes)


def test_wrong_backbones_are_named():
    with pytest.raises(TypeError, match="backbone: expected a torch.nn.Module, got"):
        PrototypicalNetwork(torch.relu)
    with pytest.raises(TypeError, match="backbone: expected a tensor from it, got SimpleNamespace"):
        PrototypicalNetwork(Wrapped("features")).fit_support(torch.randn(4, 2), torch.arange(4))
    with pytest.raises(
        ValueError, match=r"backbone: expected features of shape \(4, ...\) from it, got .* shape \(8,\)"
    ):
        PrototypicalNetwork(nn.Flatten(0)).fit_support(torch.randn(4, 2), torch.arange(4))


def test_samples_of_other_features_are_named():
    network = PrototypicalNetwork(nn.Identity()).fit_support(torch.randn(2, 3), torch.arange(2))
    with pytest.raises(ValueError, match="support: expected the 3 features of the prototypes, got 4"):
        network.add_support(torch.randn(2, 4), torch.arange(2))
    with pytest.raises(TypeError, match="inputs: expected a tensor, got"):
        network.predict([[1.0, 2.0, 3.0]])


def test_wrong_labels_are_named():
    with pytest.raises(TypeError, match="support_labels: expected a tensor, got"):
        PrototypicalNetwork(nn.Identity())(torch.randn(2, 3), [0, 1], torch.randn(2, 3))
    with pytest.raises(TypeError, match="labels: expected integers"):
        PrototypicalNetwork(nn.Identity()).fit_support(torch.randn(2, 3), torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match="labels: expected shape"):
        PrototypicalNetwork(nn.Identity()).fit_support(torch.randn(2, 3), torch.tensor([0, 1, 2]))


def test_the_other_processes_files_are_left_alone_where_writing_fails(tmp_path):
    network = PrototypicalNetwork(nn.Identity()).fit_support(torch.randn(2, 3), torch.arange(2))
    with pytest.raises(OSError):
        network.save_prototypes(tmp_path / "no such folder" / "prototypes.pt")
    assert list(tmp_path.iterdir()) == []


# Accuracy over episodes


def scores_of(accuracies: torch.Tensor, queries: int):
    """An oracle that answers so many of an episode's queries rightly."""

    def predict(support, support_labels, asked):
        right = torch.arange(queries) < (accuracies[support[:, 0, 0].long()] * queries).round()[:, None]
        return nn.functional.one_hot((~right).long(), 2) * 3.0

    return predict


def test_mean_and_interval_are_students():
    accuracies = torch.tensor([0.2, 0.4, 0.6, 0.8, 1.0])
    which = torch.arange(5.0).view(5, 1, 1)
    batches = [
        Episode(x, torch.zeros(len(x), 1).long(), x, torch.zeros(len(x), 10).long()) for x in which.split([2, 3])
    ]
    found = evaluate_episodes(scores_of(accuracies, 10), batches)
    assert_close(found.accuracies, accuracies.double())
    assert found.mean == pytest.approx(0.6)
    assert found.half_width == pytest.approx(2.776445105 * math.sqrt(0.1 / 5))  # t(0.975, 4) from a printed table
    assert found.confidence == pytest.approx(1 / (1 + math.exp(-3)))
    assert str(found) == f"60.00 ± {100 * found.half_width:.2f} % (95 % interval, Student t over 5 episodes)"
    wider = evaluate_episodes(scores_of(accuracies, 10), batches, level=0.99)
    assert wider.half_width == pytest.approx(4.604094871 * math.sqrt(0.1 / 5))
    single = evaluate_episodes(scores_of(accuracies, 10), [Episode(*(x[:1] for x in batches[0]))])
    assert math.isnan(single.half_width) and str(single).startswith("20.00 % (")


def test_batches_change_nothing_and_the_mode_comes_back():
    labels = torch.arange(100) % 10
    images = torch.randn(100, 1, 6, 6) + labels.view(-1, 1, 1, 1) / 4
    network = PrototypicalNetwork(backbone()).train()
    found = [
        evaluate_episodes(network, EpisodeSampler(labels, 5, 2, 4, 12, batch_size=size).take(images)).accuracies
        for size in (None, 1, 12)
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert network.training and network.backbone[1].num_batches_tracked == 0


def test_the_bar_shows_where_it_is_asked_for(capsys):
    test = [episodes((2,)), episodes((2,))]
    evaluate_episodes(PrototypicalNetwork(backbone()), test)
    assert capsys.readouterr().err == ""
    evaluate_episodes(PrototypicalNetwork(backbone()), test, progress=True)
    assert "2/2" in capsys.readouterr().err
    sampler = EpisodeSampler(torch.arange(40) % 4, 4, 1, 1, episodes=3)
    evaluate_episodes(PrototypicalNetwork(nn.Identity()), sampler.take(torch.randn(40, 2)), progress=True)
    assert "3/3" in capsys.readouterr().err


def test_nothing_to_evaluate_and_wrong_scores_are_named():
    network = PrototypicalNetwork(nn.Identity())
    with pytest.raises(ValueError, match="episodes: expected at least one, got none"):
        evaluate_episodes(network, [])
    with pytest.raises(ValueError, match="predict: expected scores of shape"):
        evaluate_episodes(lambda *episode: torch.zeros(3), [episodes()])
    with pytest.raises(TypeError, match="predict: expected a tensor, got None"):
        evaluate_episodes(lambda *episode: None, [episodes()])
    with pytest.raises(TypeError, match="predict: expected a module or a function"):
        evaluate_episodes("network", [episodes()])
    with pytest.raises(TypeError, match="episodes: expected a DataLoader or sampler.take"):
        evaluate_episodes(network, 5)
    with pytest.raises(TypeError, match="episodes: expected Episodes, got Tensor; give the DataLoader collate_fn"):
        evaluate_episodes(network, torch.zeros(5, 3))
    for level in (0, 1, 95):
        with pytest.raises(ValueError, match="level: expected a number > 0 and <"):
            evaluate_episodes(network, [episodes()], level=level)


def test_tuples_are_episodes_too():
    network, episode = PrototypicalNetwork(nn.Flatten()), episodes((3,))
    found = [evaluate_episodes(network, [x], device="cpu").accuracies for x in (episode, tuple(episode))]
    assert torch.equal(*found)


def test_what_is_not_installed_is_named(monkeypatch):
    network, test = PrototypicalNetwork(backbone()), [episodes()]
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    for progress in (None, False):
        evaluate_episodes(network, test, progress=progress)
    with pytest.raises(ModuleNotFoundError, match="progress: expected tqdm to be installed"):
        evaluate_episodes(network, test, progress=True)
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs scipy, .*: pip install 'fastda-kernels\[fewshot\]'"):
        evaluate_episodes(network, test)


def test_it_is_the_fused_loss():
    """Training goes through one call of `fastda.prototypical_loss` for all episodes."""
    network, episode = PrototypicalNetwork(nn.Flatten()), episodes((8,))
    direct = fastda.prototypical_loss(
        episode.support.flatten(2), episode.support_labels, episode.queries.flatten(2), episode.query_labels, 4
    )
    assert torch.equal(network.loss(*episode), direct)
