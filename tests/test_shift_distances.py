"""Proxy A-distance and the tests of single features."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from fastda.shift import feature_tests, proxy_a_distance
from fastda.shift.distances import from_scores
from fastda.shift.logistic import cross_fitted, fit_logistic, folds_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_distance_is_two_minus_four_errors():
    """ε is the mean of the domains' errors, however many samples each has; a score of 0 is half an error."""
    found = from_scores(torch.tensor([-1.0, -1, -1, 1]), torch.tensor([1.0, 0]))
    assert found.error == pytest.approx((1 / 4 + 1 / 4) / 2)
    assert found.distance == pytest.approx(2 * (1 - 2 * 0.25))
    assert found.low <= found.distance <= found.high


@pytest.mark.parametrize(("apart", "lowest", "highest"), [(0.0, 0.0, 0.35), (1.0, 0.5, 1.0), (8.0, 1.95, 2.0)])
def test_from_alike_to_apart(apart, lowest, highest):
    """Gaussians at distance 1 are told apart with error Φ(−½) = 0.309: distance 0.77."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(n, 5, generator=generator) for n in (500, 300))
    target[:, 0] += apart
    found = proxy_a_distance(source, target)
    assert lowest <= found.distance <= highest
    assert 0 <= found.low <= found.distance <= found.high <= 2
    assert (found.p_value < 0.01) == (apart > 0)
    assert proxy_a_distance(source, target) == found
    assert proxy_a_distance(source, target, seed=1) != found or apart == 8


def test_more_features_than_samples_and_constant_ones():
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(20, 100, generator=generator) for _ in range(2))
    source[:, 3] = target[:, 3] = 7
    assert proxy_a_distance(source, target).distance < 1.2
    alike = proxy_a_distance(np.ones((10, 2)), np.ones((12, 2)))
    assert (alike.distance, alike.error, alike.p_value) == (0.0, 0.5, 1.0)


def test_a_difference_of_variance_is_none_to_a_linear_classifier():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(500, 2, generator=generator), 3 * torch.randn(500, 2, generator=generator)
    assert proxy_a_distance(source, target).distance < 0.4


def test_logistic_regression_is_scikit_learns():
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((200, 6)) * [1, 2, 3, 4, 5, 6], generator.integers(0, 3, 200)
    ours = fit_logistic(torch.from_numpy(x), torch.from_numpy(y), 3).probabilities(torch.from_numpy(x))
    scaled = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(scaled, y).predict_proba(scaled)
    np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3)


def test_folds_are_stratified():
    labels = np.repeat([0, 1, 2], [10, 5, 7])
    fold = folds_of(labels, np.random.default_rng(0), 5)
    assert (np.bincount(fold[labels == 0], minlength=5) == 2).all()
    assert (np.bincount(fold[labels == 1], minlength=5) == 1).all()


def test_cross_fitting_predicts_what_it_has_not_seen():
    """Labels that say nothing are guessed by chance; a classifier that had seen them would know most."""
    generator = np.random.default_rng(0)
    x, y = torch.from_numpy(generator.standard_normal((200, 60))), generator.integers(0, 2, 200)
    source, target = cross_fitted(x, y, x[:50], 2, np.random.default_rng(0))
    assert (source.argmax(1) == y).mean() < 0.65
    assert target.shape == (50, 2) and np.allclose(target.sum(1), 1)


def test_single_features_and_their_false_discovery_rate():
    """Of 40 features 10 differ; of those found few are not among them."""
    false, found = 0, 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        source, target = (torch.randn(n, 40, generator=generator) for n in (200, 150))
        target[:, :10] += 0.6
        tests = feature_tests(source, target, alpha=0.1, progress=False)
        found += len(tests.different)
        false += sum(j >= 10 for j in tests.different)
    assert found > 20 * 9.5
    assert false / found < 0.13
    assert list(tests.statistics[list(tests.different)]) == sorted(
        tests.statistics[list(tests.different)], reverse=True
    )
    assert (tests.adjusted >= tests.p_values).all()


def test_names_of_features():
    x = np.random.default_rng(0).standard_normal((30, 2))
    assert feature_tests(x, x, feature_names=["age", "weight"]).names == ("age", "weight")
    assert feature_tests(x, x).names == ("feature 0", "feature 1")
    with pytest.raises(ValueError, match="feature_names: expected 2, one for each feature, got 1"):
        feature_tests(x, x, feature_names=["age"])


def test_blas_has_one_thread_while_the_regression_is_fitted(monkeypatch):
    """Its threads would spin while the others compute. Torch keeps its own."""
    during = []

    def minimize(*args, **kwargs):
        during.append((blas_threads(), torch.get_num_threads()))
        return real(*args, **kwargs)

    real = scipy.optimize.minimize
    monkeypatch.setattr(scipy.optimize, "minimize", minimize)
    with threadpool_limits(2):
        before = blas_threads(), torch.get_num_threads()
        fit_logistic(torch.randn(30, 2).double(), torch.arange(30) % 2, 2)
        assert (blas_threads(), torch.get_num_threads()) == before
    assert set(before[0]) == {2}  # both numpy's and scipy's, where each brings one
    assert during == [([1] * len(before[0]), before[1])]


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


@pytest.mark.parametrize(
    "missing, module, functions",
    [
        ("scipy", "scipy.stats", (feature_tests, proxy_a_distance)),
        ("threadpoolctl", "threadpoolctl", (proxy_a_distance,)),
    ],
)
def test_without_an_extra_one_sentence_says_what_to_do(monkeypatch, missing, module, functions):
    monkeypatch.setitem(sys.modules, module, None)
    for function in functions:
        with pytest.raises(ModuleNotFoundError, match=rf"needs {missing}, .*: pip install 'fastda-kernels\[shift\]'"):
            function(np.ones((9, 2)), np.ones((9, 2)))
