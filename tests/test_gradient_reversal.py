"""Gradient reversal, alone, as a fork and with a linear layer."""

from __future__ import annotations

from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from ops_under_test import BY_NAME, OPS, Draw, Sizes, each_module
from tolerance import as_tuple, assert_as_accurate_as_reference, is_floating, random_like
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import fastda
import fastda.reference
from fastda.benchmarks.memory import silent_profiler

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


# The lanes: plain eager mode in C++, torch.func, torch.compile


def eager_gradients(function, x):
    (first,) = torch.autograd.grad(function(x), x, create_graph=True)
    return first.detach(), torch.autograd.grad((first**2).sum(), x)[0]


def func_gradients(function, x):
    first = torch.func.grad(function)
    return first(x), torch.func.grad(lambda x: (first(x) ** 2).sum())(x)


def compiled_gradients(function, x):
    torch.compiler.reset()
    plain = torch.compile(function, fullgraph=True, backend="aot_eager")
    both = torch.compile(lambda x: func_gradients(function, x), fullgraph=True, backend="aot_eager")
    first, second = both(x)
    assert_close(torch.autograd.grad(plain(x), x)[0], first)
    return first, second


@each_reversal
@pytest.mark.parametrize("lambd", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=repr)
def test_all_lanes_give_the_same_first_and_second_gradients(op, lambd):
    arguments = op.arguments(Draw(dtype=torch.float64), lambd=lambd)
    x = arguments["x"].requires_grad_()

    def loss(module):
        return lambda x: COMPOSITES[op.name](getattr(module, op.name), **arguments | {"x": x}).sin().sum()

    expected = eager_gradients(loss(fastda.reference), x)
    for lane in (eager_gradients, func_gradients, compiled_gradients):
        for got, gradient in zip(lane(loss(fastda), x), expected):
            assert_close(got, gradient)


NODES = {
    "gradient_reversal": "fastda::GradientReversalBackward",
    "gradient_reversal_fork": "fastda::GradientReversalForkBackward",
    "gradient_reversal_linear": "fastda::GradientReversalLinearBackward",
}


@pytest.mark.compiled_core
@each_reversal
def test_plain_eager_calls_take_the_lane_in_cpp(op):
    for lambd in (0.3, 1, torch.tensor(0.3), torch.tensor([0.3])):
        arguments = op.arguments(lambd=lambd)
        outputs = op.of(fastda)(**arguments | {"x": torch.nn.Parameter(arguments["x"])})
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            assert output.grad_fn.name() == NODES[op.name]
    with fastda.use_backend("reference"):
        outputs = op.of(fastda)(**op.arguments() | {"x": torch.ones(7, 4, requires_grad=True)})
    assert "fastda" not in (outputs if isinstance(outputs, tuple) else (outputs,))[-1].grad_fn.name()


@each_reversal
def test_what_is_not_plain_eager_takes_another_lane(op):
    """NumPy's numbers, dispatch modes, gradients taken under vmap: the same answer."""
    arguments = op.arguments(Draw(dtype=torch.float64))
    x = arguments["x"].requires_grad_()
    outputs = as_tuple(op.of(fastda)(**arguments | {"lambd": numpy.float32(0.25)}))
    incoming = [random_like(torch.empty(3, *y.shape, dtype=y.dtype), i) for i, y in enumerate(outputs)]
    rows = [torch.autograd.grad(outputs, x, [g[i] for g in incoming], retain_graph=True)[0] for i in range(3)]
    (batched,) = torch.autograd.grad(outputs, x, incoming, is_grads_batched=True, retain_graph=True)
    assert_close(batched, torch.stack(rows))
    total = lambda x: sum((y**3).sum(-1) for y in as_tuple(op.of(fastda)(**arguments | {"x": x})))  # noqa: E731
    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(total, x, vectorize=True), jacobian(total, x))
    with FlopCounterMode(display=False):
        again = as_tuple(op.of(fastda)(**arguments | {"lambd": 0.25}))
        assert_close(torch.autograd.grad(again, x, [g[0] for g in incoming])[0], rows[0])
    with FakeTensorMode():
        shaped = {name: torch.empty(v.shape) if is_floating(v) else v for name, v in arguments.items()}
        fake = op.of(fastda)(**shaped)
        assert [tuple(y.shape) for y in as_tuple(fake)] == [tuple(y.shape) for y in outputs]


@each_module
@each_reversal
def test_a_compiled_function_returns_what_it_reverses(module, op):
    """Aliases of an inner result among a graph's results keep the reversal; no value of a tensor λ compiles anew."""
    arguments = op.arguments()
    x = arguments["x"].requires_grad_()

    def encoder(x, lambd):
        features = x.sin()
        return features, *as_tuple(op.of(module)(**arguments | {"x": features, "lambd": lambd}))

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    one_graph = torch.compile(encoder, fullgraph=True, backend=counter)
    for value in (0.0, 0.3, 2.0):
        outputs = one_graph(x, torch.tensor(value))
        incoming = [random_like(y.detach(), i) for i, y in enumerate(outputs)]
        expected = torch.autograd.grad(encoder(x, value), x, incoming)
        assert_close(torch.autograd.grad(outputs, x, incoming), expected)
    assert counter.frame_count == 1


@each_reversal
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_function_keeps_the_reversal(op):
    arguments = op.arguments()
    x = arguments["x"].requires_grad_()
    total = lambda x: sum(y.sum() for y in as_tuple(op.of(fastda)(**arguments | {"x": x})))  # noqa: E731
    traced = torch.jit.trace(total, x)
    assert_close(torch.autograd.grad(traced(x), x), torch.autograd.grad(total(x), x))


# Memory


FEATURES = (256, 512)
WIDTH = 64


def fork(x, lambd=0.3):
    return fastda.gradient_reversal_fork(x, lambd)


def linear(x, weight, bias):
    return fastda.gradient_reversal_linear(x, weight, bias, 0.3)


def profiled(function):
    """The operations that `function` runs, and the bytes of each allocation, as PyTorch's profiler sees them."""
    options = {"profile_memory": True, "record_shapes": True}
    with silent_profiler(), torch.autograd.profiler.profile(**options) as profiler:
        kept = function()
    del kept
    allocated = [event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    operations = [event for event in profiler.function_events if event.name.startswith("aten::")]
    return operations, [size for size in allocated if size > 0]


MOVES_NOTHING = {f"aten::{name}" for name in ("view", "reshape", "alias", "t", "to", "resolve_conj", "detach")}


def passes(operations, shape=FEATURES):
    """How often the features' worth of memory is read or written by the operations, products or elementwise."""
    count = 0
    for event in operations:
        shapes = [tuple(shape) for shape in event.input_shapes if shape]
        if event.name in ("aten::mm", "aten::addmm"):  # what is added was copied before, and is counted there
            (rows, _), (_, columns) = shapes[-2:]
            count += (shapes[-2:] + [(rows, columns)]).count(shape)
        elif event.name == "aten::copy_":
            count += 2 * (shapes[0] == shape)
        elif event.name not in MOVES_NOTHING:
            count += shapes.count(shape) + (shapes[:1] == [shape])
    return count


def feature_sized(allocated):
    """The allocations that are not small against the features."""
    return [size for size in allocated if size > torch.Size(FEATURES).numel() * 4 // 8]


@pytest.mark.compiled_core
def test_backward_of_the_fork_takes_three_passes_and_one_allocation():
    x = Draw().normal(*FEATURES).requires_grad_()
    incoming = (Draw(seed=1).normal(*FEATURES), Draw(seed=2).normal(*FEATURES))
    outputs = fork(x)
    operations, allocated = profiled(lambda: torch.autograd.grad(outputs, x, incoming))
    assert passes(operations) == 3, [event.name for event in operations]
    assert allocated == [x.numel() * 4]
    outputs = fastda.reference.gradient_reversal_fork(x, 0.3)
    operations, allocated = profiled(lambda: torch.autograd.grad(outputs, x, incoming))
    assert passes(operations) == 5  # the meter sees what is not fused


@pytest.mark.compiled_core
def test_backward_of_the_linear_fork_spends_no_pass_on_the_reversal():
    x = Draw().normal(*FEATURES).requires_grad_()
    weight, bias = Draw(seed=1).normal(WIDTH, FEATURES[1]).requires_grad_(), Draw(seed=2).normal(WIDTH).requires_grad_()
    incoming = (Draw(seed=3).normal(*FEATURES), Draw(seed=4).normal(FEATURES[0], WIDTH))
    found = {}
    for name, layer in (
        ("fused", linear),
        ("without reversal", lambda x, weight, bias: (x, F.linear(x, weight, bias))),
        ("reference", lambda x, weight, bias: fastda.reference.gradient_reversal_linear(x, weight, bias, 0.3)),
    ):
        outputs = layer(x, weight, bias)
        operations, allocated = profiled(partial(torch.autograd.grad, outputs, (x, weight, bias), incoming))
        found[name] = passes(operations), sorted(feature_sized(allocated))
    # g₁ copied into the result, to which the product is added; x read for the weight
    assert found["fused"] == (4, sorted([x.numel() * 4, weight.numel() * 4])), found
    assert found["fused"][0] <= found["without reversal"][0] < found["reference"][0]


@pytest.mark.compiled_core
def test_a_gradient_that_nobody_holds_is_overwritten():
    """As PyTorch's own accumulation does: in a network the reversal allocates nothing of the features' size."""
    x = Draw().normal(*FEATURES).requires_grad_()
    weight, bias = Draw(seed=1).normal(WIDTH, FEATURES[1]).requires_grad_(), Draw(seed=2).normal(WIDTH).requires_grad_()
    scale = Draw(seed=3).normal(*FEATURES)

    def count(outputs, *inputs):
        total = sum((y * scale[:, : y.shape[1]]).sum() for y in outputs)
        with silent_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
            kept = torch.autograd.grad(total, inputs)
        del kept
        sizes = [event.nbytes() for event in profiler.kineto_results.events() if event.name() == "[memory]"]
        return len([size for size in sizes if size == x.numel() * 4])

    assert count((x, x), x) == 2  # a product for each head, and their sum in place
    assert count(fork(x), x) == 2
    assert count(linear(x, weight, bias), x, weight, bias) == 1
    assert count((fastda.gradient_reversal(x, 0.3),), x) == 1


class Given(torch.autograd.Function):
    """Its gradient is a tensor that it goes on holding."""

    @staticmethod
    def forward(ctx, x, gradient):
        ctx.gradient = gradient
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        return ctx.gradient, None


@each_reversal
def test_a_gradient_that_somebody_holds_is_not_overwritten(op):
    arguments = op.arguments(Draw(dtype=torch.float64))
    x = arguments["x"].requires_grad_()

    def held(how):
        outputs = as_tuple(op.of(fastda)(**arguments))
        kept = [random_like(y.detach(), i) for i, y in enumerate(outputs)]
        before = [g.clone() for g in kept]
        if how == "a function":
            total, watched = sum(Given.apply(y, g) for y, g in zip(outputs, kept)), kept
        elif how == "a view of it":
            total, watched = sum(Given.apply(y, g.view(-1).view(y.shape)) for y, g in zip(outputs, kept)), kept
        elif how == "an expanded one":
            total, watched, before = sum(y.sum() for y in outputs), [], []
        else:
            total = sum((y * g).sum() for y, g in zip(outputs, kept))
            if how == "retain_grad":
                for y in outputs:
                    y.retain_grad()
            hooked = []
            if how == "a hook":
                for y in outputs:
                    y.register_hook(hooked.append)
            wanted = [*outputs, x] if how == "another input" else [x]
            gradients = torch.autograd.grad(total, wanted) if how != "retain_grad" else total.backward()
            watched = {"a hook": hooked, "another input": gradients}.get(how) or [y.grad for y in outputs]
            ordered = partial(sorted, key=lambda g: (g.shape, g.sum().item()))
            assert_close(ordered(watched[: len(before)]), ordered(before))
            return x.grad if how == "retain_grad" else gradients[-1]
        (gradient,) = torch.autograd.grad(total, x)
        assert_close(watched, before)
        return gradient

    expected = held("a function")
    for how in ("a view of it", "a hook", "retain_grad", "another input"):
        x.grad = None
        assert_close(held(how), expected)
    assert held("an expanded one").isfinite().all()


# Several layers, mixed dtypes


@each_module
@pytest.mark.parametrize("lambd", [0.3, torch.tensor(0.3)], ids=repr)
def test_fork_of_several_layers(module, lambd):
    layers = [Draw(seed=i).normal(*shape).requires_grad_() for i, shape in enumerate(((4, 3), (2, 5, 1), (7,), (0,)))]
    fixed = Draw().normal(3)
    first, second = module.gradient_reversal_fork([*layers, fixed], lambd)
    assert isinstance(first, tuple) and isinstance(second, tuple) and not first[-1].requires_grad
    incoming = [[random_like(x.detach(), 10 * i + k) for k, x in enumerate(layers)] for i in range(2)]
    got = torch.autograd.grad([*first[:-1], *second[:-1]], layers, incoming[0] + incoming[1], retain_graph=True)
    assert_close(got, tuple(g1 - 0.3 * g2 for g1, g2 in zip(*incoming)))
    got = torch.autograd.grad([first[0], second[1]], layers, [incoming[0][0], incoming[1][1]], allow_unused=True)
    assert_close(got[:2], (incoming[0][0], -0.3 * incoming[1][1]))
    assert all(g is None or not g.any() for g in got[2:])


@each_module
def test_errors_of_layers_are_named(module):
    x = torch.ones(2, 3)
    for layers in ([], (), [x, None], {"x": x}):
        with pytest.raises(TypeError, match="^x: expected a tensor or a list of them"):
            module.gradient_reversal_fork(layers)
    with pytest.raises(TypeError, match=r"^layer 1: x: expected .*torch\.int64"):
        module.gradient_reversal_fork([x, x.long()])
    with pytest.raises(ValueError, match="^layer 0: lambd: expected"):
        module.gradient_reversal_fork([x, x], float("nan"))


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.compiled_core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", FLOATS, ids=str)
def test_fork_backward_of_mixed_dtypes(dtype, other):
    shapes = ((5, 8), (3,), (2, 3, 4), (0, 2), ())
    grads = [Draw(dtype=dtype, seed=i).normal(*shape) for i, shape in enumerate(shapes)]
    reversed_grads = [Draw(dtype=other, seed=9 + i).normal(*shape) for i, shape in enumerate(shapes)]
    grads[2], reversed_grads[2] = grads[2].mT.contiguous().mT, reversed_grads[2].flip(0)
    lambd = torch.tensor(0.3)
    got = torch.ops.fastda.gradient_reversal_fork_backward(grads, reversed_grads, lambd)
    for result, g1, g2 in zip(got, grads, reversed_grads):
        assert result.dtype == dtype and result.shape == g1.shape
        assert result.data_ptr() != g1.data_ptr() or not result.numel()
        truth = g1.double() - lambd.double() * g2.double()
        worst = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        assert ((result.double() - truth).abs() <= worst * (g1.double().abs() + g2.double().abs())).all()


@pytest.mark.compiled_core
def test_a_direct_call_of_fork_backward_is_checked():
    call, x, lambd = torch.ops.fastda.gradient_reversal_fork_backward, torch.ones(2, 3), torch.tensor(0.3)
    for arguments, error, message in (
        (([x], [x, x], lambd), ValueError, "reversed_grads: expected as many tensors as grads, 1, got 2"),
        (([x, x], [x, x[0]], lambd), ValueError, r"reversed_grads\[1\]: expected the shape of grads\[1\]"),
        (([x.long()], [x.long()], lambd), TypeError, r"grads\[0\]: expected float32"),
        (([x], [x], torch.ones(2)), ValueError, "lambd: expected one element"),
    ):
        with pytest.raises(error, match=message):
            call(*arguments)


@pytest.mark.compiled_core
@pytest.mark.parametrize("lambd", [0.3, torch.tensor(0.3)], ids=repr)
def test_linear_under_autocast_adds_into_the_gradient_of_the_features(lambd):
    """Both gradients at once: float32 features, a bfloat16 layer."""
    x, weight, bias, g1, _, gh = drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        first, hidden = fastda.gradient_reversal_linear(x, weight, bias, lambd)
    assert hidden.dtype == torch.bfloat16 and hidden.grad_fn.name() == NODES["gradient_reversal_linear"]
    gradients = torch.autograd.grad((first, hidden), (x, weight, bias), (g1, gh.bfloat16()))
    exact = g1 - 0.3 * gh @ weight, gh.mT @ x, gh.sum(0)
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    assert_close(gradients, exact, rtol=0.02, atol=0.02)
