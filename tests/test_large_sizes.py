"""Tensors of more than 2³¹ elements: what lies beyond is read, and written, where it belongs.

In bfloat16, so that features and their gradient take 4 GiB each. All samples but the last three are zero, so the
results of those three are known from three samples alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastda

FEATURES, LAST = 64, 3
SAMPLES = 2**31 // FEATURES + LAST
NEEDED = 16 * 2**30  # bytes


def free_memory() -> int:
    with open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


no_memory = not os.path.exists("/proc/meminfo") or free_memory() < NEEDED
pytestmark = [
    pytest.mark.slow,
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


def labels_of(x: Tensor) -> Tensor:
    labels = torch.zeros(len(x), dtype=torch.int64)
    labels[-LAST:] = torch.tensor([2, 1, 0])
    return labels


PROTOTYPES = normal(4, FEATURES, seed=1)
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient_reversal": lambda x: fastda.gradient_reversal(x, 0.5),
    "gradient_reversal_fork": lambda x: fastda.gradient_reversal_fork(x, 0.5)[1],
    "gradient_reversal_linear": lambda x: fastda.gradient_reversal_linear(x, PROTOTYPES, None, 0.5)[1],
    "domain_adversarial_loss": lambda x: fastda.domain_adversarial_loss(x, PROTOTYPES, reduction="none")[0],
    "pairwise_distance": lambda x: fastda.pairwise_distance(x, PROTOTYPES),
    "nearest_prototype": lambda x: fastda.nearest_prototype(x, PROTOTYPES)[0],
    "prototype_log_softmax": lambda x: fastda.prototype_log_softmax(x, PROTOTYPES),
    "prototype_softmax": lambda x: fastda.prototype_softmax(x, PROTOTYPES),
    "prototype_cross_entropy": lambda x: fastda.prototype_cross_entropy(x, PROTOTYPES, labels_of(x), reduction="none"),
    "prototypical_loss": lambda x: fastda.prototypical_loss(
        PROTOTYPES, torch.arange(4), x, labels_of(x), num_classes=4, reduction="none"
    ),
}


@pytest.mark.parametrize("op", ROWS)
def test_samples_beyond(op):
    last = normal(LAST, FEATURES)
    result, gradient = last_rows(ROWS[op], beyond(last))
    expected, expected_gradient = last_rows(ROWS[op], last)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2**-7, atol=1e-6)


def test_domain_adversarial_loss_over_all():
    source = beyond(normal(LAST, FEATURES)).requires_grad_()
    loss = fastda.domain_adversarial_loss(source, source[:1].detach())
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, source)
    expected = -torch.sigmoid(-source[-LAST:].detach().float()) / (2 * source.numel())
    torch.testing.assert_close(gradient[-LAST:].float(), expected, rtol=2**-7, atol=0.0)


def test_class_means():
    last = normal(LAST, FEATURES)
    support = beyond(last).requires_grad_()
    means = fastda.class_means(support, labels_of(support), 3)
    expected = torch.stack([last[2].float() / (SAMPLES - 2), last[1].float(), last[0].float()])
    torch.testing.assert_close(means, expected, rtol=1e-5, atol=0.0)
    (gradient,) = torch.autograd.grad(means, support, torch.ones_like(means))
    assert gradient[-LAST:, 0].float().tolist() == [1.0, 1.0, pytest.approx(1 / (SAMPLES - 2), rel=2**-7)]


def moments(last: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all samples, of which these are the last."""
    x = last.double()
    mean = x.sum(0) / SAMPLES
    return mean, (x.mT @ x - SAMPLES * torch.outer(mean, mean)) / (SAMPLES - 1)


def test_covariance():
    last = normal(LAST, FEATURES)
    x = beyond(last).requires_grad_()
    mean, expected = moments(last)
    covariance = fastda.covariance(x)
    torch.testing.assert_close(covariance.double(), expected, rtol=1e-4, atol=1e-12)
    incoming = normal(FEATURES, FEATURES, seed=2).float()
    (gradient,) = torch.autograd.grad(covariance, x, incoming)
    slopes = (last.double() - mean) @ (incoming + incoming.mT).double() / (SAMPLES - 1)
    torch.testing.assert_close(gradient[-LAST:].double(), slopes, rtol=2**-6, atol=1e-10)


@pytest.mark.parametrize("op", ["coral_loss", "deep_coral_loss"])
def test_coral(op):
    last, target = normal(LAST, FEATURES), normal(100, FEATURES, seed=3)
    source = beyond(last)
    if op == "coral_loss":  # the layers of the other are laid side by side: with a gradient that takes 17 GiB
        source.requires_grad_()
        loss = fastda.coral_loss(source, target)
    else:
        loss = fastda.deep_coral_loss([source], [target])
    mean, covariance = moments(last)
    difference = covariance - target.double().mT.cov()
    torch.testing.assert_close(loss.double(), difference.square().sum() / (4 * FEATURES**2), rtol=1e-5, atol=0.0)
    if source.requires_grad:
        (gradient,) = torch.autograd.grad(loss, source)
        slopes = (last.double() - mean) @ difference * 4 / (4 * FEATURES**2) / (SAMPLES - 1)
        torch.testing.assert_close(gradient[-LAST:].double(), slopes, rtol=2**-6, atol=1e-14)


def test_every_op_is_here():
    import fastda.reference

    assert {*ROWS, "class_means", "covariance", "coral_loss", "deep_coral_loss"} == set(fastda.reference.__all__)
