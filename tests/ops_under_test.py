"""Each public op: how valid arguments are drawn, and which of them are features, labels and constants.

The contract is checked for whatever stands in this table, and a test compares the table with the public names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from tolerance import is_floating

import fastda
import fastda.reference

BOTH = (fastda.reference, fastda)
each_module = pytest.mark.parametrize("module", BOTH, ids=["reference", "fused"])
METRICS = ("sqeuclidean", "euclidean", "cosine")
REDUCTIONS = ("mean", "sum", "none")
LABEL_KINDS = ("balanced", "unbalanced", "gaps", "one class")


@dataclass(frozen=True)
class Sizes:
    """How large the drawn arguments are. `samples`: of the source or the support; `others`: targets or queries."""

    batch: tuple[int, ...] = ()
    samples: int = 7
    others: int = 5
    features: int = 4
    classes: int = 3
    labels: str = "balanced"


class Draw:
    """Random tensors of the given sizes, reproducible from the seed."""

    def __init__(self, sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (values * deviation + mean).to(self.dtype)

    def samples(self, count: int, **moments: float) -> Tensor:
        return self.normal(*self.sizes.batch, count, self.sizes.features, **moments)

    def labels(self, count: int) -> Tensor:
        """Labels below `sizes.classes`: as many of each, mostly the first, only even ones, or only the last."""
        shape, classes = (*self.sizes.batch, count), self.sizes.classes
        order = torch.randint(2**31, shape, generator=self.generator)
        if self.sizes.labels == "balanced":
            return order.argsort(-1) % classes
        if self.sizes.labels == "unbalanced":
            return torch.where(order % 4 == 0, order % classes, 0)
        if self.sizes.labels == "gaps":
            return order % classes // 2 * 2
        return torch.full(shape, classes - 1)


@dataclass(frozen=True)
class Op:
    """A public op. `make` draws its tensors; `options` are the keyword values that are tried with them."""

    name: str
    make: Callable[..., dict[str, object]]
    options: Mapping[str, Sequence[object]] = field(default_factory=dict)
    constants: tuple[str, ...] = ()  # floating arguments that get no gradient
    reversal: bool = False  # its gradient is not the derivative of its value, and its outputs are views
    differentiable_outputs: int | None = None  # how many of the outputs, where not all of them
    call: Callable[..., object] | None = None  # how it is called by keyword, where not by its own argument names

    def __str__(self) -> str:
        return self.name

    def of(self, module: object) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        """The op of fastda or fastda.reference as a function of the drawn arguments, to its differentiable outputs."""
        function = getattr(module, self.name)

        def op(**arguments: object) -> Tensor | tuple[Tensor, ...]:
            outputs = self.call(function, **arguments) if self.call else function(**arguments)
            if self.differentiable_outputs == 1:
                return outputs[0]
            return outputs

        return op

    def arguments(self, draw: Draw | None = None, **options: object) -> dict[str, object]:
        """Valid keyword arguments; options that are not given have the first value that is tried."""
        options = {name: options.get(name, values[0]) for name, values in self.options.items()}
        return {**self.make(draw or Draw(), **options), **options}

    def differentiable(self, arguments: Mapping[str, object]) -> dict[str, Tensor]:
        """The arguments that get a gradient."""
        return {name: x for name, x in arguments.items() if is_floating(x) and name not in self.constants}


def two_domains(draw: Draw, correction: int = 1, **_: object) -> dict[str, object]:
    least = correction + 1
    source, target = max(draw.sizes.samples, least), max(draw.sizes.others, least)
    return {"source": draw.samples(source), "target": draw.samples(target, mean=0.5, deviation=1.5)}


def one_domain(draw: Draw, correction: int = 1) -> dict[str, object]:
    return {"x": two_domains(draw, correction)["source"]}


def two_layers(draw: Draw, **options: object) -> dict[str, object]:
    first, second = two_domains(draw, **options), two_domains(draw, **options)
    return {f"{domain}_{i}": x for i, pair in enumerate((first, second)) for domain, x in pair.items()}


def call_on_layers(deep_coral_loss, source_0, target_0, source_1, target_1, **options):
    return deep_coral_loss([source_0, source_1], [target_0, target_1], **options)


def reversal(draw: Draw, **_: object) -> dict[str, object]:
    return {"x": draw.samples(draw.sizes.samples)}


def reversal_linear(draw: Draw, **_: object) -> dict[str, object]:
    width = draw.sizes.features
    return {"x": draw.samples(draw.sizes.samples), "weight": draw.normal(3, width), "bias": draw.normal(3)}


def domain_logits(draw: Draw, weighted: bool = False, **_: object) -> dict[str, object]:
    arguments = {
        "source_logits": draw.normal(*draw.sizes.batch, draw.sizes.samples, mean=1.0, deviation=3.0),
        "target_logits": draw.normal(*draw.sizes.batch, draw.sizes.others, mean=-1.0, deviation=3.0),
    }
    weights = {name.replace("logits", "weight"): draw.normal(*x.shape).abs() + 0.5 for name, x in arguments.items()}
    return arguments | weights if weighted else arguments


def call_weighted(domain_adversarial_loss, weighted, **arguments):
    return domain_adversarial_loss(**arguments)


def support_set(draw: Draw, **_: object) -> dict[str, object]:
    count = draw.sizes.samples
    return {"support": draw.samples(count), "labels": draw.labels(count), "num_classes": draw.sizes.classes}


def queries_and_prototypes(draw: Draw, temperature: object = 1.0, **_: object) -> dict[str, object]:
    return {"queries": draw.samples(draw.sizes.others), "prototypes": draw.samples(draw.sizes.classes, deviation=0.7)}


def classified_queries(draw: Draw, **options: object) -> dict[str, object]:
    return queries_and_prototypes(draw, **options) | {"targets": draw.labels(draw.sizes.others)}


def episode(draw: Draw, **_: object) -> dict[str, object]:
    sizes = draw.sizes
    return {
        "support": draw.samples(sizes.samples),
        "support_labels": draw.labels(sizes.samples),
        "queries": draw.samples(sizes.others),
        "query_labels": draw.labels(sizes.others),
        "num_classes": sizes.classes,
    }


CORAL = {"correction": (1, 0, 2), "scale": ("paper", "mean", "sum"), "mean_weight": (0.0, 0.7)}
LAMBDA = {"lambd": (0.3, 1.0, 0.0, -1.0, torch.tensor(0.6), torch.tensor([0.4]))}
METRIC = {"metric": METRICS}
SOFTMAX = METRIC | {"temperature": (1.0, 0.5, torch.tensor(2.0))}

OPS = (
    Op("covariance", one_domain, {"correction": (1, 0, 2)}),
    Op("coral_loss", two_domains, CORAL | {"reduction": REDUCTIONS}),
    Op("deep_coral_loss", two_layers, CORAL | {"weights": (None, (0.5, 2.0))}, call=call_on_layers),
    Op("gradient_reversal", reversal, LAMBDA, ("lambd",), reversal=True),
    Op("gradient_reversal_fork", reversal, LAMBDA, ("lambd",), reversal=True),
    Op("gradient_reversal_linear", reversal_linear, LAMBDA, ("lambd",), reversal=True),
    Op(
        "domain_adversarial_loss",
        domain_logits,
        {"reduction": REDUCTIONS, "weighted": (False, True)},
        call=call_weighted,
    ),
    Op("class_means", support_set, {"empty": ("nan", "zero")}),
    Op("pairwise_distance", queries_and_prototypes, METRIC),
    Op("prototype_log_softmax", queries_and_prototypes, SOFTMAX),
    Op("prototype_softmax", queries_and_prototypes, SOFTMAX),
    Op(
        "prototype_cross_entropy",
        classified_queries,
        SOFTMAX | {"label_smoothing": (0.0, 0.2), "ignore_index": (-100, 0), "reduction": REDUCTIONS},
    ),
    Op("prototypical_loss", episode, SOFTMAX | {"reduction": REDUCTIONS}),
    Op("nearest_prototype", queries_and_prototypes, METRIC | {"k": (1, 2)}, differentiable_outputs=1),
)
BY_NAME = {op.name: op for op in OPS}
each_op = pytest.mark.parametrize("op", OPS, ids=str)
each_plain_op = pytest.mark.parametrize("op", [op for op in OPS if not op.reversal], ids=str)
