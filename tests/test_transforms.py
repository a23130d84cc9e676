"""Every op under torch.func, torch.compile, torch.export and autocast; opcheck for all that is registered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_under_test import BY_NAME, OPS, Draw, Op, Sizes, each_module, each_op, each_plain_op
from tolerance import as_tuple, is_floating, random_like, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacrev, jvp, vmap
from torch.testing import assert_close

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
SMALL = Sizes(samples=5, others=4, features=3)


def tensors_of(arguments: dict[str, object], constants: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and name not in constants}


def scalar(op: Op, module: object, arguments: dict[str, object], names: tuple[str, ...]):
    """The op as a function of some of its tensors to one number, with random weights for its outputs."""
    weights = [random_like(y.detach(), i) for i, y in enumerate(as_tuple(op.of(module)(**arguments)))]

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        outputs = as_tuple(op.of(module)(**{**arguments, **dict(zip(names, tensors))}))
        return sum((y * weight).sum() for y, weight in zip(outputs, weights))

    return function


def features(op: Op, arguments: dict[str, object]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in op.differentiable(arguments).items() if x.dim() > 0}


@each_op
@each_module
def test_func_grad(op, module):
    arguments = op.arguments()
    inputs = features(op, arguments)
    function = scalar(op, module, arguments, tuple(inputs))
    got = grad(function, argnums=tuple(range(len(inputs))))(*inputs.values())
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    assert_close(got, torch.autograd.grad(function(*leaves), leaves))


@each_op
@each_module
@pytest.mark.parametrize("dims", ["all at 0", "all at -1", "the first", "the last"])
def test_vmap_and_vmap_of_grad(op, module, dims):
    """Over all tensors, labels too, and over one feature tensor while the others are shared."""
    stack = [op.arguments(Draw(SMALL, torch.float64, seed)) for seed in range(3)]
    arguments = stack[0]
    names = list(tensors_of(arguments, op.constants)) if dims.startswith("all") else list(features(op, arguments))
    names = {"the first": names[:1], "the last": names[-1:]}.get(dims, names)
    dim = -1 if dims == "all at -1" else 0
    columns = [[a[name] for a in stack] for name in names]
    function = scalar(op, module, arguments, tuple(names))
    stacked = [torch.stack(column, dim) for column in columns]
    assert_close(vmap(function, in_dims=dim)(*stacked), torch.stack([function(*row) for row in zip(*columns)]))
    wanted = tuple(i for i, name in enumerate(names) if is_floating(arguments[name]))
    of_grad = vmap(grad(function, argnums=wanted), in_dims=dim)(*stacked)
    each = [grad(function, argnums=wanted)(*row) for row in zip(*columns)]
    assert_close(of_grad, tuple(torch.stack(column) for column in zip(*each)))


@each_op
@each_module
def test_jacrev_twice(op, module):
    arguments = op.arguments(Draw(SMALL, torch.float64))
    for name, x in features(op, arguments).items():
        got = jacrev(jacrev(scalar(op, module, arguments, (name,))))(x)
        expected = torch.autograd.functional.hessian(scalar(op, fastda.reference, arguments, (name,)), x)
        assert_close(got, expected)


@each_plain_op
@each_module
def test_forward_mode(op, module):
    """jvp agrees with reverse mode, hessian (forward over reverse) with reverse over reverse."""
    arguments = op.arguments(Draw(SMALL, torch.float64))
    inputs = features(op, arguments)
    function = scalar(op, module, arguments, tuple(inputs))
    tangents = tuple(random_like(x, i) for i, x in enumerate(inputs.values()))
    value, directional = jvp(function, tuple(inputs.values()), tangents)
    assert_close(value, function(*inputs.values()))
    gradients = grad(function, argnums=tuple(range(len(inputs))))(*inputs.values())
    assert_close(directional, sum((g * t).sum() for g, t in zip(gradients, tangents)))
    (name, x), *_ = inputs.items()
    function = scalar(op, module, arguments, (name,))
    assert_close(hessian(function)(x), jacrev(jacrev(function))(x))


def compiled(function, dynamic: bool | None = False):
    """One graph or an error, and the counter of how often it was compiled."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


def assert_results_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name], equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def check_compiles_once(op: Op, calls: list[dict[str, object]], dynamic: bool | None) -> None:
    """One graph that gives what eager mode gives, and no compilation after the first call."""
    one_graph, counter = compiled(op.of(fastda), dynamic)
    for i, arguments in enumerate(calls):
        expected = results(op.of(fastda), arguments, constant=op.constants)
        assert_results_close(results(one_graph, arguments, constant=op.constants), expected)
        compilations = counter.frame_count if i == 0 else compilations
        assert counter.frame_count == compilations > 0


@each_op
def test_compiles_once_for_all_values(op):
    check_compiles_once(op, [op.arguments(Draw(seed=seed)) for seed in range(3)], dynamic=False)


@pytest.mark.parametrize("module", [fastda, fastda.reference], ids=["fastda", "reference"])
@pytest.mark.parametrize("option", ["mean_weight", "temperature", "lambd", "lambd of fork", "lambd of linear"])
def test_a_number_recompiles_at_most_once(option, module):
    x, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).chunk(2)
    x.requires_grad_()
    labels = torch.tensor([0, 1, 1])
    function = {
        "mean_weight": lambda value: module.coral_loss(x, y, mean_weight=value),
        "temperature": lambda value: module.prototypical_loss(x, labels, y, labels, 2, temperature=value),
        "lambd": lambda value: module.gradient_reversal(x, value).sin(),
        "lambd of fork": lambda value: torch.mul(*module.gradient_reversal_fork(x, value)),
        "lambd of linear": lambda value: torch.mul(*module.gradient_reversal_linear(x, y[:1], None, value)),
    }[option]
    one_graph, counter = compiled(function, dynamic=None)
    for i in range(11):
        got, expected = (call(0.1 + 0.05 * i).sum() for call in (one_graph, function))
        assert_close(torch.autograd.grad(got, x), torch.autograd.grad(expected, x))
    assert counter.frame_count <= 2


def test_exports_with_any_number_of_samples():
    class Loss(torch.nn.Module):
        def forward(self, source, target):
            return fastda.coral_loss(source, target)

    source, target = torch.randn(86, 64, generator=torch.Generator().manual_seed(0)).split([80, 6])
    samples = torch.export.Dim("samples", min=2, max=1000)
    exported = torch.export.export(Loss(), (source[:9], target), dynamic_shapes=({0: samples}, None)).module()
    for count in (9, 80):  # fewer and more samples than features
        assert_close(exported(source[:count], target), fastda.coral_loss(source[:count], target))


@each_op
def test_compiles_once_for_all_sizes(op):
    different = ((4, 7, 5, 20), (2, 9, 6, 23), (8, 10, 12, 30))  # no two alike, which would be taken for the same
    names = ("batch", "samples", "others", "features")
    sizes = [Sizes(**dict(zip(names, ((batch,), *rest)))) for batch, *rest in different]
    check_compiles_once(op, [op.arguments(Draw(size)) for size in sizes], dynamic=True)


@each_op
def test_compiles_around_vmap_of_grad(op):
    arguments = op.arguments(Draw(SMALL))
    inputs = features(op, arguments)
    function = vmap(grad(scalar(op, fastda, arguments, tuple(inputs)), argnums=tuple(range(len(inputs)))))
    stacked = [torch.stack([x, 0.5 * x]) for x in inputs.values()]
    one_graph, _ = compiled(function)
    assert_close(one_graph(*stacked), function(*stacked))


@pytest.mark.parametrize("op", [op for op in OPS if op.reversal], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_tensor_lambda_never_recompiles(op, shape):
    values = (0.1, 0.2, 0.0, 1.0)
    check_compiles_once(op, [op.arguments(lambd=torch.full(shape, value)) for value in values], dynamic=None)


@pytest.mark.parametrize("op", [op for op in OPS if "temperature" in op.options], ids=str)
def test_a_tensor_temperature_never_recompiles(op):
    values = (0.1, 0.2, 1.0)
    check_compiles_once(op, [op.arguments(temperature=torch.tensor(value)) for value in values], dynamic=None)


@pytest.mark.slow
@each_op
def test_inductor(op):
    torch.compiler.reset()
    arguments = op.arguments(Draw(Sizes(batch=(2,))))
    got = results(torch.compile(op.of(fastda), fullgraph=True), arguments, constant=op.constants)
    assert_results_close(got, results(op.of(fastda), arguments, constant=op.constants))


class AsModule(torch.nn.Module):
    def __init__(self, function, fixed):
        super().__init__()
        self.function, self.fixed = function, fixed

    def forward(self, **tensors):
        return self.function(**tensors, **self.fixed)


@each_op
def test_export(op):
    arguments, others = op.arguments(), op.arguments(Draw(seed=1))
    tensors, new = tensors_of(arguments), tensors_of(others)
    fixed = {name: x for name, x in arguments.items() if name not in tensors}
    exported = torch.export.export(AsModule(op.of(fastda), fixed), (), tensors)
    assert_close(exported.module()(**new), op.of(fastda)(**others), equal_nan=True)


def bits(results: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, list[float]]]:
    return {name: (x.dtype, x.nan_to_num(7.0).flatten().tolist()) for name, x in results.items()}


@each_op
@each_module
def test_autocast_changes_nothing(op, module):
    """Forward under autocast, backward outside of it, as PyTorch asks for."""
    if op.name == "gradient_reversal_linear":
        return check_linear_under_autocast(module)

    def under_autocast(**arguments):
        with torch.autocast("cpu", torch.bfloat16):
            return op.of(module)(**arguments)

    arguments = op.arguments()
    expected = results(op.of(module), arguments, constant=op.constants)
    assert bits(results(under_autocast, arguments, constant=op.constants)) == bits(expected)


@pytest.mark.parametrize(
    "name",
    [
        "coral_loss",
        "deep_coral_loss",
        "prototypical_loss",
        "prototype_cross_entropy",
        "domain_adversarial_loss",
        "gradient_reversal",
        "gradient_reversal_fork",
    ],
)
def test_autocast_changes_no_gradient_of_a_kernel(name):
    """Also where backward runs under autocast, as it does in torch.func.grad."""
    op = BY_NAME[name]
    expected = results(op.of(fastda), op.arguments(), constant=op.constants)
    with torch.autocast("cpu", torch.bfloat16):
        assert bits(results(op.of(fastda), op.arguments(), constant=op.constants)) == bits(expected)


def check_linear_under_autocast(module):
    """But for the product of the linear layer, which follows torch.nn.functional.linear."""
    x, weight, bias = (random_like(torch.empty(shape), 0).requires_grad_() for shape in ((6, 4), (3, 4), (3,)))
    with torch.autocast("cpu", torch.bfloat16):
        first, hidden = module.gradient_reversal_linear(x, weight, bias, 0.5)
        expected = F.linear(x, weight, bias)
    assert first.dtype == torch.float32 and torch.equal(first, x)
    assert hidden.dtype == torch.bfloat16 and torch.equal(hidden, expected)
    incoming = random_like(hidden.detach(), 1)
    got = torch.autograd.grad(hidden, (x, weight, bias), incoming)
    expected = torch.autograd.grad(expected, (x, weight, bias), incoming)
    assert all(g.dtype == torch.float32 for g in got)
    assert_close(got, (-0.5 * expected[0], *expected[1:]), rtol=0.02, atol=0.02)


def test_forward_mode_keeps_the_dtype():
    """A Python number times a zero-dimensional tensor would make its tangent float64."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    value, tangent = jvp(lambda x: fastda.coral_loss(x, 2 * x + 1, mean_weight=0.5), (x,), (x,))
    assert value.dtype == tangent.dtype == torch.float32
