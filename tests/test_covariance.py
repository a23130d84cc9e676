"""Covariance: worked example, edge cases, invariances."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import Draw, Sizes, each_module
from torch.testing import assert_close

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
draws = st.builds(
    lambda seed, n, d: Draw(Sizes(samples=n, features=d), torch.float64, seed).samples(n, mean=2.0),
    *(st.integers(0, 2**16), st.integers(2, 40), st.integers(1, 20)),
)


@each_module
def test_worked_example(module):
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    assert_close(module.covariance(x), torch.tensor([[4.0, -1.0], [-1.0, 7.0]]))
    assert_close(module.covariance(x, correction=0), torch.tensor([[8.0, -2.0], [-2.0, 14.0]]) / 3)


@each_module
@given(x=draws)
def test_agrees_with_torch_cov(module, x):
    for correction in (0, 1):
        expected = torch.cov(x.T, correction=correction).reshape(x.shape[1], x.shape[1])
        assert_close(module.covariance(x, correction=correction), expected)


@each_module
@given(x=draws)
def test_invariances(module, x):
    covariance = module.covariance(x)
    assert_close(module.covariance(x + 100), covariance)
    assert_close(module.covariance(x.flip(0)), covariance)
    assert_close(module.covariance(3 * x), 9 * covariance)
    assert_close(covariance, covariance.mT)
    assert torch.linalg.eigvalsh(covariance).min() >= -1e-10 * covariance.trace()


@each_module
def test_keeps_its_digits_far_from_zero(module):
    """Deviation 1 at mean 3000: XᵀX − nμμᵀ in float32 would have no digit left."""
    x = Draw(dtype=torch.float64).normal(100, 5, mean=3000.0).float()
    assert_close(module.covariance(x).double(), module.covariance(x.double()), rtol=0, atol=1e-3)


@each_module
def test_empty(module):
    assert module.covariance(torch.empty(4, 0)).shape == (0, 0)
    assert module.covariance(torch.empty(0, 4, 3)).shape == (0, 3, 3)
    assert torch.equal(module.covariance(torch.ones(1, 2), correction=0), torch.zeros(2, 2))


@each_module
@pytest.mark.parametrize("count, correction", [(0, 0), (0, 1), (1, 1), (2, 2)])
def test_too_few_samples(module, count, correction):
    message = rf"^x: expected at least {correction + 1} samples \(correction \+ 1\), got {count};"
    with pytest.raises(ValueError, match=message):
        module.covariance(torch.ones(count, 3), correction=correction)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("samples, features", [(8, 700), (64, 300), (193, 301), (600, 128), (2000, 40)])
def test_threads_share_samples_or_tiles(samples, features, threads):
    """Many samples are divided among the threads, and of few the tiles of the result."""
    draw = Draw(Sizes(samples=samples, features=features), torch.float64)
    x, others = draw.samples(samples, mean=2.0), draw.samples(samples + 7)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        covariance, loss = fastda.covariance(x), fastda.coral_loss(x, others)
    finally:
        torch.set_num_threads(before)
    assert_close(covariance, fastda.reference.covariance(x))
    assert torch.equal(covariance, covariance.mT)
    assert_close(loss, fastda.reference.coral_loss(x, others))
