"""The tolerance rejects wrong answers and accepts other right ones."""

from __future__ import annotations

import pytest
import torch
from ops_under_test import BY_NAME, Draw, Sizes, each_op
from tolerance import assert_as_accurate_as_reference

import fastda.reference

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = Sizes(batch=(2,), samples=9, others=4, features=4, classes=4)


def pairwise(**arguments):
    return fastda.reference.pairwise_distance(**arguments)


class Scaled(torch.autograd.Function):
    """The identity, with values and gradients multiplied by different factors."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.gradient = gradient
        return x * value

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.gradient, None, None


def changed(value: float = 1.0, gradient: float = 1.0):
    return lambda **arguments: Scaled.apply(pairwise(**arguments), value, gradient)


def with_nan(**arguments):
    distances = pairwise(**arguments)
    return torch.where(torch.arange(distances.numel()).view_as(distances) == 5, torch.nan, distances)


def without_nan(**arguments):
    return pairwise(**arguments).nan_to_num(0.0)


WRONG = {
    "transposed": lambda **arguments: pairwise(**arguments).mT,
    "scaled by 1.001": changed(value=1.001),
    "of the wrong sign": changed(value=-1.0),
    "not a number": with_nan,
    "gradient scaled by 1.001": changed(gradient=1.001),
    "gradient of the wrong sign": changed(gradient=-1.0),
    "gradient not a number": changed(gradient=torch.nan),
    "no gradient": lambda **arguments: pairwise(**arguments).detach().requires_grad_(),
    "of another dtype": lambda **arguments: pairwise(**arguments).bfloat16(),
    "of another shape": lambda **arguments: pairwise(**arguments).flatten(),
    "computed in half precision": lambda **arguments: pairwise(**arguments).half().float(),
    "one result too many": lambda **arguments: (pairwise(**arguments), pairwise(**arguments)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wrong", WRONG)
def test_rejects(wrong, dtype):
    arguments = BY_NAME["pairwise_distance"].arguments(Draw(SIZES, dtype))
    with pytest.raises(AssertionError):
        assert_as_accurate_as_reference(WRONG[wrong], pairwise, arguments)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rejects_what_is_finite_where_the_reference_is_not(bad):
    arguments = BY_NAME["pairwise_distance"].arguments(Draw(SIZES))
    arguments["queries"][0, 0, 0] = bad
    assert_as_accurate_as_reference(pairwise, pairwise, arguments)
    with pytest.raises(AssertionError):
        assert_as_accurate_as_reference(without_nan, pairwise, arguments)


@each_op
@pytest.mark.parametrize("error", [1e-5, -1.0], ids=["off by 1e-5", "dropped"])
def test_rejects_one_wrong_feature(op, error):
    """One feature (or logit) of one input is off wherever it comes in, or in the gradient alone."""
    arguments = op.arguments(Draw(SIZES))
    reference = op.of(fastda.reference)
    for asking, x in op.differentiable(arguments).items():
        factors = torch.ones(x.shape)
        factors[..., -1] += error
        for value, gradient in ((factors, factors), (1.0, factors)):

            def wrong(asking=asking, value=value, gradient=gradient, **given):
                return reference(**{**given, asking: Scaled.apply(given[asking], value, gradient)})

            with pytest.raises(AssertionError, match="are wrong"):
                assert_as_accurate_as_reference(wrong, reference, arguments, constant=op.constants)


def permuted(name: str, order: torch.Tensor):
    """An op on features in another order, its result in the old one."""
    back = order.argsort()

    def function(**arguments):
        arguments = {key: x[..., order] if key in FEATURES else x for key, x in arguments.items()}
        result = BY_NAME[name].of(fastda.reference)(**arguments)
        return result[..., back, :][..., back] if name == "covariance" else result

    return function


FEATURES = ("x", "source", "target", "support", "queries", "prototypes")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("coral_loss", "prototypical_loss")]


@pytest.mark.parametrize("name", ["covariance", "pairwise_distance", *SLOW])
def test_accepts_the_reference_on_permuted_features(name):
    op = BY_NAME[name]
    generator = torch.Generator().manual_seed(0)
    for seed in range(300):
        samples, others, features = torch.randint(2, 40, (3,), generator=generator).tolist()
        sizes = Sizes(samples=samples, others=others, features=features)
        draw = Draw(sizes, (torch.float32, torch.float64)[seed % 2], seed)
        function = permuted(name, torch.randperm(features, generator=generator))
        assert_as_accurate_as_reference(function, op.of(fastda.reference), op.arguments(draw), seed=seed)


@pytest.mark.parametrize("distance", [21.0, 25.0, 33.0])
def test_accepts_answers_that_float32_is_sure_of_and_float64_is_not(distance):
    """The farther class has a probability p of 1e-9 to 1e-14: 1 - p rounds to 1 in float32, and not in float64."""
    prototypes = torch.tensor([[0.0, 0.1], [distance**0.5, 0.1]], dtype=torch.float64)
    arguments = {"queries": prototypes[:1] * 1.01, "prototypes": prototypes}
    softmax = fastda.reference.prototype_softmax

    def exponential(queries, prototypes):
        return fastda.reference.prototype_log_softmax(queries, prototypes).exp()

    assert_as_accurate_as_reference(exponential, softmax, arguments)
    assert_as_accurate_as_reference(softmax, exponential, arguments)
