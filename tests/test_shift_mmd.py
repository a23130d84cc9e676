"""MMD and CORAL's test: tile by tile what the whole kernel matrix gives, and p-values that keep their level."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastda
from fastda.shift import coral_distance, kernel_forms, mmd
from fastda.shift.mmd import assignments

pytestmark = pytest.mark.usefixtures("one_thread")


def kernel_matrix(points: torch.Tensor, bandwidth: float) -> torch.Tensor:
    return torch.exp(
        -(torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist") ** 2) / (2 * bandwidth**2)
    )


def unbiased_mmd(source: torch.Tensor, target: torch.Tensor, bandwidth: float) -> float:
    """By the definition."""
    m, n = len(source), len(target)
    k = kernel_matrix(torch.cat([source, target]), bandwidth)
    within = [(block.sum() - block.trace()) / (len(block) * (len(block) - 1)) for block in (k[:m, :m], k[m:, m:])]
    return (sum(within) - 2 * k[:m, m:].mean()).item()


@settings(max_examples=20)
@given(
    count=st.sampled_from([2, 3, 7, 31, 32, 33, 65, 97]),
    width=st.integers(1, 5),
    bandwidth=st.sampled_from([None, 0.5, 3.0]),
    rows=st.sampled_from([1, 16, 32]),
    columns=st.sampled_from([32, 48]),
    seed=st.integers(0, 1000),
)
def test_tiles_give_the_forms_of_the_whole_matrix(count, width, bandwidth, rows, columns, seed):
    """Sizes about the tiles', which are small here."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, width, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(count, 3, generator=generator)
    k = kernel_matrix(points, bandwidth) if bandwidth else (points @ points.T).square()
    off_diagonal = k - k.diag().diag()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_forms, "ROWS", rows)
        patch.setattr(kernel_forms, "COLUMNS", columns)
        forms = kernel_forms.quadratic_forms(points, coefficients, bandwidth=bandwidth)
    c = coefficients.double()
    scale = k.abs().sum().item() + 1
    torch.testing.assert_close(forms.quadratic, (c * (off_diagonal @ c)).sum(0), rtol=0, atol=2e-6 * scale)
    torch.testing.assert_close(forms.row_sums, off_diagonal.sum(1), rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(forms.diagonal, k.diag(), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (40, 60), (700, 500)])
def test_the_estimate_is_the_definition(m, n):
    source, target = torch.randn(m, 3, dtype=torch.float64), torch.randn(n, 3, dtype=torch.float64) * 1.5 + 100
    found = mmd(source, target, bandwidth=1.7, permutations=5, progress=False)
    assert found.squared == pytest.approx(unbiased_mmd(source, target, 1.7), abs=2e-6)
    assert found.bandwidth == 1.7


def test_permutations_are_those_of_the_samples():
    """The null values are MMD² of the samples divided anew."""
    source, target = torch.randn(30, 2, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    found = mmd(source, target, bandwidth=1.0, permutations=6, seed=3, progress=False)
    points = torch.cat([source, target])
    columns = assignments(30, 20, 6, torch.Generator().manual_seed(3))
    for value, column in zip(found.null.tolist(), columns.T[1:]):
        assert (column > 0).sum() == 30
        assert value == pytest.approx(unbiased_mmd(points[column > 0], points[column < 0], 1.0), abs=2e-6)
    assert found.p_value == (1 + (found.null >= found.squared).sum().item()) / 7


def test_the_default_bandwidth_is_the_median_distance():
    points = torch.randn(90, 4, dtype=torch.float64)
    assert mmd(points[:40], points[40:], permutations=0, progress=False).bandwidth == torch.pdist(points).median()


def test_same_seed_same_bits_and_another_seed_other_permutations():
    source, target = torch.randn(50, 3), torch.randn(40, 3)
    one, again, other = (mmd(source, target, permutations=20, seed=seed, progress=False) for seed in (0, 0, 1))
    assert torch.equal(one.null, again.null) and not torch.equal(one.null, other.null)


def test_the_number_of_threads_changes_no_bit_of_the_forms():
    points, coefficients = torch.randn(1600, 3, dtype=torch.float64), torch.randn(1600, 9)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(kernel_forms.quadratic_forms(points, coefficients, bandwidth=2.0))
        assert torch.get_num_threads() == threads
    for other in found[1:]:
        assert torch.equal(other.quadratic, found[0].quadratic) and torch.equal(other.row_sums, found[0].row_sums)


def test_its_level_is_kept():
    """At 5 %, 300 data sets of one distribution: 15 expected, more than 27 once in 500 times."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(60, 2, generator=generator) for _ in range(300)]
    alarms = sum(
        mmd(x[:35], x[35:], permutations=99, seed=i, progress=False).p_value <= 0.05 for i, x in enumerate(samples)
    )
    assert 3 <= alarms <= 27


def test_it_sees_what_mean_and_covariance_do_not():
    """Two points with probability one half each have the mean and variance of a Gaussian."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(400, 2, generator=generator)
    target = torch.randn(400, 2, generator=generator).sign()
    assert mmd(source, target, permutations=99, progress=False).p_value == 0.01
    assert coral_distance(source, target, permutations=99).p_value > 0.05


def test_samples_that_are_all_equal():
    found = mmd(np.ones((5, 2)), np.ones((4, 2)), permutations=10)
    assert (found.squared, found.p_value, found.bandwidth) == (0.0, 1.0, 0.0)
    duplicates = torch.arange(3.0).repeat(20)[:, None]
    assert mmd(duplicates, duplicates, permutations=99, progress=False).p_value > 0.5


def test_without_permutations_there_is_no_p_value():
    assert math.isnan(mmd(torch.randn(5, 2), torch.randn(5, 2), permutations=0).p_value)


def test_coral_is_the_loss():
    source, target = torch.randn(50, 6, dtype=torch.float64) + 30, 2 * torch.randn(40, 6, dtype=torch.float64)
    found = coral_distance(source, target)
    assert found.distance == pytest.approx(fastda.coral_loss(source, target).item(), rel=1e-9)
    assert math.isnan(found.p_value)


def test_corals_test_sees_covariances_and_nothing_else():
    """It keeps its level where means and higher moments differ."""
    generator = torch.Generator().manual_seed(0)
    rotated = torch.tensor([[1.0, 0.6], [0.0, 0.8]])
    few, alarms = 0, 0
    for seed in range(40):
        source, target = (torch.randn(120, 2, generator=generator) for _ in range(2))
        alarms += coral_distance(source, target + 5, permutations=99, seed=seed).p_value <= 0.05
        few += coral_distance(source, target @ rotated.T, permutations=99, seed=seed).p_value <= 0.05
    assert alarms <= 6 and few >= 35


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((np.ones((1, 2)), np.ones((3, 2))), {}, ValueError, "source: expected at least 2 samples, got 1"),
        ((np.ones((3, 2)), np.ones((3, 4))), {}, ValueError, "target: expected as many features as source, 2, got 4"),
        ((np.ones(3), np.ones((3, 4))), {}, ValueError, r"source: expected samples × features, got shape \(3,\)"),
        (([["a"]], np.ones((3, 4))), {}, TypeError, "source: expected a tensor or array of numbers"),
        ((np.ones((3, 2)), [[1, 2], [3, np.nan]]), {}, ValueError, "target: .* 1 NaN or Inf, .* sample 1, feature 1"),
        ((np.ones((3, 2)), np.ones((3, 2))), {"bandwidth": 0}, ValueError, "bandwidth: expected a number > 0"),
        ((np.ones((3, 2)), np.ones((3, 2))), {"permutations": -1}, ValueError, "permutations: expected at least 0"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        mmd(*arguments, **options)


@pytest.mark.slow
def test_many_samples_take_little_memory():
    """40 000 points: the kernel matrix would have 6.4 GB."""
    import resource

    source, target = torch.randn(20_000, 8), torch.randn(20_000, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert mmd(source, target, permutations=50, progress=False).p_value > 0.001
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB
