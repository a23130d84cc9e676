"""Losses whose eager calls go past the dispatcher, with a node of their own: they behave as any op of PyTorch does."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastda

QUERIES, CLASSES = 30, 4


def episode(module):
    support_labels, query_labels = torch.arange(12) % CLASSES, torch.arange(QUERIES) % CLASSES
    points = torch.randn(12, 8, requires_grad=True), torch.randn(QUERIES, 8, requires_grad=True)
    return (
        lambda support, queries: module.prototypical_loss(support, support_labels, queries, query_labels, CLASSES),
        points,
    )


def domains(module):
    return module.domain_adversarial_loss, (torch.randn(5, requires_grad=True), torch.randn(3, requires_grad=True))


each_loss = pytest.mark.parametrize("make", [episode, domains])
each_module = pytest.mark.parametrize("module", [fastda, fastda.reference], ids=["fastda", "reference"])


@each_loss
@each_module
def test_gradients_of_a_graph_that_is_kept(module, make):
    """They are the caller's to overwrite, and come as often as the graph is there."""
    loss_of, leaves = make(module)
    loss = loss_of(*leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for x in first:
        x.zero_()
    again = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    assert_close(again, [2 * x for x in kept])
    assert_close(torch.autograd.grad(loss, leaves[1])[0], kept[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@each_loss
@each_module
def test_second_derivatives(module, make):
    loss_of, leaves = make(module)
    leaves = [x.detach().double().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(loss_of, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss_of, leaves, fast_mode=True)


@each_loss
@each_module
def test_only_what_asks_gets_a_gradient(module, make):
    loss_of, leaves = make(module)
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    for i in range(2):
        some = [x if k == i else x.detach() for k, x in enumerate(leaves)]
        assert_close(torch.autograd.grad(loss_of(*some), some[i])[0], expected[i])
    assert not loss_of(*(x.detach() for x in leaves)).requires_grad
    with torch.no_grad():
        assert not loss_of(*leaves).requires_grad


@each_loss
@each_module
def test_gradients_for_many_incoming_ones_at_once(module, make):
    loss_of, leaves = make(module)
    loss, incoming = loss_of(*leaves), torch.randn(3)
    one = torch.autograd.grad(loss, leaves, retain_graph=True)
    batched = torch.autograd.grad(loss, leaves, incoming, is_grads_batched=True)
    for got, single in zip(batched, one, strict=True):
        assert_close(got, torch.stack([value * single for value in incoming]))


@each_loss
@pytest.mark.compiled_core
def test_what_was_overwritten_gives_no_gradient(make):
    loss_of, leaves = make(fastda)
    changed = leaves[0].clone()
    loss = loss_of(changed, leaves[1])
    changed.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.compiled_core
def test_overwritten_labels_give_no_gradient():
    queries, labels = torch.randn(6, 8, requires_grad=True), torch.arange(6) % CLASSES
    loss = fastda.prototypical_loss(torch.randn(4, 8), torch.arange(4), queries, labels, CLASSES)
    labels.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_loss
@each_module
def test_hooks_get_all_that_is_kept(module, make):
    """Else checkpoints and offloaded tensors would leave an episode's distances in memory."""
    loss_of, leaves = make(module)
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    packed = []

    def pack(x):
        packed.append(x.numel())
        return x.clone()

    with saved_tensors_hooks(pack, lambda x: x):
        loss = loss_of(*leaves)
    if make is episode and module is fastda:
        assert max(packed) >= QUERIES * CLASSES and len(packed) > 4
    assert_close(torch.autograd.grad(loss, leaves), expected)
    loss = checkpoint(loss_of, *leaves, use_reentrant=False)
    assert_close(torch.autograd.grad(loss, leaves), expected)


@each_loss
@each_module
def test_a_hook_may_give_back_a_view_that_negates(module, make):
    loss_of, leaves = make(module)
    expected = torch.autograd.grad(loss_of(*leaves), leaves)
    with saved_tensors_hooks(lambda x: x, lambda x: torch._neg_view(x.neg()) if x.is_floating_point() else x):
        loss = loss_of(*leaves)
        assert_close(torch.autograd.grad(loss, leaves), expected)


@each_loss
@each_module
def test_inference_mode(module, make):
    loss_of, leaves = make(module)
    expected = loss_of(*leaves).detach()
    with torch.inference_mode():
        made_here = [x.clone() for x in leaves]
        assert_close(loss_of(*made_here), expected)
        assert loss_of(*made_here).is_inference()
        with torch.enable_grad():  # autograd stays out
            assert not loss_of(*leaves).requires_grad
            assert_close(loss_of(*leaves), expected)
    loss = loss_of(made_here[0], leaves[1])
    assert_close(torch.autograd.grad(loss, leaves[1]), torch.autograd.grad(loss_of(*leaves), leaves[1]))


@each_loss
@pytest.mark.compiled_core
def test_the_profiler_sees_op_and_shapes(make):
    loss_of, leaves = make(fastda)
    with torch.profiler.profile(record_shapes=True) as profile:
        loss_of(*leaves).backward()
    name = "fastda::prototypical_loss" if make is episode else "fastda::domain_adversarial_loss"
    (forward,) = (event for event in profile.events() if event.name == name)
    assert forward.input_shapes[:2] == [list(x.shape) for x in leaves]
    (backward,) = (event for event in profile.events() if event.name == f"{name}Backward")
    assert forward.sequence_nr == backward.sequence_nr >= 0
