"""Black-box estimation of class frequencies: exact where it can be, and intervals that hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from fastda.shift import estimate_label_shift
from fastda.shift.label_shift import same_frequencies

pytestmark = pytest.mark.usefixtures("one_thread")

CONFUSION = np.array([[0.8, 0.1, 0.1], [0.15, 0.7, 0.2], [0.05, 0.2, 0.7]])  # columns: the true class


def predictions(labels: np.ndarray, random: np.random.Generator, soft: bool = False) -> np.ndarray:
    """Of a classifier with that confusion; soft ones are blurred."""
    chosen = (random.random((len(labels), 1)) > CONFUSION.cumsum(0).T[labels, :2]).sum(1)
    hard = np.eye(3)[chosen]
    return 0.7 * hard + 0.3 * random.dirichlet(np.ones(3), len(labels)) if soft else hard


def test_where_counts_are_exact_so_is_the_estimate():
    """Counts in the proportions of the confusion matrix: M is it exactly, and q is what was mixed."""
    source = np.repeat([0, 1, 2], 100)
    chosen = np.concatenate([np.repeat([0, 1, 2], np.round(100 * CONFUSION[:, j]).astype(int)) for j in range(3)])
    q = np.array([0.2, 0.5, 0.3])
    target = np.repeat([0, 1, 2], np.round(1000 * CONFUSION @ q).astype(int))
    found = estimate_label_shift(source, np.eye(3)[chosen], np.eye(3)[target])
    np.testing.assert_allclose(found.target_frequencies, q, atol=1e-12)
    np.testing.assert_allclose(found.weights, 3 * q, atol=1e-12)
    np.testing.assert_allclose(found.source_frequencies, 1 / 3)
    assert ((found.low < q) & (q < found.high)).all()


def test_for_a_perfect_classifier_and_many_source_samples_it_is_wilsons():
    source, counts = np.repeat([0, 1, 2], 200_000), np.array([0, 30, 170])
    found = estimate_label_shift(source, np.eye(3)[source], np.eye(3)[np.repeat([0, 1, 2], counts)])
    low, high = zip(*(binomtest(count, 200).proportion_ci(method="wilsoncc") for count in counts.tolist()))
    np.testing.assert_allclose(found.low, low, atol=2e-4)
    np.testing.assert_allclose(found.high, high, atol=2e-4)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("q", [(0.6, 0.3, 0.1), (0.02, 0.49, 0.49)])
def test_intervals_hold(q, soft):
    """150 repeats: 142 expected for each class; fewer than 134 once in 200 times."""
    random, inside = np.random.default_rng(0), np.zeros(3)
    for _ in range(150):
        source, target = np.repeat([0, 1, 2], 60), random.choice(3, 250, p=q)
        found = estimate_label_shift(source, predictions(source, random, soft), predictions(target, random, soft))
        inside += (found.low <= q) & (q <= found.high)
    assert (inside >= 134).all(), inside


def test_the_test_of_frequencies_keeps_its_level():
    random = np.random.default_rng(0)
    p = [same_frequencies(random.integers(0, 4, 90), random.integers(0, 4, 60), 4, random) for _ in range(300)]
    assert 3 <= (np.array(p) <= 0.05).sum() <= 27
    assert same_frequencies(np.zeros(30, int), np.ones(30, int), 2, random) == 1e-4
    assert same_frequencies(np.zeros(30, int), np.zeros(20, int), 2, random) == 1.0


def test_corrected_predictions_are_those_of_the_new_frequencies():
    """Two Gaussians: the corrected posterior is Bayes' with the new prior, computed by hand."""
    random = np.random.default_rng(0)

    def sample(share: float, count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (random.random(count) < share).astype(int)
        return labels, random.standard_normal(count) + 2 * labels

    def posterior(x: np.ndarray, share: float) -> np.ndarray:
        odds = share / (1 - share) * np.exp(2 * x - 2)
        return np.stack([1 / (1 + odds), odds / (1 + odds)], 1)

    source, x = sample(0.5, 20_000)
    target, z = sample(0.1, 20_000)
    shift = estimate_label_shift(source, posterior(x, 0.5), posterior(z, 0.5))
    assert shift.target_frequencies[1] == pytest.approx(0.1, abs=0.01)
    corrected = shift.correct(posterior(z, 0.5))
    np.testing.assert_allclose(corrected, posterior(z, 0.1), atol=0.03)
    assert (corrected.argmax(1) == target).mean() > (posterior(z, 0.5).argmax(1) == target).mean() + 0.03


def test_names_of_classes():
    labels, p = ["dog", "cat"] * 20, np.tile(np.eye(2), (20, 1))
    assert estimate_label_shift(labels, p[:, ::-1], p).classes == ("cat", "dog")
    found = estimate_label_shift(labels, p, p, classes=["dog", "cat"])
    assert found.classes == ("dog", "cat") and found.changed == ()
    assert estimate_label_shift(torch.tensor([3, 5] * 20), p, p).classes == (3, 5)


def test_classes_that_cannot_be_told_apart_have_no_interval():
    """The classifier never tells class 1 from class 2."""
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 200)
    blind = np.array([[1, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]])[labels]
    found = estimate_label_shift(labels, blind, blind[random.permutation(600)[:300]])
    assert found.low[1:].tolist() == [0, 0] and found.high[1:].tolist() == [1, 1]
    assert found.high[0] - found.low[0] < 0.2
    assert found.condition > 1e6


def test_a_class_that_is_gone():
    labels = np.repeat([0, 1, 2], 50)
    found = estimate_label_shift(labels, np.eye(3)[labels], np.eye(3)[np.repeat([0, 1], 60)])
    assert found.target_frequencies[2] == 0 and found.low[2] == 0 and 0.005 < found.high[2] < 0.1
    assert found.correct(np.array([[0.0, 0.0, 1.0]])).tolist() == [[0, 0, 1]], "of probability 0, and left alone"


P = np.tile(np.eye(2), (10, 1))
LABELS = [0, 1] * 10
ONE = np.ones((20, 1))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LABELS, 3 * P, P), {}, ValueError, "source_probabilities: .* sum to 1 .*; apply a softmax to logits first"),
        ((LABELS, P, P[:, :1]), {}, ValueError, r"target_probabilities: expected shape \(20, 2\)"),
        ((LABELS, P[:-1], P), {}, ValueError, r"source_probabilities: expected shape \(20, classes\)"),
        ((LABELS, P, P), {"classes": [0, 2]}, ValueError, "classes: .* all classes of the labels, got none for 1"),
        ((LABELS, P, P), {"classes": [0, 1, 2]}, ValueError, "classes: expected a name for each of the 2 columns"),
        (([0] * 19 + [1], P, P), {}, ValueError, "source_labels: .* at least 2 samples of each class, got fewer of 1"),
        (([0] * 20, ONE, ONE), {}, ValueError, "source_labels: expected at least 2 classes, got 1"),
        (([0.5, 1] * 10, P, P), {}, TypeError, "source_labels: expected class labels, integers or strings, got 0.5"),
        (([-1, 1] * 10, P, P), {"classes": [0, 1]}, ValueError, "source_labels: .* got 10 unknown; leave these out"),
        ((LABELS, P, P), {"level": 1}, ValueError, "level: expected a number > 0 and < 1"),
        ((["a", 1] * 10, P, P), {}, TypeError, "source_labels: expected integers or strings, got both"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        estimate_label_shift(*arguments, **options)
