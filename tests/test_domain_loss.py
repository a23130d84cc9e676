"""The domain-adversarial loss: closed forms, saturated logits, weights, what peers compute."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import Draw, each_module
from torch.testing import assert_close

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
logits = st.builds(
    lambda seed, *shape: Draw(dtype=torch.float64, seed=seed).normal(*shape, deviation=4.0),
    *(st.integers(0, 2**16), st.integers(1, 20), st.integers(1, 3)),
)


@each_module
def test_no_information_is_log_two(module):
    assert_close(module.domain_adversarial_loss(torch.zeros(3), torch.zeros(5, 1)), torch.tensor(2.0).log())


@each_module
@given(source=logits, target=logits)
def test_binary_cross_entropy_with_source_one_and_target_zero(module, source, target):
    cross_entropy = F.binary_cross_entropy_with_logits
    source_loss = cross_entropy(source, torch.ones_like(source), reduction="none")
    target_loss = cross_entropy(target, torch.zeros_like(target), reduction="none")
    loss = module.domain_adversarial_loss
    assert_close(loss(source, target), (source_loss.mean() + target_loss.mean()) / 2)
    assert_close(loss(source, target, reduction="sum"), source_loss.sum() + target_loss.sum())
    assert_close(loss(source, target, reduction="none"), (source_loss, target_loss))
    assert_close(loss(source, target), loss(-target, -source))


@each_module
def test_weighted_mean(module):
    source, target = torch.tensor([0.3, -2.0, 4.0]), torch.tensor([1.0, -1.0])
    repeated = module.domain_adversarial_loss(source[[0, 0, 0, 2]], target[[0, 1, 1]])
    weights = {"source_weight": torch.tensor([3.0, 0.0, 1.0]), "target_weight": torch.tensor([0.5, 1.0])}
    assert_close(module.domain_adversarial_loss(source, target, **weights), repeated)
    source_loss, target_loss = module.domain_adversarial_loss(source, target, reduction="none", **weights)
    plain = module.domain_adversarial_loss(source, target, reduction="none")
    assert_close((source_loss, target_loss), (weights["source_weight"] * plain[0], weights["target_weight"] * plain[1]))


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_saturated_logits_keep_a_gradient(module, dtype):
    """Through probabilities the gradient would be 0, and the loss Inf."""
    source = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    target = torch.tensor([1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    loss = module.domain_adversarial_loss(source, target)
    large = source[1].item()
    expected = (large / 2 + (large + torch.tensor(2.0).log().item()) / 3) / 2
    assert_close(loss.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(loss, (source, target))
    assert_close(gradients[0], torch.tensor([-0.25, 0.0], dtype=dtype))
    assert_close(gradients[1], torch.tensor([1 / 6, 0.0, 1 / 12], dtype=dtype))


@each_module
def test_no_samples(module):
    none, some = torch.empty(0), torch.zeros(3)
    assert module.domain_adversarial_loss(none, some).isnan()
    assert module.domain_adversarial_loss(some, none).isnan()
    assert_close(module.domain_adversarial_loss(none, some, reduction="sum"), 3 * torch.tensor(2.0).log())
    assert module.domain_adversarial_loss(none, some, reduction="none")[0].shape == (0,)


@pytest.mark.parametrize("shapes", [((0,), (3,)), ((2, 1), (0, 1)), ((0,), (0,)), ((0, 0), ())], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_without_samples(shapes, weighted, reduction):
    """What autograd makes of 0/0: the same with kernels as without."""
    found = []
    for module in (fastda.reference, fastda):
        inputs = [Draw(dtype=torch.float64, seed=i).normal(*shape).requires_grad_() for i, shape in enumerate(shapes)]
        weights = [x.detach().abs().requires_grad_() if weighted else None for x in inputs]
        options = {"source_weight": weights[0], "target_weight": weights[1], "reduction": reduction}
        loss = module.domain_adversarial_loss(*inputs, **options)
        inputs += weights if weighted else []
        incoming = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(loss, inputs, incoming, create_graph=True)
        second = torch.autograd.grad(sum(g.sin().sum() for g in first), [*inputs, incoming], materialize_grads=True)
        found.append([*first, *second])
    assert_close(found[1], found[0], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_lane_without_the_dispatcher_gives_what_the_op_gives(dtype, reduction):
    """Weights of one take the op."""
    inputs = [Draw(dtype=dtype, seed=i).normal(*shape).requires_grad_() for i, shape in enumerate([(7, 1), (1300,)])]
    incoming = torch.tensor(-0.7, dtype=dtype)
    found = []
    for weighted in (False, True):
        weights = {f"{name}_weight": torch.ones_like(x) for name, x in zip(("source", "target"), inputs) if weighted}
        loss = fastda.domain_adversarial_loss(*inputs, **weights, reduction=reduction)
        found.append([loss, *torch.autograd.grad(loss, inputs, incoming)])
    assert_close(*found)


@each_module
def test_gradients_of_a_graph_that_is_kept(module):
    """They are the caller's to overwrite, and come as often as the graph is there."""
    source, target = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True)
    loss = module.domain_adversarial_loss(source, target)
    first = torch.autograd.grad(loss, (source, target), retain_graph=True)
    expected = [x.clone() for x in first]
    for x in first:
        x.zero_()
    assert_close(torch.autograd.grad(loss, source, retain_graph=True)[0], expected[0])
    assert_close(torch.autograd.grad(loss, target)[0], expected[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, source)


@each_module
def test_only_the_logits_that_ask_get_a_gradient(module):
    source, target = torch.randn(5, requires_grad=True), torch.randn(3)
    loss = module.domain_adversarial_loss(source, target)
    (expected,) = torch.autograd.grad(fastda.reference.domain_adversarial_loss(source, target), source)
    loss.backward()
    assert_close(source.grad, expected)
    assert target.grad is None
    assert not module.domain_adversarial_loss(source.detach(), target).requires_grad


@each_module
def test_gradients_for_many_incoming_ones_at_once(module):
    source, target, incoming = torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True), torch.randn(4)
    loss = module.domain_adversarial_loss(source, target)
    (one,) = torch.autograd.grad(loss, source, retain_graph=True)
    (batched,) = torch.autograd.grad(loss, source, incoming, is_grads_batched=True)
    assert_close(batched, incoming.unsqueeze(1) * one)
