"""The CUDA kernels of gradient reversal and the domain-adversarial loss: dtypes, lists, alignment, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from ops_under_test import Draw
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

import fastda
from fastda import backend
from fastda.kernels import cpp

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Beyond one block, at its end and around it, in 16-byte accesses and beside them.
SHAPES = ((0,), (1,), (7, 3), (4096,), (4097,), (8192 * 3 + 5,), (513, 1025))


@pytest.fixture(autouse=True)
def built():
    if "cuda" not in cpp.devices:
        pytest.fail(f"the compiled core has no kernels for CUDA: {cpp.status.stamp or cpp.status.reason}")


def normal(*shape, dtype=torch.float32, seed=0):
    return Draw(dtype=dtype, seed=seed).normal(*shape).cuda()


def fork_backward(grads, reversed_grads, lambd):
    return torch.ops.fastda.gradient_reversal_fork_backward(grads, reversed_grads, lambd)


def assert_difference(got, g1, g2, lambd):
    """One rounding of the exact difference in the dtype of g₁, or of float32."""
    truth = g1.double() - lambd.double() * g2.double()
    eps = max(torch.finfo(g1.dtype).eps, torch.finfo(torch.float32).eps)
    if g1.dtype == g2.dtype == torch.float64:
        eps = torch.finfo(torch.float64).eps
    assert got.dtype == g1.dtype and got.shape == g1.shape
    assert ((got.double() - truth).abs() <= eps * (g1.double().abs() + g2.double().abs())).all()


def test_the_kernels_serve():
    x = torch.ones(2, 3, device="cuda")
    assert {op: backend.serve(op, x) for op in backend.ADVERSARIAL} == dict.fromkeys(backend.ADVERSARIAL, "cuda")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", FLOATS, ids=str)
def test_fork_backward_of_lists(dtype, other):
    grads = [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    reversed_grads = [normal(*shape, dtype=other, seed=99 + i) for i, shape in enumerate(SHAPES)]
    for lambd in (torch.tensor(0.3), torch.tensor([0.7], dtype=torch.float64), torch.tensor(0.5, dtype=torch.bfloat16)):
        got = fork_backward(grads, reversed_grads, lambd.cuda())
        for result, g1, g2 in zip(got, grads, reversed_grads):
            assert_difference(result, g1, g2, lambd.cuda())


def test_more_tensors_than_one_launch_takes():
    grads, reversed_grads = ([normal(i % 50, 3, seed=1000 * k + i) for i in range(150)] for k in range(2))
    lambd = torch.tensor(0.3, device="cuda")
    for result, g1, g2 in zip(fork_backward(grads, reversed_grads, lambd), grads, reversed_grads):
        assert_difference(result, g1, g2, lambd)


def test_layouts_and_alignment():
    lambd = torch.tensor(0.3, device="cuda")
    x, y = normal(64, 130), normal(64, 130, seed=1)
    for g1, g2 in (
        (x.mT, y.mT),
        (x.mT, y.mT.contiguous()),
        (x[:, 1::2], y[:, 1::2]),
        (x[:1].expand(64, 130), y),
        (x.flatten()[1:], y.flatten()[1:]),  # not on a boundary of 16 bytes
        (x.flatten()[1:], y.flatten()[1:].clone()),
    ):
        assert_difference(fork_backward([g1], [g2], lambd)[0], g1, g2, lambd)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    count = 2**31 + 4097
    g1, g2 = (torch.full((count,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 2.0))
    (got,) = fork_backward([g1], [g2], torch.tensor(0.5, device="cuda"))
    assert not got.any()


def gradients(lambd, x, g1, g2):
    return torch.autograd.grad(fastda.gradient_reversal_fork(x, lambd), x, (g1, g2))[0]


def test_lambda_on_the_device_is_read_when_forward_ran_and_never_by_the_host():
    x, g1, g2 = (normal(33, 65, seed=i) for i in range(3))
    x.requires_grad_()
    lambd = torch.tensor(0.25, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = fastda.gradient_reversal_fork(x, lambd)
        lambd.fill_(100.0)
        (got,) = torch.autograd.grad(outputs, x, (g1, g2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(got, g1 - 0.25 * g2)


def test_the_current_stream_is_used():
    g1, g2 = (normal(1024, 1024, seed=i) for i in range(2))
    lambd = torch.tensor(0.3, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        scaled = 2 * g1
        got = fork_backward([scaled], [g2], lambd)[0]
        loss = fastda.domain_adversarial_loss(scaled[0], g2[0])
    stream.synchronize()
    assert_close(got, 2 * g1 - 0.3 * g2)
    assert_close(loss, fastda.reference.domain_adversarial_loss(2 * g1[0], g2[0]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_the_device_of_the_tensors_is_used():
    there = torch.device("cuda:1")
    x, g1, g2 = (normal(33, 65, seed=i).to(there) for i in range(3))
    lambd = torch.tensor(0.3, device=there)
    assert_close(fork_backward([g1], [g2], lambd)[0], g1 - 0.3 * g2)
    assert fastda.domain_adversarial_loss(x[0], g1[0]).device == there


def test_a_step_is_captured_in_a_graph_and_follows_lambda():
    reversal = fastda.nn.GradientReversal(by_step=fastda.schedules.warm_start_lambda).cuda()
    x, weight = normal(64, 32).requires_grad_(), normal(1, 32, seed=1)

    def step():
        logits = torch.nn.functional.linear(reversal(x), weight)
        return torch.autograd.grad(fastda.domain_adversarial_loss(logits[:32], logits[32:]), x)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        reversal.step()
        graph.replay()
        assert_close(captured, step())
        assert captured.any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(0, 3), (1, 1), (5, 31), (511, 8193), (100_000, 70_001), (3_000_000, 10)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_domain_loss_agrees_with_the_reference(dtype, sizes, weighted, reduction):
    arguments = [normal(n, 1, dtype=dtype, seed=i) * 4 for i, n in enumerate(sizes)]
    arguments += [x.abs() + 0.5 for x in arguments] if weighted else []
    found = []
    for module, exact in ((fastda, False), (fastda.reference, True)):
        inputs = [(x.double() if exact else x).detach().requires_grad_() for x in arguments]
        names = ("source_logits", "target_logits", "source_weight", "target_weight")
        loss = module.domain_adversarial_loss(**dict(zip(names, inputs)), reduction=reduction)
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    (loss, *got), (truth, *expected) = found
    assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6, equal_nan=True)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        largest = e.abs().nan_to_num().max().item() if e.numel() else 0.0
        assert_close(g.double(), e, rtol=0.01 if dtype.itemsize == 2 else 1e-4, atol=1e-5 * largest, equal_nan=True)


def test_domain_loss_gives_the_same_bits():
    source, target = normal(1_000_003), normal(999_999, seed=1)
    losses = [fastda.domain_adversarial_loss(source, target) for _ in range(5)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_domain_loss_under_vmap_is_one_launch_for_all_episodes():
    source, target = normal(6, 40_000), normal(6, 17, seed=1)
    got = torch.func.vmap(torch.func.grad(fastda.domain_adversarial_loss))(source, target)
    each = [torch.func.grad(fastda.reference.domain_adversarial_loss)(s, t) for s, t in zip(source, target)]
    assert_close(got, torch.stack(each))


def test_lists_through_the_public_op():
    layers = [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]
    lambd = torch.tensor(0.3, device="cuda")
    incoming = [[normal(*shape, seed=50 * k + i) for i, shape in enumerate(SHAPES)] for k in (1, 2)]
    first, second = fastda.gradient_reversal_fork(layers, lambd)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        got = torch.autograd.grad([*first, *second], layers, incoming[0] + incoming[1])
        torch.cuda.synchronize()
    launches = [event for event in profiler.events() if "fork_backward_kernel" in event.name]
    assert len(launches) == 1
    for result, g1, g2 in zip(got, *incoming):
        assert_difference(result, g1, g2, lambd)
    on_cpu = tree_map_only(torch.Tensor, lambda x: x.detach().cpu().requires_grad_(), layers)
    first, second = fastda.gradient_reversal_fork(on_cpu, lambd.cpu())
    expected = torch.autograd.grad([*first, *second], on_cpu, [g.cpu() for g in incoming[0] + incoming[1]])
    assert_close([g.cpu() for g in got], list(expected))
