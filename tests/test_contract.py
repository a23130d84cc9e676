"""What every op owes its caller: the matrix of ops and rows of the contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from ops_under_test import BOTH, OPS, Draw, Op, Sizes, each_module, each_op, each_plain_op
from strategies import LAYOUTS, calls, describe, lay_out
from tolerance import (
    as_tuple,
    assert_as_accurate_as_reference,
    assert_same_bits,
    is_floating,
    map_floating,
    random_like,
    results,
)

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def check(op: Op, arguments: dict[str, object]) -> None:
    assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments, constant=op.constants)


@each_op
@given(data=st.data())
def test_values_and_gradients_over_sizes_dtypes_and_layouts(op, data):
    arguments = data.draw(calls(op))
    note(describe(arguments))
    check(op, arguments)


@each_op
def test_large_inputs_on_several_threads(op):
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        check(op, op.arguments(Draw(Sizes(batch=(5,), samples=131, others=97, features=130, classes=11))))
        check(op, op.arguments(Draw(Sizes(samples=40, others=50, features=1500, classes=20))))
    finally:
        torch.set_num_threads(threads)


@each_op
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(op, layout):
    draw = Draw(Sizes(batch=(2,), samples=17, others=15, features=33))
    check(op, map_floating(op.arguments(draw), lambda name, x: x if name in op.constants else lay_out(x, layout)))


@each_op
@pytest.mark.parametrize("empty", ["batch", "samples", "others", "features"])
def test_zero_size(op, empty):
    sizes = Sizes(**{"batch": (2,), empty: (0,) if empty == "batch" else 0})
    check(op, op.arguments(Draw(sizes)))


@each_op
def test_far_from_zero(op):
    """Features a thousand deviations from zero, where products without centring cancel."""
    arguments = op.arguments(Draw(Sizes(samples=40, others=30, features=8)))
    check(op, map_floating(arguments, lambda name, x: x if name in op.constants else x + 1000))


@each_op
@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_result_and_gradient_dtypes(op, module, dtype):
    arguments = op.arguments(Draw(dtype=dtype))
    for name, result in results(op.of(module), arguments, constant=op.constants).items():
        if name.startswith("gradient"):
            assert result.dtype == arguments[name.removeprefix("gradient of ")].dtype, name
        else:
            assert result.dtype == (dtype if op.reversal or dtype == torch.float64 else torch.float32), name


@each_plain_op
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float16), (torch.float32, torch.float64), (torch.float16, torch.float32)], ids=str
)
def test_mixed_dtypes_promote(op, dtypes):
    """But for the reversals: the linear one asks for one dtype, as torch.nn.functional.linear does."""
    arguments = op.arguments()
    names = iter(op.differentiable(arguments))
    first = next(names)
    arguments = map_floating(arguments, lambda name, x: x.to(dtypes[0] if name == first else dtypes[1]))
    check(op, arguments)


@each_op
@each_module
def test_only_the_inputs_that_ask_get_gradients(op, module):
    arguments = op.arguments()
    inputs = op.differentiable(arguments)
    everything = results(op.of(module), arguments, constant=op.constants)
    for asking in inputs:
        others = tuple(name for name in inputs if name != asking) + op.constants
        alone = results(op.of(module), arguments, constant=others)
        name = f"gradient of {asking}"
        assert {key for key in alone if key.startswith("gradient")} == {name}
        torch.testing.assert_close(alone[name], everything[name])
    with torch.no_grad():
        assert not any(y.requires_grad for y in as_tuple(op.of(module)(**arguments)))
    assert not any(y.requires_grad for y in as_tuple(op.of(module)(**arguments)))


@each_op
@each_module
def test_inputs_and_incoming_gradients_are_never_written_to(op, module):
    arguments = op.arguments(Draw(Sizes(batch=(2,), features=16)))
    arguments = map_floating(arguments, lambda name, x: x.requires_grad_(name not in op.constants))
    tensors = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    outputs = as_tuple(op.of(module)(**arguments))
    tensors |= {f"incoming gradient {i}": random_like(y.detach(), i) for i, y in enumerate(outputs)}
    before = {name: (x.detach().clone(), x._version) for name, x in tensors.items()}
    incoming = [x for name, x in tensors.items() if name.startswith("incoming")]
    torch.autograd.grad(outputs, list(op.differentiable(arguments).values()), incoming)
    for name, x in tensors.items():
        assert torch.equal(x, before[name][0]), f"{name} was overwritten"
        assert x._version == before[name][1], f"{name} was written to"


@each_op
@each_module
def test_the_same_call_gives_the_same_bits(op, module):
    arguments = op.arguments(Draw(Sizes(batch=(3,), samples=65, others=63, features=130, classes=5)))
    first, second = (results(op.of(module), arguments, constant=op.constants) for _ in range(2))
    assert_same_bits(first, second)


@each_plain_op
@each_module
def test_outputs_are_fresh_and_contiguous(op, module):
    arguments = map_floating(op.arguments(Draw(Sizes(batch=(2,)))), lambda name, x: lay_out(x, "transposed"))
    storages = {x.untyped_storage().data_ptr() for x in arguments.values() if isinstance(x, torch.Tensor)}
    for output in as_tuple(op.of(module)(**arguments)):
        assert output.is_contiguous()
        assert output.untyped_storage().data_ptr() not in storages


@each_op
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_nan_and_inf_propagate_as_in_the_reference(op, bad, place):
    """One bad element in one batch element: values, and gradients with respect to everything."""
    arguments = op.arguments(Draw(Sizes(batch=(2,), features=16)))
    names = list(op.differentiable(arguments))
    arguments[names[place % len(names)]].view(-1)[3] = bad
    check(op, arguments)


@pytest.mark.parametrize("op", [op for op in OPS if op.name != "deep_coral_loss"], ids=str)  # a scalar
@each_module
def test_a_batch_is_the_stack_of_its_elements(op, module):
    options = {"reduction": "none"} if "reduction" in op.options else {}
    arguments = op.arguments(Draw(Sizes(batch=(2, 3))), **options)
    whole = as_tuple(op.of(module)(**arguments))
    batched = [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and x.shape[:2] == (2, 3)]
    for i in range(2):
        for j in range(3):
            element = {name: x[i, j] if name in batched else x for name, x in arguments.items()}
            for got, expected in zip(whole, as_tuple(op.of(module)(**element))):
                torch.testing.assert_close(got[i, j], expected, equal_nan=True)


@each_plain_op
@each_module
def test_first_and_second_derivatives_are_those_of_the_value(op, module):
    """gradcheck and gradgradcheck, for each value of each option. The reversals: see test_gradient_reversal.py."""
    sizes = Sizes(batch=(2,), samples=5, others=4, features=3)
    for name, values in {"": (None,), **op.options}.items():
        for value in values[1 if name else 0 :]:
            arguments = op.arguments(Draw(sizes, torch.float64), **({name: value} if name else {}))
            arguments = map_floating(arguments, lambda _, x: x.double().requires_grad_())
            inputs = op.differentiable(arguments)

            def function(*tensors, arguments=arguments, inputs=inputs):
                return op.of(module)(**{**arguments, **dict(zip(inputs, tensors))})

            assert torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)
            assert torch.autograd.gradgradcheck(function, tuple(inputs.values()), fast_mode=True)


@each_op
@given(data=st.data())
def test_second_derivatives_agree_with_the_reference(op, data):
    """Double backward over sizes and layouts, in float64, through a function of the first gradient."""
    arguments = data.draw(calls(op, dtypes=(torch.float64,)))
    note(describe(arguments))
    found = []
    for module in BOTH:
        leaves = map_floating(arguments, lambda name, x: x.detach().requires_grad_(name not in op.constants))
        inputs = list(op.differentiable(leaves).values())
        outputs = as_tuple(op.of(module)(**leaves))
        incoming = [random_like(y.detach(), i).requires_grad_() for i, y in enumerate(outputs)]
        first = torch.autograd.grad(outputs, inputs, incoming, create_graph=True, materialize_grads=True)
        total = sum((g.sin() * random_like(g.detach(), i)).sum() for i, g in enumerate(first))
        wanted = [x for x in (*inputs, *incoming) if is_floating(x)]
        found.append(torch.autograd.grad(total, wanted, materialize_grads=True))
    for got, expected in zip(found[1], found[0]):
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-8, atol=1e-8)
