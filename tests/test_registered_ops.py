"""opcheck for every op of torch.ops.fastda: schema, fakes, autograd registration, AOT dispatch.

The ops are enumerated, so that one without a sample fails.
"""

from __future__ import annotations

import pytest
import torch
from ops_under_test import METRICS, REDUCTIONS, Draw, Sizes
from tolerance import as_tuple, is_floating, random_like
from torch import Tensor

import fastda
from fastda.reference.precision import accumulate

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
EAGER, COMPILED = ("test_schema", "test_autograd_registration", "test_faketensor"), "test_aot_dispatch_dynamic"
SIZES = (
    Sizes(samples=5, others=4, features=9),
    Sizes(samples=9, others=8, features=3),
    Sizes(batch=(2, 3)),
    Sizes(batch=(0,)),
    Sizes(features=0),
)


def coral_loss(sizes):
    for dtype, scale in zip(DTYPES, ("paper", "sum", "mean")):
        draw = Draw(sizes, dtype)
        yield draw.samples(sizes.samples), draw.samples(sizes.others), 1, scale


def covariance(sizes):
    for dtype, correction in zip(DTYPES, (1, 0, 1)):
        yield Draw(sizes, dtype).samples(sizes.samples), correction


def coral_layers(sizes):
    for dtype, scale in zip(DTYPES, ("paper", "sum", "mean")):
        draw = Draw(sizes, dtype)
        sources = draw.normal(*sizes.batch, sizes.samples * sizes.features + 3 * 6)
        targets = draw.normal(*sizes.batch, sizes.others * sizes.features + 2 * 6)
        yield sources, targets, [sizes.samples, 3], [sizes.others, 2], [sizes.features, 6], [1.0, 0.5], 1, scale


def gradient_reversal(sizes):
    for dtype in DTYPES:
        x = Draw(sizes, dtype).samples(sizes.samples)
        yield x, torch.tensor(0.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def gradient_reversal_fork_backward(sizes):
    """Lists of gradients; of one dtype, and mixed as under autocast."""
    for dtype, other in zip(DTYPES, (torch.float32, torch.float64, torch.float32)):
        first, second = Draw(sizes, dtype), Draw(sizes, other, seed=1)
        yield tuple([draw.samples(3).mT, draw.normal(5)] for draw in (first, second)) + (torch.tensor(0.3),)


def domain_adversarial_loss(sizes):
    for dtype, reduction in zip(DTYPES, ("mean", "sum", "mean")):
        draw = Draw(sizes, dtype)
        source, target = draw.samples(sizes.samples), draw.samples(sizes.others)
        reduction = reduction if source.numel() else "sum"  # the mean over none is NaN, which is not close to itself
        yield source, target, source.abs() + 0.5, target.new_empty(0), len(sizes.batch), reduction


def temperature_of_each(draw):
    return torch.full(draw.sizes.batch, 0.7, dtype=accumulate(torch.empty(0, dtype=draw.dtype)).dtype)


def class_means(sizes):
    for dtype, empty in zip(DTYPES, ("nan", "zero", "nan")):
        draw = Draw(sizes, dtype)
        yield draw.samples(sizes.samples), draw.labels(sizes.samples), sizes.classes, empty


def queries_and_prototypes(sizes):
    for dtype, metric in zip(DTYPES, METRICS):
        draw = Draw(sizes, dtype)
        yield draw, draw.samples(sizes.others), draw.samples(sizes.classes), metric


def pairwise_distance(sizes):
    for _, queries, prototypes, metric in queries_and_prototypes(sizes):
        yield queries, prototypes, metric


def prototype_softmax(sizes):
    for draw, queries, prototypes, metric in queries_and_prototypes(sizes):
        yield queries, prototypes, temperature_of_each(draw), metric, draw.dtype == torch.float32


def prototype_cross_entropy(sizes):
    for (draw, queries, prototypes, metric), reduction in zip(queries_and_prototypes(sizes), REDUCTIONS):
        targets = draw.labels(sizes.others)
        yield queries, prototypes, temperature_of_each(draw), targets, 1, 0.1, metric, reduction


def nearest_prototype(sizes):
    for draw, queries, prototypes, metric in queries_and_prototypes(sizes):
        yield queries, prototypes, 2, metric


def prototypical_loss(sizes):
    for dtype, metric, reduction in zip(DTYPES, METRICS, REDUCTIONS):
        draw = Draw(sizes, dtype)
        support, queries = draw.samples(sizes.samples), draw.samples(sizes.others)
        labels = draw.labels(sizes.samples), draw.labels(sizes.others)
        yield support, queries, temperature_of_each(draw), *labels, sizes.classes, metric, reduction


SAMPLES = {
    f.__name__: f
    for f in (
        class_means,
        coral_layers,
        coral_loss,
        covariance,
        domain_adversarial_loss,
        gradient_reversal,
        gradient_reversal_fork_backward,
        nearest_prototype,
        pairwise_distance,
        prototype_cross_entropy,
        prototype_softmax,
        prototypical_loss,
    )
}


def asking(x: Tensor) -> Tensor:
    return x.requires_grad_() if is_floating(x) else x


def registered() -> list[str]:
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastda::")}
    return sorted(name.removeprefix("fastda::") for name in names)


def samples(name: str):
    """Arguments for an op; those of a backward op follow from its forward op's, unless it is in the table itself."""
    forward = name if name in SAMPLES else name.removesuffix("_backward")
    op, backward = (getattr(torch.ops.fastda, n).default for n in (forward, name))
    for sizes in SIZES:
        for sample in SAMPLES[forward](sizes):
            if name == forward:
                yield op, torch.utils._pytree.tree_map_only(Tensor, asking, sample)
                continue
            results = as_tuple(op(*sample))
            values = sum(argument.name.startswith("grad_") for argument in backward._schema.arguments)
            grads, saved = [random_like(value, i) for i, value in enumerate(results[:values])], results[values:]
            tensors = [x for x in sample if isinstance(x, torch.Tensor)]
            constants = [x for x in sample if not isinstance(x, torch.Tensor)]
            needs = [True] * len(backward._schema.returns)
            yield backward, (*grads, *tensors, *saved, *constants, *needs)


@pytest.mark.compiled_core
@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    assert {name, name.removesuffix("_backward")} & SAMPLES.keys(), f"fastda::{name} has no sample in this table"
    for i, (op, sample) in enumerate(samples(name)):
        size, dtype = divmod(i, len(DTYPES))
        # Compiling takes most of the time: each size with one dtype, each dtype at some size.
        torch.library.opcheck(op, sample, test_utils=(*EAGER, COMPILED) if size % len(DTYPES) == dtype else EAGER)


def test_ops_are_registered():
    assert set(SAMPLES) <= set(registered())


@pytest.mark.compiled_core
@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.ones(3, 5), torch.ones(3, 50_000), 1, "paper"), "target: expected the batch dimensions and features"),
        ((torch.ones(3, 5), torch.ones(5), 1, "paper"), "target: expected shape"),
        ((torch.ones(3, 5), torch.ones(1, 5), 1, "paper"), "more samples than correction"),
        ((torch.ones(3, 5), torch.ones(3, 5).double(), 1, "paper"), "target: expected the dtype of source"),
        ((torch.ones(3, 5).long(), torch.ones(3, 5).long(), 1, "paper"), "source: expected float32"),
        ((torch.ones(3, 5), torch.ones(3, 5), 1, "papper"), "scale: expected 'paper'"),
    ],
)
def test_a_direct_call_of_coral_is_checked(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.fastda.coral_loss(*arguments)


@pytest.mark.compiled_core
def test_a_direct_call_of_the_prototypical_loss_is_checked():
    features, labels, temperature = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64), torch.tensor(1.0)
    for changed, message in (
        ({3: labels[:1]}, "support_labels: expected 3 elements"),
        ({4: labels[:1]}, "query_labels: expected 3 elements"),
        ({4: labels.int()}, "labels: expected int64"),
        ({3: labels + 2}, "support_labels: expected labels in 0 ... 1"),
        ({2: torch.ones(2)}, "temperature: expected 1 elements"),
        ({1: torch.ones(3, 6)}, "queries: expected the batch dimensions and features"),
        ({5: 0}, "num_classes: expected at least 1"),
        ({6: "l1"}, "metric: expected 'sqeuclidean'"),
        ({7: "median"}, "reduction: expected 'none'"),
    ):
        arguments = dict(enumerate((features, features, temperature, labels, labels, 2, "cosine", "mean"))) | changed
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            torch.ops.fastda.prototypical_loss(*arguments.values())


@pytest.mark.compiled_core
def test_direct_calls_of_the_other_prototype_ops_are_checked():
    features, labels, temperature = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64), torch.tensor(1.0)
    softmax, cross_entropy = (
        (features, features, temperature, "cosine", True),
        (features, features, temperature, labels),
    )
    for name, arguments, message in (
        ("class_means", (features, labels[:1], 2, "nan"), "labels: expected 3 elements"),
        ("class_means", (features, labels, 2, "none"), "empty: expected 'nan' or 'zero'"),
        ("pairwise_distance", (features, torch.ones(3, 6), "cosine"), "prototypes: expected the batch dimensions"),
        ("pairwise_distance", (features, features.double(), "cosine"), "prototypes: expected the dtype of queries"),
        ("prototype_softmax", (*softmax[:3], "l1", True), "metric: expected 'sqeuclidean'"),
        ("prototype_softmax", (*softmax[:2], torch.ones(2), *softmax[3:]), "temperature: expected 1 elements"),
        ("prototype_cross_entropy", (*cross_entropy, 1, 0.0, "cosine", "median"), "reduction: expected 'none'"),
        ("prototype_cross_entropy", (*cross_entropy[:3], labels + 3, 1, 0.0, "cosine", "sum"), "targets: .* got 3;"),
        ("nearest_prototype", (features, features, 4, "cosine"), "k: expected 1 ... 3"),
    ):
        with pytest.raises((TypeError, ValueError, IndexError), match=message):
            getattr(torch.ops.fastda, name)(*arguments)
