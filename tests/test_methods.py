"""Methods: their terms against the formulas, what they need, and torch.compile, autocast, copies."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision_stub import import_timm

import fastda
from fastda.methods import DANN, CORALTerm, DeepCORAL, DomainAdversarialTerm, Method, SourceOnly, Term, split
from fastda.nn import DeepCORALLoss, DomainDiscriminator
from fastda.schedules import dann_lambda

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE, TARGET = torch.randn(12, 5), 2 * torch.randn(7, 5) + 1
LABELS = torch.arange(12) % 3


def networks(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh()).to(dtype), nn.Linear(6, 3).to(dtype)


def gradients(method: nn.Module, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = dict(method.named_parameters())
    found = torch.autograd.grad(sum(losses.values()), list(named.values()), materialize_grads=True)
    return dict(zip(named, found))


# Terms


def test_source_only():
    extractor, predictor = networks()
    losses = SourceOnly(extractor, predictor).losses(SOURCE, LABELS)
    assert list(losses) == ["task"]
    assert_close(losses["task"], F.cross_entropy(predictor(extractor(SOURCE)), LABELS))


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_deep_coral_over_several_layers(passes):
    """L_task + α Σ w_l L_CORAL(l), the logits among the layers, with the gradients of the formula."""
    extractor, predictor = networks(torch.float64)
    layers = ["feature_extractor.1", "feature_extractor", "label_predictor"]
    options = {"weights": [1.0, 0.5, 2.0], "scale": "mean", "mean_weight": 0.3}
    method = DeepCORAL(extractor, predictor, layers=layers, weight=70.0, passes=passes, **options)
    source, target = SOURCE.double(), TARGET.double()
    losses = method.losses(source, LABELS, target)

    def watched(x):
        middle = extractor[1](extractor[0](x))
        features = extractor(x)
        return [middle, features, predictor(features)]

    coral = fastda.reference.deep_coral_loss(watched(source), watched(target), **options)
    expected = {"task": F.cross_entropy(predictor(extractor(source)), LABELS), "coral": 70 * coral}
    assert losses.keys() == expected.keys()
    for name in losses:
        assert_close(losses[name], expected[name])
    wanted = gradients(method, expected)
    for name, gradient in gradients(method, losses).items():
        assert_close(gradient, wanted[name])


@pytest.mark.parametrize("passes", ["joint", "separate"])
@pytest.mark.parametrize(
    "classifier",
    [nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), DomainDiscriminator(6, 4, dropout=0.0)],
    ids=["any module", "discriminator"],
)
def test_dann(passes, classifier):
    """The gradient of L_y + w·L_d, in which that of L_d is multiplied by −λ where it enters the features."""
    extractor, predictor = networks(torch.float64)
    classifier = copy.deepcopy(classifier).double()
    method = DANN(extractor, predictor, classifier, lambd=lambda p: 0.2 + p, weight=0.7, passes=passes).double()
    method.set_progress(0.5)
    source, target = SOURCE.double(), TARGET.double()
    losses = method.losses(source, LABELS, target)
    task = F.cross_entropy(predictor(extractor(source)), LABELS)
    logits = [classifier(extractor(x)) for x in (source, target)]
    domain = 0.7 * (F.softplus(-logits[0]).mean() + F.softplus(logits[1]).mean()) / 2
    assert_close(losses, {"task": task, "domain": domain})
    of_task, of_domain = gradients(method, {"task": task}), gradients(method, {"domain": domain})
    for name, gradient in gradients(method, losses).items():
        factor = -0.7 if name.startswith("feature_extractor") else 1.0
        assert_close(gradient, of_task[name] + factor * of_domain[name])


def test_the_domain_classifier_is_made_for_the_features():
    extractor, predictor = networks()
    classifier = DANN(extractor, nn.Sequential(nn.ReLU(), predictor)).terms["domain"].domain_classifier
    assert isinstance(classifier, DomainDiscriminator) and classifier[0].in_features == 6


def test_a_combination_has_the_losses_of_its_parts():
    extractor, predictor = networks()
    classifier = nn.Linear(6, 1)
    parts = DeepCORAL(extractor, predictor, weight=10.0), DANN(extractor, predictor, classifier)
    expected = {name: loss for part in parts for name, loss in part.losses(SOURCE, LABELS, TARGET).items()}
    method = Method(extractor, predictor, [CORALTerm(weight=10.0), DomainAdversarialTerm(classifier)])
    assert_close(method.losses(SOURCE, LABELS, TARGET), expected)
    assert set(method.scheduled()) == {"coral_weight", "domain_weight", "domain_lambda"}


def test_a_method_of_ones_own_is_a_term():
    class Entropy(Term):
        needs_target_logits = True

        def forward(self, passed):
            return -(passed.target_logits.softmax(1) * passed.target_logits.log_softmax(1)).sum(1).mean()

    extractor, predictor = networks()
    method = Method(extractor, predictor, [Entropy("entropy", weight=0.1)])
    entropy = torch.distributions.Categorical(logits=predictor(extractor(TARGET))).entropy().mean()
    assert_close(method.losses(SOURCE, LABELS, TARGET)["entropy"], 0.1 * entropy)


# Target labels


def test_known_target_labels_count_and_unknown_ones_do_not():
    extractor, predictor = networks()
    labels = torch.tensor([-100, 1, -1, 0, -100, 2, -100])
    method = DeepCORAL(extractor, predictor, target_label_weight=0.5)
    losses = method.losses(SOURCE, LABELS, TARGET, labels)
    known = labels >= 0
    assert_close(losses["target_task"], 0.5 * F.cross_entropy(predictor(extractor(TARGET))[known], labels[known]))
    none = method.losses(SOURCE, LABELS, TARGET, torch.full((7,), -100))
    assert none["target_task"] == 0 and all(g.isfinite().all() for g in gradients(method, none).values())


def test_without_a_weight_target_labels_are_not_looked_at():
    extractor, predictor = networks()
    method = DeepCORAL(extractor, predictor)
    losses = method.losses(SOURCE, LABELS, TARGET, torch.zeros(7, dtype=torch.long))
    assert_close(losses, method.losses(SOURCE, LABELS, TARGET))
    assert list(losses) == ["task", "coral"]


def test_the_task_may_be_another():
    extractor, predictor = networks()
    smooth = SourceOnly(extractor, predictor, task_loss=partial(F.cross_entropy, reduction="none", label_smoothing=0.1))
    expected = F.cross_entropy(predictor(extractor(SOURCE)), LABELS, label_smoothing=0.1)
    assert_close(smooth.losses(SOURCE, LABELS)["task"], expected)
    regression = SourceOnly(extractor, nn.Linear(6, 2), task_loss=partial(F.mse_loss, reduction="none"))
    values = torch.randn(12, 2)
    values[3, 1] = torch.nan  # unknown
    known = values.isfinite()
    predicted = regression(SOURCE)
    loss = regression.losses(SOURCE, values)["task"]
    assert_close(loss, F.mse_loss(predicted[known], values[known]))
    assert all(g.isfinite().all() for g in gradients(regression, {"task": loss}).values())
    shares = torch.rand(12, 3).softmax(1)  # of the classes, as of mixed samples; of one sample unknown
    shares[5] = torch.nan
    mixed = SourceOnly(extractor, predictor)
    known = shares[:, 0].isfinite()
    assert_close(mixed.losses(SOURCE, shares)["task"], F.cross_entropy(mixed(SOURCE)[known], shares[known]))


# Schedules


def test_weights_and_lambda_follow_the_progress():
    extractor, predictor = networks()
    terms = [CORALTerm(weight=lambda p: 100 * p), DomainAdversarialTerm(nn.Linear(6, 1), lambd=dann_lambda)]
    method = Method(extractor, predictor, terms, target_label_weight=lambda p: 1 - p)
    for progress in (0.0, 0.3, 1.0):
        method.set_progress(progress)
        expected = {"coral_weight": 100 * progress, "domain_weight": 1.0, "domain_lambda": dann_lambda(progress)}
        assert method.scheduled() == pytest.approx(expected | {"target_label_weight": 1 - progress})
    assert not [name for name in method.state_dict() if "weight.value" in name], "loss weights are no weights"


# Networks of other kinds


class Encoder(nn.Module):
    """Takes keyword arguments and returns a dictionary-like output, as Hugging Face's do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        hidden = (self.words(input_ids) * attention_mask[..., None]).sum(1)
        return type("Output", (), {"logits": self.head(hidden)})()


@pytest.mark.parametrize("passes", ["joint", "separate"])
def test_dictionaries_of_inputs(passes):
    model = Encoder()
    head = model.head
    method = DeepCORAL(*split(model, "head"), passes=passes)
    batch = {"input_ids": torch.randint(0, 9, (6, 5)), "attention_mask": torch.ones(6, 5)}
    losses = method.losses(batch, torch.arange(6) % 3, {key: x[:4] for key, x in batch.items()})
    assert_close(method(batch), head(model.words(batch["input_ids"]).sum(1)))
    assert all(g.isfinite().all() for g in gradients(method, losses).values())


def test_a_model_of_hugging_face():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(vocab_size=50, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config)
    layers = ["feature_extractor.bert.encoder.layer.0", "feature_extractor"]
    method = DANN(*split(model, "classifier"))
    coral = Method(method.feature_extractor, method.label_predictor, [CORALTerm(layers)])
    batch = {"input_ids": torch.randint(0, 50, (12, 7)), "attention_mask": torch.ones(12, 7, dtype=torch.long)}
    target = {key: x[:8] for key, x in batch.items()}
    for each, name in ((method, "domain"), (coral, "coral")):
        losses = each.losses(batch, LABELS, target)
        assert list(losses) == ["task", name]
        assert all(g.isfinite().all() for g in gradients(each, losses).values())
    assert method(batch).shape == (12, 3)


def test_a_model_of_timm():
    try:
        timm = import_timm()
    except ImportError as error:
        pytest.skip(f"timm: {error}; pip install --no-deps timm (its torchvision is not needed)")
    model = timm.create_model("resnet18", pretrained=False, num_classes=3)
    method = DeepCORAL(*split(model, "fc"), layers=["feature_extractor.layer3", "feature_extractor.layer4"])
    source, target = torch.randn(6, 3, 32, 32), torch.randn(4, 3, 32, 32)
    losses = method.losses(source, LABELS[:6], target)
    assert all(g.isfinite().all() for g in gradients(method, losses).values())
    maps = [[], []]
    handles = [
        getattr(model, f"layer{n}").register_forward_hook(lambda m, x, y, kept=kept: kept.append(y))
        for n, kept in zip((3, 4), maps)
    ]
    model(torch.cat([source, target]))
    for handle in handles:
        handle.remove()
    pooled = [kept[0].mean((2, 3)) for kept in maps]
    expected = 1000 * fastda.reference.deep_coral_loss([x[:6] for x in pooled], [x[6:] for x in pooled])
    assert_close(losses["coral"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("pool", "function"),
    [
        ("mean", lambda x: x.mean((2, 3))),
        ("max", lambda x: x.amax((2, 3))),
        ("flatten", lambda x: x.flatten(1)),
        (lambda x: x[:, :, 0, 0], lambda x: x[:, :, 0, 0]),
    ],
)
def test_pooling_of_maps(pool, function):
    layer = nn.Conv2d(1, 4, 3)
    model = nn.Sequential(layer, nn.Flatten())
    coral = DeepCORALLoss(model, "0", pool=pool)
    source, target = torch.randn(6, 1, 5, 5), torch.randn(5, 1, 5, 5)
    model(source), model(target)
    assert_close(coral(), fastda.reference.coral_loss(function(layer(source)), function(layer(target))))


def test_tokens_are_averaged_over_their_places():
    model = nn.Linear(4, 6)
    coral = DeepCORALLoss(nn.Sequential(model), "0")
    source, target = torch.randn(6, 3, 4), torch.randn(5, 3, 4)
    for x in (source, target):
        model(x)
    assert_close(coral(), fastda.reference.coral_loss(model(source).mean(1), model(target).mean(1)))


# The loss as a Module


def test_deep_coral_loss_beside_another_objective():
    extractor, predictor = networks()
    model = nn.Sequential(extractor, predictor)
    coral = DeepCORALLoss(model, ["0.1", "1"], weights=[1.0, 3.0])
    model(torch.cat([SOURCE, TARGET]))
    joint = coral(num_source=12)
    model(SOURCE), model(TARGET)
    assert_close(joint, coral())
    with torch.no_grad():
        model(SOURCE)  # evaluation is not watched
    model(torch.cat([SOURCE, TARGET]))
    assert_close(joint, coral(num_source=12))
    with pytest.raises(ValueError, match="^layers: expected '0.1' to have run twice since the last loss, got 0 times"):
        coral()
    for _ in range(2):
        model(SOURCE)
    with pytest.raises(ValueError, match="^layers: expected '0.1' to have run once since the last loss, got 2 times"):
        coral(num_source=6)
    coral.remove()
    model(SOURCE), model(TARGET)
    with pytest.raises(ValueError, match="got 0 times"):
        coral()


def test_a_copy_watches_itself():
    extractor, predictor = networks()
    method = DeepCORAL(extractor, predictor)
    twin = copy.deepcopy(method)
    for parameter in twin.parameters():
        parameter.data.mul_(2)
    expected = DeepCORAL(*(copy.deepcopy(part) for part in (twin.feature_extractor, twin.label_predictor)))
    assert_close(twin.losses(SOURCE, LABELS, TARGET), expected.losses(SOURCE, LABELS, TARGET))
    assert not torch.equal(method.losses(SOURCE, LABELS, TARGET)["coral"], twin.losses(SOURCE, LABELS, TARGET)["coral"])


def test_a_copy_under_gradient_checkpointing():
    """Which runs layers again in backward, after the loss has looked at them."""

    class Block(nn.Linear):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(6, 6)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)

    extractor, predictor = networks()
    method = DeepCORAL(nn.Sequential(extractor, Outer()), predictor, layers="feature_extractor.1.block")
    for _ in range(2):
        losses = method.losses(SOURCE, LABELS, TARGET)
        sum(losses.values()).backward()
    twin = copy.deepcopy(method)
    assert_close(twin.losses(SOURCE, LABELS, TARGET), losses)


# torch.compile, autocast, gradient scaling


def combination(dtype: torch.dtype = torch.float32) -> Method:
    extractor, predictor = networks(dtype)
    torch.manual_seed(1)
    terms = [
        CORALTerm(["feature_extractor.1", "label_predictor"], weight=30.0),
        DomainAdversarialTerm(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1)), lambd=dann_lambda),
    ]
    return Method(extractor, predictor, terms, target_label_weight=0.5).to(dtype)


def test_compiles_in_one_graph_and_no_schedule_compiles_anew():
    method = combination()
    labels = torch.tensor([-100, 1, -1, 0, -100, 2, -100])
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(method.losses, fullgraph=True, backend=backend)
    for progress in (0.1, 0.4, 0.9):
        method.set_progress(progress)
        found = compiled(SOURCE, LABELS, TARGET, labels)
        expected = method.losses(SOURCE, LABELS, TARGET, labels)
        assert_close(found, expected)
        wanted = gradients(method, expected)
        for name, gradient in gradients(method, found).items():
            assert_close(gradient, wanted[name])
    assert len(graphs) == 1


@pytest.mark.slow
def test_compiles_to_machine_code():
    """Half a minute: losses and gradients of the whole method by inductor."""
    method, labels = combination(), torch.arange(7) % 3
    method.set_progress(0.5)
    expected = method.losses(SOURCE, LABELS, TARGET, labels)
    found = torch.compile(method.losses, fullgraph=True)(SOURCE, LABELS, TARGET, labels)
    assert_close(found, expected)
    wanted = gradients(method, expected)
    for name, gradient in gradients(method, found).items():
        assert_close(gradient, wanted[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_gradient_scaling(dtype):
    """Close to float32 in losses and gradients; the losses themselves are float32."""
    method, labels = combination(), torch.arange(7) % 3
    method.set_progress(0.5)
    expected = method.losses(SOURCE, LABELS, TARGET, labels)
    wanted = gradients(method, expected)
    with torch.autocast("cpu", dtype=dtype):
        found = method.losses(SOURCE, LABELS, TARGET, labels)
    scale = 2.0**10
    scaled = gradients(method, {name: scale * loss for name, loss in found.items()})
    assert all(loss.dtype == torch.float32 for loss in found.values())
    rough = 8 * torch.finfo(dtype).eps
    for name in expected:
        assert_close(found[name], expected[name], rtol=4 * rough, atol=rough)
    for name, gradient in scaled.items():
        assert (gradient / scale - wanted[name]).norm() <= 4 * rough * wanted[name].norm() + rough


# Errors


class Vector(Term):
    def forward(self, passed):
        return passed.source_features.sum(1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e, p: Method(e, lambda x: x), TypeError, "^label_predictor: expected a torch.nn.Module"),
        (lambda e, p: Method(e, p, passes="both"), ValueError, "^passes: expected one of 'joint', 'separate'"),
        (lambda e, p: Method(e, p, task_loss="mse"), TypeError, "^task_loss: expected a function, got 'mse'"),
        (lambda e, p: Method(e, p, nn.Linear(2, 2)), TypeError, "^terms: expected terms, got Linear"),
        (lambda e, p: CORALTerm(name="layer.1"), ValueError, "^name: expected one that Python takes for a variable"),
        (lambda e, p: DANN(e, p, "small"), TypeError, "^domain_classifier: expected a torch.nn.Module, got 'small'"),
        (
            lambda e, p: DANN(e, p, nn.Linear(6, 2)).losses(SOURCE, LABELS, TARGET),
            ValueError,
            r"^domain_classifier: expected one logit a sample, 19 in all, got .*\(19, 2\)",
        ),
        (
            lambda e, p: Method(e, p, Vector("vector")).losses(SOURCE, LABELS, TARGET),
            ValueError,
            r"^vector: expected a scalar tensor from the term, got .*\(12,\).*average it",
        ),
        (
            lambda e, p: Method(e, p, Term("bare")).losses(SOURCE, LABELS, TARGET),
            TypeError,
            "^Term: expected a term with",
        ),
        (
            lambda e, p: Method(e, p, [CORALTerm(), CORALTerm()]),
            ValueError,
            "^terms: expected each name once, got 'coral'",
        ),
        (
            lambda e, p: DeepCORAL(e, p, layers="1"),
            ValueError,
            "^layers: expected names of modules .* got '1'; near it are",
        ),
        (lambda e, p: DeepCORAL(e, p, layers=[]), ValueError, "^layers: expected at least one name"),
        (lambda e, p: DeepCORAL(e, p, weights=[1.0, 2.0]), ValueError, "^layers: .* got 1 names, 2 weights"),
        (lambda e, p: DeepCORAL(e, p, scale="none"), ValueError, "^scale: expected one of 'paper'"),
        (lambda e, p: DeepCORAL(e, p, pool="sum"), ValueError, "^pool: expected one of 'mean'"),
        (lambda e, p: DeepCORAL(e, p, weight=math.nan), ValueError, "^coral_weight: expected a number finite"),
        (lambda e, p: DANN(e, nn.Flatten()), ValueError, "^domain_classifier: expected a module, got None"),
        (lambda e, p: DANN(e, p, lambd="high"), TypeError, "^lambd: expected a number, got 'high'"),
        (
            lambda e, p: DANN(nn.Unflatten(1, (1, 5)), nn.Sequential(nn.Flatten(), nn.Linear(5, 3))).losses(
                SOURCE, LABELS, TARGET
            ),
            ValueError,
            r"^domain_classifier: expected features of shape \(samples, 5\), got .*\(19, 1, 5\)",
        ),
        (lambda e, p: split(e, "fc"), ValueError, "^head: expected the name of a module of Sequential, got 'fc'"),
        (
            lambda e, p: DeepCORAL(e, p).losses(SOURCE, LABELS),
            ValueError,
            "^target: expected a batch, since DeepCORAL adapts",
        ),
        (
            lambda e, p: DeepCORAL(e, p, target_label_weight=1.0).losses(SOURCE, LABELS, TARGET),
            ValueError,
            "^target_labels: expected labels",
        ),
        (
            lambda e, p: SourceOnly(e, p, task_loss=nn.CrossEntropyLoss()).losses(SOURCE, LABELS),
            ValueError,
            "^task_loss: expected one loss a label.*reduction='none'",
        ),
        (
            lambda e, p: DeepCORAL(e, p).losses(SOURCE, LABELS, TARGET[:1]),
            ValueError,
            r"layer 0: target: expected at least 2 samples \(correction \+ 1\), got 1",
        ),
        (
            lambda e, p: DeepCORAL(nn.Flatten(), nn.Linear(5, 3)).losses(SOURCE, LABELS, TARGET[:, :4]),
            ValueError,
            '^target: expected samples of the source\'s shape.*passes="separate"',
        ),
        (
            lambda e, p: DeepCORAL(e, p).losses({"x": SOURCE, "mask": SOURCE}, LABELS, {"x": TARGET}),
            ValueError,
            "^target: expected inputs like the source's, a dictionary of mask, x, got a dictionary of x; give both",
        ),
        (
            lambda e, p: DeepCORAL(e, p).losses((SOURCE, SOURCE), LABELS, (TARGET,)),
            ValueError,
            "^target: expected inputs like the source's, a tuple of 2, got a tuple of 1; give both",
        ),
        (
            lambda e, p: SourceOnly(nn.LSTM(5, 6), p).losses(SOURCE, LABELS),
            TypeError,
            "^feature_extractor: expected a tensor",
        ),
    ],
)
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call(*networks())
