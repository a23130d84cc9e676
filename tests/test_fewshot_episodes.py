"""Episodes: what they hold, and that they depend on seed, epoch and number alone."""

from __future__ import annotations

import pickle
from itertools import chain, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from fastda.fewshot import Episode, EpisodeSampler, collate
from fastda.fewshot.episodes import labels_of

LABELS = torch.arange(60).remainder(6).mul(10)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
INPUTS = torch.stack([torch.arange(60.0), LABELS.float()], 1)  # which sample it is, and its label
DATASET = TensorDataset(INPUTS, LABELS)


class WithTargets(Dataset):
    def __init__(self, targets):
        self.targets = targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return np.float32([i, self.targets[i]]), self.targets[i], "what else there is"


def sampler(**options) -> EpisodeSampler:
    return EpisodeSampler(LABELS, **{"ways": 3, "shots": 2, "queries": 4, "episodes": 8, **options})


def loader(sampler: EpisodeSampler, **options) -> DataLoader:
    return DataLoader(DATASET, batch_sampler=sampler, collate_fn=sampler.collate, **options)


def assert_equal(episodes, others):
    episodes, others = list(episodes), list(others)
    assert len(episodes) == len(others)
    for one, other in zip(episodes, others):
        assert all(torch.equal(x, y) for x, y in zip((*one, one.classes), (*other, other.classes)))


@given(
    ways=st.integers(1, 6),
    shots=st.integers(1, 4),
    queries=st.integers(1, 6),
    batch_size=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 2**40),
)
def test_an_episode_is_what_its_definition_says(ways, shots, queries, batch_size, seed):
    options = dict(ways=ways, shots=shots, queries=queries, episodes=4, batch_size=batch_size, seed=seed)
    for episode in sampler(**options).take(INPUTS):
        batch = () if batch_size is None else (batch_size,)
        assert episode.support.shape == (*batch, ways * shots, 2)
        assert episode.queries.shape == (*batch, ways * queries, 2)
        assert episode.classes.shape == (*batch, ways)
        singles = [episode] if batch_size is None else [Episode(*x) for x in zip(*episode, episode.classes)]
        for one in singles:
            assert len(one.classes.unique()) == ways
            assert one.support_labels.bincount().tolist() == [shots] * ways
            assert one.query_labels.bincount().tolist() == [queries] * ways
            assert torch.equal(one.support[:, 1].long(), one.classes[one.support_labels])
            assert torch.equal(one.queries[:, 1].long(), one.classes[one.query_labels])
            drawn = torch.cat([one.support, one.queries])[:, 0]
            assert len(drawn.unique()) == len(drawn)  # no query is in the support


def test_draws_are_uniform():
    classes, samples = torch.zeros(6), torch.zeros(60)
    for episode in sampler(episodes=600).take(INPUTS):
        classes += (episode.classes // 10).bincount(minlength=6)
        samples += episode.support[:, 0].long().bincount(minlength=60)
    assert (classes - 300).abs().max() < 5 * 300**0.5
    assert (samples - 60).abs().max() < 5 * 60**0.5


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_loader_gives_what_take_gives(batch_size):
    assert_equal(loader(sampler(batch_size=batch_size)), sampler(batch_size=batch_size).take(INPUTS))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(workers):
    assert_equal(loader(sampler()), loader(sampler(), num_workers=workers))


def test_taken_episodes_are_contiguous():
    """What follows flattens them, which would copy all of them otherwise."""
    (batch,) = sampler(batch_size=8).take(INPUTS)
    assert all(x.is_contiguous() for x in (*batch, batch.classes))


def test_taken_episodes_have_a_length_and_each_pass_is_an_epoch():
    taken, loaded = sampler(batch_size=2).take(INPUTS), loader(sampler(batch_size=2))
    assert len(taken) == len(loaded) == 4
    for _ in range(2):
        assert_equal(taken, loaded)


def test_batches_hold_the_single_episodes():
    (batch,) = sampler(batch_size=8).take(INPUTS)
    assert_equal([Episode(*x) for x in zip(*batch, batch.classes)], sampler().take(INPUTS))


def test_seeds_and_epochs_differ_and_come_back():
    one = sampler()
    first, second = list(one), list(one)
    assert first != second != list(sampler(seed=1))
    assert not {tuple(x) for x in first} & {tuple(x) for x in second}
    one.set_epoch(0)
    assert list(one) == first and list(one) == second


def test_a_pass_that_is_broken_off_is_an_epoch_too():
    one = sampler()
    begun = list(islice(one, 2))
    assert list(one)[:2] != begun


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_where_it_stopped(workers):
    whole = sampler(batch_size=2)
    episodes = list(chain(loader(whole), loader(whole)))
    stopped = sampler(batch_size=2)
    list(loader(stopped))
    used = list(islice(loader(stopped, num_workers=workers), 1))  # workers fetch ahead of what is used
    resumed = sampler(batch_size=2)
    resumed.set_epoch(1, len(used))
    assert_equal(episodes[4:], [*used, *loader(resumed)])


def test_state():
    one, other = sampler(seed=3), sampler()
    list(one)
    passing = iter(one)
    expected = [next(passing) for _ in range(5)][3:] + list(passing)
    one.set_epoch(1)
    passing = iter(one)
    [next(passing) for _ in range(3)]
    assert one.state_dict() == {"seed": 3, "epoch": 1, "episodes": 3}
    other.load_state_dict(one.state_dict())
    assert list(other) == expected
    assert one.state_dict() == pickle.loads(pickle.dumps(one.state_dict()))
    list(passing)
    assert one.state_dict() == {"seed": 3, "epoch": 2, "episodes": 0}


def test_training_goes_on_with_other_processes_and_other_batches():
    """A state counts the episodes of all processes."""
    one, two = (sampler(num_replicas=2, rank=rank) for rank in (0, 1))
    for passing in map(iter, (one, two)):
        used = list(islice(passing, 2))
    assert used and one.state_dict() == two.state_dict() == {"seed": 0, "epoch": 0, "episodes": 4}
    alone, batches = sampler(), sampler(batch_size=2)
    for resumed in (alone, batches):
        resumed.load_state_dict(one.state_dict())
    assert list(alone) == list(sampler())[4:]
    assert list(batches) == list(sampler(batch_size=2))[2:]


def test_a_state_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="state: expected a multiple of 4 episodes given out .* got 3; choose another"):
        sampler(batch_size=4).load_state_dict({"seed": 0, "epoch": 0, "episodes": 3})
    with pytest.raises(
        ValueError, match="state: expected a dictionary with seed, epoch and episodes, got {'epoch': 1}"
    ):
        sampler().load_state_dict({"epoch": 1})
    with pytest.raises(ValueError, match="batch: expected at most the 8 of an epoch, got 9"):
        sampler().set_epoch(0, 9)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_processes_share_the_episodes(batch_size):
    whole = list(sampler(batch_size=batch_size).take(INPUTS))
    shares = [list(sampler(batch_size=batch_size, num_replicas=2, rank=r).take(INPUTS)) for r in (0, 1)]
    assert [len(share) for share in shares] == [len(whole) // (1 if batch_size else 2)] * 2
    if batch_size is None:
        assert_equal(whole, chain(*zip(*shares)))
    else:
        together = [
            Episode(*(torch.stack([x, y], 1).flatten(0, 1) for x, y in zip((*a, a.classes), (*b, b.classes))))
            for a, b in zip(*shares)
        ]
        assert_equal(whole, together)


def test_labels_from_whatever_has_them():
    expected = LABELS.numpy()
    sources = {
        "tensor": LABELS,
        "array": expected,
        "list": LABELS.tolist(),
        "int32": LABELS.int(),
        "uint8": LABELS.to(torch.uint8),
        "tensors": list(LABELS),
        "array-like": memoryview(expected),
        "targets": WithTargets(LABELS.tolist()),
        "TensorDataset": DATASET,
        "Subset": Subset(WithTargets([0, *LABELS.tolist()]), range(1, 61)),
        "ConcatDataset": ConcatDataset([Subset(DATASET, range(7)), Subset(DATASET, range(7, 60))]),
    }
    for name, source in sources.items():
        assert np.array_equal(labels_of(source), expected), name


def test_a_dataset_of_arrays_with_more_than_two_values():
    dataset = WithTargets(LABELS.tolist())
    one = EpisodeSampler(dataset, ways=2, shots=1, queries=1, episodes=2)
    for episode in DataLoader(dataset, batch_sampler=one, collate_fn=one.collate):
        assert torch.equal(episode.support[:, 1].long(), episode.classes)


NO_LABELS = [torch.randn(5), [[1], [2]], [[1], [1, 2]], ["cat", "dog"], "012", 7, {1: 2}, None, object()]


@pytest.mark.parametrize("source", NO_LABELS)
def test_no_labels(source):
    with pytest.raises(TypeError, match=r"labels: expected integers, .*; (pass them as a list: \[label for|flatten)"):
        EpisodeSampler(source, 1, 1, 1, 1)


class NotToBeRead(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        raise AssertionError("the dataset is read")


def test_a_dataset_is_not_read_for_labels():
    with pytest.raises(TypeError, match="labels: expected integers, .* got NotToBeRead"):
        EpisodeSampler(NotToBeRead(), 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 7}, r"labels: expected at least 7 classes \(ways\), got 6"),
        (
            {"queries": 9},
            r"labels: expected at least 11 samples in each class .* got 10 in class 0, 10 in class 10, .* 3 more",
        ),
        ({"shots": 0}, "shots: expected at least 1, got 0"),
        ({"seed": -1}, "seed: expected at least 0"),
        ({"batch_size": 3}, "episodes, batch_size: expected whole batches .* got 8 episodes in batches of 3"),
        ({"batch_size": 4, "num_replicas": 3, "rank": 0}, "expected whole batches that 3 process"),
        ({"num_replicas": 2, "rank": 2}, r"rank: expected at most 1 \(num_replicas − 1\), got 2"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


def test_take_wants_the_inputs_of_the_labels():
    with pytest.raises(ValueError, match="inputs: expected one row for each of the 60 labels"):
        sampler().take(INPUTS[:59])
    with pytest.raises(TypeError, match="inputs: expected a tensor"):
        sampler().take(INPUTS.numpy())


def test_collate_refuses_what_makes_no_episodes():
    samples = [(torch.zeros(1), i // 2) for i in range(4)]
    with pytest.raises(ValueError, match="samples: expected 6 of them, .* got 4"):
        collate(samples, ways=2, shots=1, queries=2)
    with pytest.raises(ValueError, match="samples: expected a multiple of 6 of them"):
        collate(samples, ways=2, shots=1, queries=2, batched=True)
    with pytest.raises(ValueError, match="expected one label for all samples of a class"):
        collate(samples, ways=2, shots=1, queries=1)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(1), "expected pairs of input and label, got Tensor; let the dataset give both"),
        ((torch.zeros(1), "cat"), "expected integers as labels, got str"),
        (({"pixels": torch.zeros(1)}, 0), "expected tensors, arrays or numbers of one shape as inputs, got dict"),
        ((object(), 0), "expected tensors, arrays or numbers of one shape as inputs, got object"),
    ],
)
def test_samples_that_collate_cannot_take_are_named(sample, message):
    with pytest.raises(TypeError, match=f"samples: {message}"):
        collate([sample, sample], ways=1, shots=1, queries=1)


def test_inputs_of_several_shapes_are_named():
    with pytest.raises(TypeError, match=r"of one shape as inputs, got Tensor \(.*\); let the dataset's transform"):
        collate([(torch.zeros(1), 0), (torch.zeros(2), 0)], ways=1, shots=1, queries=1)


def test_an_episode_moves_and_unpacks():
    episode = next(iter(sampler().take(INPUTS)))
    support, support_labels, queries, query_labels = episode
    moved = episode.to("meta")
    assert moved.support.is_meta and moved.classes.is_meta and moved.support.shape == support.shape
    assert Episode(support, support_labels, queries, query_labels).to("cpu").classes is None
