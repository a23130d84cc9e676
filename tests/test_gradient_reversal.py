"""Gradient reversal, alone, as a fork and with a linear layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_under_test import BY_NAME, OPS, Draw, Sizes, each_module
from tolerance import assert_as_accurate_as_reference, random_like
from torch.testing import assert_close

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
LAMBDAS = (1.0, 0.3, 2, 0.0, -1.0, torch.tensor(0.4), torch.tensor([0.7], dtype=torch.float64))
each_lambda = pytest.mark.parametrize("lambd", LAMBDAS, ids=repr)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
each_reversal = pytest.mark.parametrize("op", [op for op in OPS if op.reversal], ids=str)


def drawn(dtype=torch.float64):
    """Features, weight, bias, and incoming gradients for the features and for the hidden layer."""
    draw = Draw(Sizes(), dtype)
    x, weight, bias = (draw.normal(*shape).requires_grad_() for shape in ((6, 4), (3, 4), (3,)))
    return x, weight, bias, draw.normal(6, 4), draw.normal(6, 4), draw.normal(6, 3)


@each_module
@each_lambda
@each_dtype
def test_closed_forms(module, lambd, dtype):
    x, weight, bias, g1, g2, gh = drawn(dtype)
    factor = float(lambd)
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 0.02, "atol": 0.02}
    y = module.gradient_reversal(x, lambd)
    assert y.dtype == dtype and torch.equal(y, x)
    assert_close(torch.autograd.grad(y, x, g1)[0], (-factor * g1.double()).to(dtype))
    first, second = module.gradient_reversal_fork(x, lambd)
    assert torch.equal(first, x) and torch.equal(second, x)
    exact = (g1.double() - factor * g2.double()).to(dtype)
    assert_close(torch.autograd.grad((first, second), x, (g1, g2))[0], exact, **tolerance)
    first, hidden = module.gradient_reversal_linear(x, weight, bias, lambd)
    assert torch.equal(first, x) and hidden.dtype == dtype
    assert_close(hidden, F.linear(x, weight, bias))
    gradients = torch.autograd.grad((first, hidden), (x, weight, bias), (g1, gh))
    exact = g1.double() - factor * gh.double() @ weight.double()
    assert_close(gradients[0], exact.to(dtype), **tolerance)
    assert_close(gradients[1], (gh.double().mT @ x.double()).to(dtype), **tolerance)
    assert_close(gradients[2], gh.double().sum(0).to(dtype), **tolerance)


@each_module
def test_one_head_alone(module):
    """The gradient of the other is zero, whether it is used or not."""
    x, weight, _, g1, g2, gh = drawn()
    first, second = module.gradient_reversal_fork(x, 0.5)
    assert_close(torch.autograd.grad(first, x, g1, retain_graph=True)[0], g1)
    assert_close(torch.autograd.grad(second, x, g2)[0], -0.5 * g2)
    first, hidden = module.gradient_reversal_linear(x, weight, lambd=0.5)
    assert_close(torch.autograd.grad(first, x, g1, retain_graph=True)[0], g1)
    assert_close(torch.autograd.grad(hidden, x, gh)[0], -0.5 * gh @ weight)


@each_module
@each_reversal
@pytest.mark.parametrize("lambd", [-1.0, torch.tensor(-1.0)], ids=repr)
def test_gradcheck_where_the_reversal_is_the_identity(module, op, lambd):
    arguments = op.arguments(Draw(dtype=torch.float64), lambd=lambd)
    inputs = {name: x.requires_grad_() for name, x in op.differentiable(arguments).items()}

    def function(*tensors):
        return op.of(module)(**{**arguments, **dict(zip(inputs, tensors))})

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


@each_module
@each_lambda
def test_gradgradcheck_of_the_bare_op(module, lambd):
    """The gradient is linear in the incoming one, so its own derivative is true for each λ."""
    x, *_ = drawn()
    assert torch.autograd.gradgradcheck(lambda x: module.gradient_reversal(x, lambd), (x,))
    assert torch.autograd.gradgradcheck(lambda x: module.gradient_reversal_fork(x, lambd), (x,))


COMPOSITES = {
    "gradient_reversal": lambda op, **a: op(**a) ** 3,
    "gradient_reversal_fork": lambda op, **a: torch.mul(*(y**2 for y in op(**a))),
    "gradient_reversal_linear": lambda op, **a: op(**a)[0].pow(2).sum(-1) * op(**a)[1].pow(3).sum(-1),
}


@each_reversal
@each_lambda
def test_composites_agree_with_the_reference_in_first_and_second_order(op, lambd):
    arguments = op.arguments(Draw(dtype=torch.float64), lambd=lambd)
    found = []
    for module in (fastda.reference, fastda):
        leaves = {name: x.detach().requires_grad_() for name, x in op.differentiable(arguments).items()}
        y = COMPOSITES[op.name](getattr(module, op.name), **arguments | leaves)
        first = torch.autograd.grad(y, list(leaves.values()), random_like(y.detach(), 1), create_graph=True)
        total = sum((g.sin() * random_like(g.detach(), i)).sum() for i, g in enumerate(first))
        found.append([*first, *torch.autograd.grad(total, list(leaves.values()))])
    for got, expected in zip(found[1], found[0]):
        assert_close(got, expected)


@each_module
def test_cube_in_closed_form(module):
    """d/dx y³ := −λ·3x², and once more: −λ·6x times the −λ of the way back."""
    x = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad((module.gradient_reversal(x, 0.5) ** 3).sum(), x, create_graph=True)
    assert_close(first, -0.5 * 3 * x**2)
    assert_close(torch.autograd.grad(first.sum(), x)[0], 0.25 * 6 * x)


@each_module
@each_reversal
def test_lambda_is_the_value_that_stood_at_forward(module, op):
    arguments = op.arguments(Draw(dtype=torch.float64))
    x = arguments["x"].requires_grad_()
    schedule = torch.tensor(0.25, dtype=torch.float64)
    outputs = op.of(module)(**arguments | {"lambd": schedule})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [random_like(y.detach(), i) for i, y in enumerate(outputs)]
    schedule.fill_(100.0)
    (got,) = torch.autograd.grad(outputs, x, incoming)
    again = op.of(module)(**arguments | {"lambd": 0.25})
    assert_close(got, torch.autograd.grad(again, x, incoming if len(outputs) > 1 else incoming[0])[0])


@each_module
@each_reversal
def test_no_gradient_flows_to_lambda(module, op):
    lambd = torch.tensor(0.5, requires_grad=True)
    x = torch.ones(2, 4, requires_grad=True)
    outputs = op.of(module)(**op.arguments() | {"x": x, "lambd": lambd})
    total = sum(y.sum() for y in outputs) if isinstance(outputs, tuple) else outputs.sum()
    assert torch.autograd.grad(total, (x, lambd), allow_unused=True)[1] is None


@each_module
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_lambda_zero_multiplies_by_zero(module, bad):
    incoming = torch.tensor([bad, 1.0])
    x = torch.ones(2, requires_grad=True)
    for lambd in (0.0, torch.tensor(0.0)):
        (gradient,) = torch.autograd.grad(module.gradient_reversal(x, lambd), x, incoming)
        assert gradient.isnan().tolist() == [True, False] and gradient[1] == 0
        (gradient,) = torch.autograd.grad(module.gradient_reversal_fork(x, lambd), x, (torch.ones(2), incoming))
        assert gradient.isnan().tolist() == [True, False] and gradient[1] == 1


@each_module
@each_reversal
def test_in_place_on_outputs(module, op):
    """In grad mode PyTorch's error; outside of it the outputs alias the input, as those of torch.nn.Identity do."""
    arguments = op.arguments()
    x = arguments["x"].requires_grad_()
    views = 1 if op.name == "gradient_reversal_linear" else None  # the hidden layer is no view
    outputs = op.of(module)(**arguments)
    for output in (outputs if isinstance(outputs, tuple) else (outputs,))[:views]:
        with pytest.raises(RuntimeError, match="in-?place"):
            output.mul_(2)
    with torch.no_grad():
        outputs = op.of(module)(**arguments)
        for output in (outputs if isinstance(outputs, tuple) else (outputs,))[:views]:
            assert output.data_ptr() == x.data_ptr()
            output.fill_(3.0)
            assert (x == 3).all()


@each_module
@each_reversal
def test_forward_mode_raises_by_name(module, op):
    arguments = op.arguments()

    def function(x):
        return op.of(module)(**arguments | {"x": x})

    with pytest.raises(RuntimeError, match=f"{op.name}: has no forward-mode derivative"):
        torch.func.jvp(function, (arguments["x"],), (torch.ones_like(arguments["x"]),))
    with pytest.raises(RuntimeError, match=f"{op.name}: has no forward-mode derivative"):
        torch.func.jacfwd(function)(arguments["x"])


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 3, 4, 5)], ids=str)
def test_any_shape(shape):
    for name in ("gradient_reversal", "gradient_reversal_fork"):
        arguments = {"x": Draw().normal(*shape), "lambd": 0.3}
        op = BY_NAME[name]
        assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments, constant=("lambd",))
    if shape:
        arguments = {"x": Draw().normal(*shape), "weight": Draw().normal(2, shape[-1]), "bias": None, "lambd": 0.3}
        op = BY_NAME["gradient_reversal_linear"]
        assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments, constant=("lambd",))


@each_module
def test_a_tensor_used_by_several_reversals(module):
    x = torch.ones(3, requires_grad=True)
    total = module.gradient_reversal(x, 0.5) + module.gradient_reversal(module.gradient_reversal(x, 2.0), 3.0)
    assert_close(torch.autograd.grad(total.sum(), x)[0], torch.full((3,), -0.5 + 6.0))
