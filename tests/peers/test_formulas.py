"""Patched, each library computes its own formula: values and first gradients in float64, worked out here once more."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fastda

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_mean(rows: Sequence[Tensor], like: Tensor) -> Tensor:
    """Of no rows: NaN."""
    return sum(rows, torch.zeros_like(like)) / len(rows) if rows else torch.full_like(like, math.nan)


def means(support: Tensor, labels: Sequence[int], classes: Sequence[int]) -> Tensor:
    return torch.stack([rows_mean([x for x, y in zip(support, labels) if y == c], support[0]) for c in classes])


def squared_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    return torch.stack([torch.stack([((q - p) ** 2).sum() for p in prototypes]) for q in queries])


def covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return sum(torch.outer(row, row) for row in centred) / (len(x) - 1)


def mean_coral(x: Tensor, y: Tensor) -> Tensor:
    """TLlib's and DomainBed's."""
    return ((covariance(x) - covariance(y)) ** 2).mean() + ((x.mean(0) - y.mean(0)) ** 2).mean()


def negative_log_likelihood(distances: Tensor, targets: Sequence[int], smoothing: float = 0.0) -> list[Tensor]:
    logs = -distances - torch.log(torch.exp(-distances).sum(1, keepdim=True))
    return [-(1 - smoothing) * row[y] - smoothing * row.mean() for row, y in zip(logs, targets)]


def of(module: str, name: str):
    """What the library has under a name at the moment of the call."""
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


@dataclass
class Case:
    """A call of a library, and its formula, on features of these shapes."""

    library: str
    name: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    broken: type[Exception] | None = None  # how the library itself fails today

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"


GAPS = [2, 0, 3, 0, 2]
EPISODES = torch.tensor([[2, 0, 1, 0], [1, 1, 0, 2]])


def easyfsl_scores(support: Tensor, queries: Tensor) -> Tensor:
    classifier = of("easyfsl.methods", "PrototypicalNetworks")()
    classifier.process_support_set(support, torch.tensor([1, 0, 2, 1]))
    return classifier(queries)


def learn2learn_scores(distance: str) -> Callable:
    def scores(support: Tensor, queries: Tensor) -> Tensor:
        classifier = of("learn2learn.nn.protonet", "PrototypicalClassifier")(distance=distance)
        classifier.fit_(support, torch.tensor([8, 3, 8, 5]))
        return classifier(queries)

    return scores


def torchmeta_loss(**options) -> Callable:
    def loss(prototypes: Tensor, embeddings: Tensor) -> Tensor:
        return of("torchmeta.utils.prototype", "prototypical_loss")(prototypes, embeddings, EPISODES, **options)

    return loss


def torchmeta_formula(reduce: Callable, smoothing: float = 0.0) -> Callable:
    def loss(prototypes: Tensor, embeddings: Tensor) -> Tensor:
        episodes = zip(embeddings, prototypes, EPISODES.tolist())
        return reduce([negative_log_likelihood(squared_distances(q, p), y, smoothing) for q, p, y in episodes])

    return loss


def mean_of(losses: list[list[Tensor]]) -> Tensor:
    return sum(sum(row) for row in losses) / sum(len(row) for row in losses)


def mean_of_those_that_are_not_class_1(losses: list[list[Tensor]]) -> Tensor:
    kept = [x for row, targets in zip(losses, EPISODES.tolist()) for x, y in zip(row, targets) if y != 1]
    return sum(kept) / len(kept)


def reversal(lambd: float) -> Callable:
    """The identity whose gradient is −λ times that of the value."""
    return lambda x: (1 + lambd) * x.detach() - lambd * x


def pytorch_adapt_reversal(x: Tensor) -> Tensor:
    layer = of("pytorch_adapt.layers.gradient_reversal", "GradientReversal")(0.5)
    layer.update_weight(0.25)
    return layer(x)


def warm_start(x: Tensor) -> Tensor:
    layer = of("tllib.modules.grl", "WarmStartGradientReverseLayer")(
        alpha=3.0, lo=0.2, hi=0.9, max_iters=10, auto_step=True
    )
    return torch.stack([layer(x) for _ in range(4)])


def warm_start_formula(x: Tensor) -> Tensor:
    lambdas = [0.2 + 0.7 * (2 / (1 + math.exp(-3 * step / 10)) - 1) for step in range(4)]
    return torch.stack([reversal(lambd)(x) for lambd in lambdas])


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.0]), torch.tensor([3.0, 0.25, 1.0, 1.0])


def tllib_dann(reduction: str, weighted: bool) -> Callable:
    def loss(f_s: Tensor, f_t: Tensor, weight: Tensor) -> Tensor:
        """A discriminator of one linear layer whose weight is given, with the sigmoid inside of a last block."""
        linear = nn.Linear(f_s.shape[1], 1, bias=False, dtype=f_s.dtype)
        del linear.weight
        linear.weight = weight
        discriminator = nn.Sequential(nn.Identity(), nn.Sequential(linear, nn.Sigmoid()))
        layer = of("tllib.modules.grl", "GradientReverseLayer")()
        module = of("tllib.alignment.dann", "DomainAdversarialLoss")(discriminator, reduction=reduction, grl=layer)
        weights = [w.to(f_s.dtype) for w in WEIGHTS] if weighted else []
        return module(f_s, f_t, *weights)

    return loss


def tllib_dann_formula(reduce: Callable, weighted: bool) -> Callable:
    def loss(f_s: Tensor, f_t: Tensor, weight: Tensor) -> Tensor:
        source, target = (1 / (1 + torch.exp(-reversal(1.0)(x) @ weight.T)) for x in (f_s, f_t))
        w_s, w_t = (w.to(f_s.dtype).unsqueeze(1) if weighted else 1.0 for w in WEIGHTS)
        return (reduce(-w_s * torch.log(source)) + reduce(-w_t * torch.log(1 - target))) / 2

    return loss


PROTOTYPES = ("easyfsl.methods.utils", "compute_prototypes"), ("learn2learn.nn.protonet", "compute_prototypes")
CASES = [
    Case(
        "easyfsl",
        "prototypes of labels with gaps",
        lambda x: of(*PROTOTYPES[0])(x, torch.tensor(GAPS)),
        lambda x: means(x, GAPS, range(3)),
        ((5, 4),),
    ),
    Case(
        "easyfsl",
        "prototypes of feature maps",
        lambda x: of(*PROTOTYPES[0])(x, torch.tensor([1, 0, 1])),
        lambda x: means(x, [1, 0, 1], range(2)),
        ((3, 2, 1, 3),),
    ),
    Case(
        "easyfsl",
        "prototypical networks",
        easyfsl_scores,
        lambda x, q: -squared_distances(q, means(x, [1, 0, 2, 1], range(3))).sqrt(),
        ((4, 3), (6, 3)),
    ),
    Case(
        "learn2learn",
        "prototypes of the labels that occur",
        lambda x: of(*PROTOTYPES[1])(x, torch.tensor([7, 0, 4, 0])),
        lambda x: means(x, [7, 0, 4, 0], (0, 4, 7)),
        ((4, 3),),
    ),
    Case(
        "learn2learn",
        "prototypes of feature maps",
        lambda x: of(*PROTOTYPES[1])(x, torch.tensor([1, 3, 3])),
        lambda x: means(x, [1, 3, 3], (1, 3)),
        ((3, 2, 2),),
    ),
    Case(
        "learn2learn",
        "euclidean distance, prototypes first",
        lambda p, q: of("learn2learn.nn.protonet", "PrototypicalClassifier").euclidean_distance(p, q),
        lambda p, q: squared_distances(q, p),
        ((3, 4), (5, 4)),
    ),
    Case(
        "learn2learn",
        "prototypical classifier",
        learn2learn_scores("euclidean"),
        lambda x, q: -squared_distances(q, means(x, [8, 3, 8, 5], (3, 5, 8))),
        ((4, 3), (5, 3)),
    ),
    Case(
        "learn2learn",
        "prototypical classifier, cosine",
        learn2learn_scores("cosine"),
        lambda x, q: (
            (q / (q.square().sum(1, keepdim=True).sqrt() + 1e-8))
            @ (p := means(x, [8, 3, 8, 5], (3, 5, 8))).T
            / (p.square().sum(1).sqrt() + 1e-8)
        ),
        ((4, 3), (5, 3)),
    ),
    Case(
        "torchmeta",
        "prototypes, one class absent",
        lambda x: of("torchmeta.utils.prototype", "get_prototypes")(x, EPISODES, 4),
        lambda x: torch.stack([means(s, y, range(4)) for s, y in zip(x, EPISODES.tolist())]).nan_to_num(0.0),
        ((2, 4, 3),),
    ),
    Case("torchmeta", "loss", torchmeta_loss(), torchmeta_formula(mean_of), ((2, 3, 4), (2, 4, 4))),
    Case(
        "torchmeta",
        "losses",
        torchmeta_loss(reduction="none"),
        torchmeta_formula(lambda losses: torch.stack([torch.stack(row) for row in losses])),
        ((2, 3, 4), (2, 4, 4)),
    ),
    Case(
        "torchmeta",
        "sum, smoothed",
        torchmeta_loss(reduction="sum", label_smoothing=0.2),
        torchmeta_formula(lambda losses: sum(sum(row) for row in losses), smoothing=0.2),
        ((2, 3, 4), (2, 4, 4)),
    ),
    Case(
        "torchmeta",
        "a class ignored",
        torchmeta_loss(ignore_index=1),
        torchmeta_formula(mean_of_those_that_are_not_class_1),
        ((2, 3, 4), (2, 4, 4)),
    ),
    Case(
        "pytorch_adapt",
        "covariance",
        lambda x: of("pytorch_adapt.layers.coral_loss", "covariance")(x),
        covariance,
        ((6, 4),),
    ),
    Case(
        "pytorch_adapt",
        "CORAL of unequal batches",
        lambda x, y: of("pytorch_adapt.layers.coral_loss", "CORALLoss")()(x, y),
        lambda x, y: ((covariance(x) - covariance(y)) ** 2).sum() / (4 * 4**2),
        ((6, 4), (3, 4)),
    ),
    Case("pytorch_adapt", "gradient reversal", pytorch_adapt_reversal, reversal(0.25), ((3, 4),)),
    Case(
        "pytorch_adapt",
        "gradient reversal, weight an integer",
        lambda x: of("pytorch_adapt.layers.gradient_reversal", "GradientReversal")(2)(x),
        reversal(2),
        ((3, 4),),
    ),
    Case(
        "tllib",
        "gradient reversal",
        lambda x: of("tllib.modules.grl", "GradientReverseLayer")()(x),
        reversal(1.0),
        ((3, 4),),
    ),
    Case(
        "tllib",
        "gradient reversal with λ",
        lambda x: of("tllib.modules.grl", "GradientReverseLayer")()(x, 0.3),
        reversal(0.3),
        ((3, 4),),
    ),
    Case("tllib", "warm start", warm_start, warm_start_formula, ((3, 4),), broken=AttributeError),
    Case(
        "tllib",
        "CORAL",
        lambda x, y: of("tllib.alignment.coral", "CorrelationAlignmentLoss")()(x, y),
        mean_coral,
        ((6, 4), (3, 4)),
    ),
    *(
        Case(
            "tllib",
            f"domain-adversarial loss, {reduction}{', weighted' * weighted}",
            tllib_dann(reduction, weighted),
            tllib_dann_formula(reduce, weighted),
            ((4, 3), (4, 3), (1, 3)),
        )
        for reduction, reduce in (("mean", torch.mean), ("sum", torch.sum), ("none", torch.clone))
        for weighted in (False, True)
    ),
    Case(
        "domainbed",
        "CORAL",
        lambda x, y: of("domainbed.algorithms", "AbstractMMD").mmd(SimpleNamespace(kernel_type="mean_cov"), x, y),
        mean_coral,
        ((6, 4), (3, 4)),
    ),
]


def outcome(function: Callable, case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Value, and gradients for a random incoming gradient."""
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in case.shapes]
    value = function(*inputs)
    incoming = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
    return [value, *torch.autograd.grad(value, inputs, incoming)]


def assert_agree(got: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, equal_nan=True, check_dtype=False, **tolerance)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients_are_those_of_the_librarys_formula(case, importing):
    importing(case.library)
    expected = outcome(case.formula, case)
    with fastda.patch(case.library):
        assert_agree(outcome(case.call, case), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_formula_is_the_librarys(case, importing):
    """So the test above holds the patch to what the library computes without it. TLlib's loss knows float32 alone."""
    importing(case.library)
    if case.broken:
        with pytest.raises(case.broken):
            outcome(case.call, case)
        return
    expected = outcome(case.formula, case)
    assert_agree(outcome(case.call, case, torch.float32), expected, rtol=1e-4, atol=1e-4)


# What each library does not do by itself, or not today


def test_easyfsl_has_second_derivatives(importing):
    importing("easyfsl")

    def third_of(support, queries):
        gradient = torch.autograd.grad(
            easyfsl_scores(support, queries).square().square().sum(), queries, create_graph=True
        )[0]
        return torch.autograd.grad(gradient.square().sum(), [support, queries])

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 6)]
    with pytest.raises(RuntimeError, match="not implemented"):
        third_of(*inputs)

    def by_formula(support, queries):
        distances = squared_distances(queries, means(support, [1, 0, 2, 1], range(3)))
        gradient = torch.autograd.grad(distances.square().sum(), queries, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), [support, queries])

    with fastda.patch("easyfsl"):
        assert_agree(third_of(*inputs), by_formula(*inputs), rtol=1e-9, atol=1e-9)


def test_tllibs_reversed_features_may_be_changed_in_place(importing):
    importing("tllib")
    with fastda.patch("tllib"):
        for layer in (
            of("tllib.modules.grl", "GradientReverseLayer"),
            of("tllib.modules.grl", "WarmStartGradientReverseLayer"),
        ):
            x = torch.tensor([-1.0, 2.0], requires_grad=True)
            y = layer()(x).relu_()
            assert y.tolist() == [0.0, 2.0] and x.tolist() == [-1.0, 2.0]


def test_tllibs_loss_takes_unequal_batches_and_certain_classifiers(importing):
    importing("tllib")
    linear = nn.Linear(2, 1, bias=False)
    nn.init.constant_(linear.weight, 100.0)
    with fastda.patch("tllib"):
        loss = of("tllib.alignment.dann", "DomainAdversarialLoss")(
            nn.Sequential(linear, nn.Sigmoid()), grl=nn.Identity()
        )
        source, target = -torch.ones(3, 2), torch.ones(5, 2, requires_grad=True)
        value = loss(source, target)
        (gradient,) = torch.autograd.grad(value, target)
        accuracy = loss.domain_discriminator_accuracy
    assert value.item() == pytest.approx(200.0)
    assert gradient.unique().item() == pytest.approx(50 / 5)  # TLlib's own is 0 there: its logarithm is cut at −100
    assert accuracy.item() == 0.0


def test_tllibs_loss_leaves_other_discriminators_alone(importing):
    """Two logits a sample; a discriminator of a class of its own; a layer that is watched by a hook."""
    importing("tllib")

    class Discriminator(nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True).sigmoid()

    calls = []
    watched = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())
    watched[1].register_forward_hook(lambda module, inputs, output: calls.append(output))
    source, target = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    for discriminator, options in ((Discriminator(), {}), (nn.Linear(2, 2), {"sigmoid": False}), (watched, {})):
        make = of("tllib.alignment.dann", "DomainAdversarialLoss")
        loss = make(discriminator, grl=nn.Identity(), **options)
        before = loss(source, target)
        with fastda.patch("tllib"):
            assert torch.equal(loss(source, target), before)
    assert len(calls) == 2


def test_domainbeds_other_kernel_is_left_alone(importing):
    importing("domainbed")
    make = of("domainbed.algorithms", "AbstractMMD")
    algorithm = make.__new__(make)
    nn.Module.__init__(algorithm)
    algorithm.kernel_type = "gaussian"
    x, y = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    before = algorithm.mmd(x, y)
    with fastda.patch("domainbed"):
        assert torch.equal(algorithm.mmd(x, y), before)


def test_torchmetas_class_weights_are_left_alone(importing):
    importing("torchmeta")
    loss = torchmeta_loss(weight=torch.tensor([1.0, 2.0, 0.5]))
    prototypes, embeddings = torch.randn(2, 3, 4), torch.randn(2, 4, 4)
    before = loss(prototypes, embeddings)
    with fastda.patch("torchmeta"):
        assert torch.equal(loss(prototypes, embeddings), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, importing):
    """Prototypes keep the dtype of the features; distances and losses are float32, and right to its rounding."""
    for library in ("easyfsl", "learn2learn", "torchmeta", "pytorch_adapt"):
        importing(library)
        fastda.patch(library)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([0, 1, 2, 1, 0])
    for prototypes in (
        of(*PROTOTYPES[0])(x, labels),
        of(*PROTOTYPES[1])(x, labels),
        of("torchmeta.utils.prototype", "get_prototypes")(x[None], labels[None], 3)[0],
    ):
        assert prototypes.dtype == dtype
        torch.testing.assert_close(prototypes, means(x.double(), labels.tolist(), range(3)).to(dtype))
    large = 20 * torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    loss = of("pytorch_adapt.layers", "CORALLoss")()(large[:32], large[32:])
    assert loss.dtype == torch.float32 and loss.isfinite()
    distances = of("learn2learn.nn.protonet", "PrototypicalClassifier").euclidean_distance(x[:2], x)
    assert_agree([distances], [squared_distances(x.double(), x[:2].double())], rtol=1e-5, atol=1e-5)
