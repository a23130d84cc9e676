"""Every op on CUDA tensors: values, gradients, no synchronisation, the same bits, labels out of range, compilation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import BY_NAME, OPS, Draw, Sizes, each_module, each_op
from strategies import calls
from tolerance import assert_as_accurate_as_reference, map_floating, results

import fastda
import fastda.reference
from fastda import backend

LARGE = Sizes(batch=(3,), samples=131, others=97, features=130, classes=11)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def on_gpu(arguments: dict[str, object]) -> dict[str, object]:
    """The arguments on the device, with the strides that they had."""
    return {name: move(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def move(x: torch.Tensor) -> torch.Tensor:
    there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    there.untyped_storage().fill_(0)
    if 0 in x.stride():  # expanded: one element stands for many
        first = x[tuple(slice(None) if stride else slice(1) for stride in x.stride())]
        return first.cuda().expand(x.shape)
    return there.copy_(x)


def check(op, arguments):
    arguments = on_gpu(arguments)
    assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments, constant=op.constants)


@each_op
@given(data=st.data())
def test_values_and_gradients(op, data):
    check(op, data.draw(calls(op)))


@each_op
@each_dtype
def test_large(op, dtype):
    check(op, op.arguments(Draw(LARGE, dtype)))


def test_the_kernels_serve():
    x = torch.ones(2, 3, device="cuda")
    for op in backend.KERNELS["triton"]:
        assert backend.serve(op, x) == "triton"


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_half_precision_products_of_many_classes(metric):
    """Rounded as the weights of the gradients are; enough of them that the tensor cores take the features as such."""
    draw = Draw(Sizes(others=2048, features=512, classes=2048), torch.bfloat16)
    arguments = on_gpu(BY_NAME["prototype_cross_entropy"].arguments(draw, metric=metric, temperature=8.0))
    arguments["prototypes"][7] = torch.nan
    arguments["targets"][arguments["targets"] == 7] = 8
    got = results(fastda.prototype_cross_entropy, arguments)
    exact = map_floating(arguments, lambda _, x: x.double())
    for name, expected in results(fastda.reference.prototype_cross_entropy, exact).items():
        allowed = 1e-4 if name == "output 0" else 4 * torch.finfo(torch.bfloat16).eps
        assert (got[name].double() - expected).norm() <= allowed * expected.norm(), name


@pytest.mark.parametrize("k", [1, 32, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nearest_of_many_classes(dtype, k):
    """Each class stands there twice: the lower index comes first. More neighbours than a search keeps are sorted."""
    draw = Draw(Sizes(batch=(2,), others=130, features=64, classes=5000), dtype)
    arguments = on_gpu(BY_NAME["nearest_prototype"].arguments(draw, k=k))
    arguments["prototypes"][:, 7] = torch.nan
    arguments["prototypes"] = torch.cat([arguments["prototypes"]] * 2, 1)
    distances, indices = fastda.nearest_prototype(**arguments)
    expected = fastda.reference.nearest_prototype(**map_floating(arguments, lambda _, x: x.double()))
    torch.testing.assert_close(distances.double(), expected[0], rtol=1e-4, atol=1e-4)
    assert (indices == expected[1]).double().mean() > 0.99  # others are nearer to each other than float32 resolves
    assert (indices[..., 0] < 5000).all() and not (indices % 5000 == 7).any()


@each_op
def test_agrees_with_the_cpu(op):
    arguments = op.arguments(Draw(LARGE, torch.float64))
    expected = results(op.of(fastda), arguments, constant=op.constants)
    got = results(op.of(fastda), on_gpu(arguments), constant=op.constants)
    for name, result in got.items():
        assert result.device.type == "cuda"
        torch.testing.assert_close(result.cpu(), expected[name], equal_nan=True)


@each_op
def test_never_synchronises(op):
    arguments = on_gpu(op.arguments(Draw(LARGE)))
    results(op.of(fastda), arguments, constant=op.constants)  # the first call may compile
    inputs = {name: x.requires_grad_() for name, x in op.differentiable(arguments).items()}
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = op.of(fastda)(**arguments | inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.grad(outputs, list(inputs.values()), [torch.ones_like(y) for y in outputs])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_op
def test_the_same_call_gives_the_same_bits(op):
    arguments = on_gpu(op.arguments(Draw(LARGE)))
    first, second = (results(op.of(fastda), arguments, constant=op.constants) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@each_module
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_labels_out_of_range_make_their_row_nan(module, label):
    """Raising would synchronise."""
    arguments = on_gpu(BY_NAME["prototype_cross_entropy"].arguments(Draw(Sizes(batch=(2,))), reduction="none"))
    arguments["targets"][1, 2] = label
    losses = module.prototype_cross_entropy(**arguments)
    assert losses.isnan().nonzero().tolist() == [[1, 2]]
    arguments = on_gpu(BY_NAME["prototypical_loss"].arguments(Draw(Sizes(batch=(2,))), reduction="none"))
    arguments["query_labels"][0, 1] = label
    assert module.prototypical_loss(**arguments).isnan().nonzero().tolist() == [[0, 1]]
    arguments["query_labels"][0, 1], arguments["support_labels"][1, 0] = 0, label
    assert module.prototypical_loss(**arguments).isnan().all(-1).tolist() == [False, True]
    arguments = on_gpu(BY_NAME["class_means"].arguments(Draw(Sizes(batch=(2,))), empty="zero"))
    arguments["labels"][1, 0] = label
    assert module.class_means(**arguments).isnan().flatten(1).all(-1).tolist() == [False, True]


@each_op
def test_compiles_to_one_graph(op):
    torch.compiler.reset()
    arguments = on_gpu(op.arguments(Draw(Sizes(batch=(2,)))))
    got = results(torch.compile(op.of(fastda), fullgraph=True), arguments, constant=op.constants)
    for name, expected in results(op.of(fastda), arguments, constant=op.constants).items():
        torch.testing.assert_close(got[name], expected, equal_nan=True)


@pytest.mark.parametrize("op", [op for op in OPS if op.name != "deep_coral_loss"], ids=str)  # names the layer

def test_other_devices_are_named(op):
    arguments = on_gpu(op.arguments(weighted=True))
    tensors = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)][1:]
    for name in tensors:
        with pytest.raises(ValueError, match=rf"{name}: expected .*cpu"):
            op.of(fastda)(**arguments | {name: arguments[name].cpu()})
