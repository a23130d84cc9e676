"""The covariance on Triton, interpreted on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_under_test import BY_NAME, Draw, Sizes
from strategies import calls
from tolerance import assert_as_accurate_as_reference, results

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory", "one_thread")
COVARIANCE = BY_NAME["covariance"]


def check(arguments):
    assert_as_accurate_as_reference(fastda.covariance, fastda.reference.covariance, arguments)


@given(arguments=calls(COVARIANCE, batches=((), (2,), (1, 2), (0,))))
@settings(max_examples=8)
def test_values_and_gradients(arguments):
    check(arguments)


@pytest.mark.parametrize("samples, features", [(530, 5), (5, 140)])
def test_larger_blocks_and_means_first(samples, features):
    check({"x": Draw().normal(samples, features)})


def test_means_a_thousand_deviations_from_zero():
    check({"x": Draw().normal(40, 9) + 1000})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_products(dtype, half_products):
    """Those of centred features rounded to the input's dtype; the interpreter rounds to bfloat16 towards zero."""
    arguments = {"x": Draw(Sizes(batch=(2,), features=33), dtype).samples(300)}
    expected = results(fastda.reference.covariance, {"x": arguments["x"].double()})
    for name, result in results(fastda.covariance, arguments).items():
        assert (result.double() - expected[name]).norm() <= 4 * torch.finfo(dtype).eps * expected[name].norm(), name


def test_symmetric_to_the_last_bit():
    value = fastda.covariance(Draw().normal(20, 70))
    assert torch.equal(value, value.mT)


def test_second_derivatives_and_vmap():
    x = Draw(Sizes(batch=(2,)), torch.float64).samples(9).requires_grad_()

    def second(module):
        value = module.covariance(x)
        (gradient,) = torch.autograd.grad(value, x, value.detach().sin(), create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    torch.testing.assert_close(second(fastda), second(fastda.reference))
    per_batch = [
        torch.func.vmap(torch.func.grad(lambda y: module.covariance(y).square().sum()))(x)
        for module in (fastda, fastda.reference)
    ]
    torch.testing.assert_close(*per_batch)
