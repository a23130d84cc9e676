"""More than 2³¹ elements: what lies beyond is read, and written, where it belongs.

Features in bfloat16 take 4 GiB; all samples but the last three are zero, so the results of those three are known from
three samples alone. Queries × classes go beyond with few features, in as much memory as the results take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastda
import fastda.reference

FEATURES, LAST = 64, 3
SAMPLES = 2**31 // FEATURES + LAST
CLASSES, QUERIES = 2**15 + 1, 2**16
NEEDED = 16 * 2**30  # bytes


def free_memory() -> int:
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


no_memory = not os.path.exists("/proc/meminfo") or free_memory() < NEEDED
pytestmark = [
    pytest.mark.slow,
    pytest.mark.compiled_core,  # the reference would take 20 GB
    pytest.mark.skipif(no_memory, reason=f"less than {NEEDED / 2**30:.0f} GiB of memory are free"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def beyond(last: Tensor) -> Tensor:
    """Zeros, and these samples at the end."""
    x = torch.zeros(SAMPLES, *last.shape[1:], dtype=last.dtype)
    x[-LAST:] = last
    return x


def last_rows(function: Callable[[Tensor], Tensor], x: Tensor, seed: int = 5) -> tuple[Tensor, Tensor]:
    """The results of the last samples, and these samples' gradients for incoming gradients of those results alone."""
    x = x.detach().requires_grad_()
    result = function(x)[-LAST:]
    (gradient,) = torch.autograd.grad(result, x, normal(*result.shape, seed=seed).to(result.dtype))
    return result.detach().clone(), gradient[-LAST:].clone()


WEIGHT = normal(4, FEATURES, seed=1)
REVERSALS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_reversal": lambda x: fastda.gradient_reversal(x, 0.5),
    "gradient_reversal_fork": lambda x: fastda.gradient_reversal_fork(x, 0.5)[1],
    "gradient_reversal_linear": lambda x: fastda.gradient_reversal_linear(x, WEIGHT, None, 0.5)[1],
}


@pytest.mark.parametrize("op", REVERSALS)
def test_reversals(op):
    last = normal(LAST, FEATURES)
    result, gradient = last_rows(REVERSALS[op], beyond(last))
    expected, expected_gradient = last_rows(REVERSALS[op], last)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(gradient, expected_gradient)


TARGETS = torch.arange(QUERIES) * 7 % CLASSES
MATRICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pairwise_distance": fastda.pairwise_distance,
    "prototype_log_softmax": fastda.prototype_log_softmax,
    "prototype_softmax": fastda.prototype_softmax,
}
ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nearest_prototype": lambda q, p: fastda.nearest_prototype(q, p)[0].squeeze(1),
    "prototype_cross_entropy": lambda q, p: fastda.prototype_cross_entropy(q, p, TARGETS[-len(q) :], reduction="none"),
    "prototypical_loss": lambda q, p: fastda.prototypical_loss(
        p, torch.arange(CLASSES), q, TARGETS[-len(q) :], num_classes=CLASSES, reduction="none"
    ),
}


def queries_and_prototypes() -> tuple[Tensor, Tensor]:
    return normal(QUERIES, 2, seed=3).float(), normal(CLASSES, 2, seed=4).float()


@pytest.mark.parametrize("op", MATRICES)
def test_matrices_of_queries_and_classes(op):
    queries, prototypes = queries_and_prototypes()
    result = MATRICES[op](queries, prototypes)
    assert result.numel() > 2**31
    torch.testing.assert_close(result[-LAST:], MATRICES[op](queries[-LAST:], prototypes), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("op", ROWS)
def test_rows_of_queries_and_classes(op):
    queries, prototypes = queries_and_prototypes()
    result, gradient = last_rows(lambda q: ROWS[op](q, prototypes), queries)
    expected, expected_gradient = last_rows(lambda q: ROWS[op](q, prototypes), queries[-LAST:])
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def labels_of(x: Tensor) -> Tensor:
    labels = torch.zeros(len(x), dtype=torch.int64)
    labels[-LAST:] = torch.tensor([2, 1, 0])
    return labels


def test_domain_adversarial_loss():
    last = normal(LAST, FEATURES)
    source = beyond(last)
    loss = fastda.domain_adversarial_loss(source, last, reduction="sum") / source.numel()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-5)
    source[-LAST:] = -1000.0  # beyond: each of them costs 1000
    larger = fastda.domain_adversarial_loss(source, last, reduction="sum") / source.numel()
    assert larger.item() - loss.item() == pytest.approx(1000 * LAST * FEATURES / source.numel(), rel=0.05)


def test_class_means():
    last = normal(LAST, FEATURES)
    support = beyond(last).requires_grad_()
    means = fastda.class_means(support, labels_of(support), 3)
    expected = torch.stack([last[2].float() / (SAMPLES - 2), last[1].float(), last[0].float()])
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=0.0)
    (gradient,) = torch.autograd.grad(means, support, torch.ones_like(means))
    assert gradient[-LAST:, 0].float().tolist() == [1.0, 1.0, pytest.approx(1 / (SAMPLES - 2), rel=2**-7)]


def covariance_of(last: Tensor) -> Tensor:
    """The covariance of all samples, of which these are the last."""
    x = last.double()
    mean = x.sum(0) / SAMPLES
    return (x.mT @ x - SAMPLES * torch.outer(mean, mean)) / (SAMPLES - 1)


def test_covariance():
    last = normal(LAST, FEATURES)
    covariance = fastda.covariance(beyond(last))
    torch.testing.assert_close(covariance.double(), covariance_of(last), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("op", ["coral_loss", "deep_coral_loss"])
def test_coral(op):
    last, target = normal(LAST, FEATURES), normal(100, FEATURES, seed=3)
    source = beyond(last)
    loss = fastda.coral_loss(source, target) if op == "coral_loss" else fastda.deep_coral_loss([source], [target])
    difference = covariance_of(last) - target.double().mT.cov()
    torch.testing.assert_close(loss.double(), difference.square().sum() / (4 * FEATURES**2), rtol=1e-5, atol=0.0)


def test_every_op_is_here():
    others = {"class_means", "covariance", "coral_loss", "deep_coral_loss", "domain_adversarial_loss"}
    assert {*REVERSALS, *MATRICES, *ROWS, *others} == set(fastda.reference.__all__)
