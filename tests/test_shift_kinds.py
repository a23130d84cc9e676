"""Shifts of known kind, made from real digits, are told apart; without a shift there is hardly an alarm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastda.shift import diagnose, known_shifts
from fastda.shift.kinds import bonferroni
from fastda.shift.known_shifts import KNOWN_SHIFTS, make
from fastda.shift.report import Test
from fastda.shift.reweighting import concept_drift, density_ratio, label_residual, weighted_residual

pytestmark = pytest.mark.usefixtures("one_thread")

# What cannot be seen without target labels: what the labels mean, and how frequent they are behind other inputs.
WITHOUT_LABELS = {
    "concept: relabelled": (),
    "covariate and label: noise, three rare": ("covariate",),
    "covariate and label: phone, three rare": ("covariate",),
    "label and concept": ("label",),
    "covariate and concept: thick pens": ("covariate",),
}


# Of these another of the same kind is in the quick run.
ALIKE = (
    "covariate: phone",
    "covariate: selected by ink",
    "label: one rare class",
    "covariate and label: noise, three rare",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in KNOWN_SHIFTS]
)
def test_known_shifts_are_told_apart(name):
    """bench/results/shift/digits.md has many repeats."""
    known = make(name, seed=1)
    report = diagnose(known.source, known.target, known.source_labels, known.target_labels, seed=1, progress=False)
    assert report.kinds == known.kinds
    unsettled = report.concept.unsettled != ""
    assert unsettled == ("phone" in name or "noise" in name), "no weights make digits look like blurred or noisy ones"
    assert unsettled == any("concept drift can neither be seen nor excluded" in text for text in report.warnings)


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN_SHIFTS)
def test_what_can_be_told_without_target_labels(name):
    known = make(name, seed=1)
    report = diagnose(known.source, known.target, known.source_labels, seed=1, progress=False)
    assert report.kinds == WITHOUT_LABELS.get(name, known.kinds)


def test_the_digits_of_a_known_shift_are_in_one_domain_each():
    known = make("label: three rare classes", 0)
    assert not set(map(bytes, known.source)) & set(map(bytes, known.target))
    assert np.bincount(known.source_labels).tolist() == [79] * 10
    assert np.bincount(known.target_labels)[list(known_shifts.SEVERAL)].max() < 20


def test_no_shift_raises_few_alarms():
    """At the 5 % level in all, whatever the number of tests: of 20 data sets 1, more than 4 once in 400 times."""
    alarms, generator = 0, torch.Generator().manual_seed(0)
    for seed in range(20):
        labels = torch.randint(0, 3, (160,), generator=generator)
        x = torch.randn(160, 4, generator=generator) + torch.eye(4)[labels] * 3
        report = diagnose(x[:90], x[90:], labels[:90], labels[90:], permutations=199, seed=seed, progress=False)
        assert report.recommendation.method == "none" or report.kinds
        alarms += bool(report.kinds)
    assert alarms <= 4


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
def test_no_shift_of_digits_raises_few_alarms(labelled):
    alarms = 0
    for seed in range(100):
        known = make("none", seed)
        labels = known.target_labels if labelled else None
        alarms += bool(
            diagnose(known.source, known.target, known.source_labels, labels, seed=seed, progress=False).kinds
        )
    assert alarms <= 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["label: one rare class", "label: three rare classes"])
def test_label_shift_of_digits_is_recognised_and_its_intervals_hold(name):
    recognised, inside = 0, np.zeros(10)
    for seed in range(100):
        known = make(name, seed)
        report = diagnose(known.source, known.target, known.source_labels, seed=seed, progress=False)
        recognised += "label" in report.kinds
        shift = report.label_shift
        inside += (shift.low <= known.target_frequencies) & (known.target_frequencies <= shift.high)
    assert recognised >= 95
    assert (inside >= 90).all(), inside


def test_the_weights_of_a_label_shift_are_those_that_were_drawn():
    known = make("label: three rare classes", 0)
    report = diagnose(known.source, known.target, known.source_labels, progress=False)
    assert set(known_shifts.SEVERAL) <= set(report.label_shift.changed)
    assert (report.label_shift.weights[list(known_shifts.SEVERAL)] < 0.35).all()
    assert report.recommendation.method == "reweight"
    assert all(str(digit) in report.summary for digit in known_shifts.SEVERAL)


def test_counted_labels_stand_for_predictions():
    known = make("label: one rare class", 0)
    report = diagnose(known.source, known.target, known.source_labels, known.target_labels, progress=False)
    expected = np.bincount(known.target_labels, minlength=10) / len(known.target_labels)
    np.testing.assert_allclose(report.label_shift.target_frequencies, expected)


def test_a_few_target_labels_are_enough_to_see_concept_drift():
    known = make("concept: relabelled", 0)
    labels = np.where(np.random.default_rng(0).random(len(known.target_labels)) < 0.6, known.target_labels, -1)
    report = diagnose(known.source, known.target, known.source_labels, labels, progress=False)
    assert report.kinds == ("concept",)
    assert report.num_labelled == (labels >= 0).sum() and report.num_unlabelled == (labels < 0).sum()


def test_ones_own_classifier_takes_the_place_of_logistic_regression():
    """Of a classifier that always says the same, no label shift can be learnt."""
    known = make("label: three rare classes", 0)
    right = np.eye(10)[known.source_labels], np.eye(10)[known.target_labels]
    options = {"source_probabilities": right[0], "target_probabilities": right[1], "progress": False}
    report = diagnose(known.source, known.target, known.source_labels, **options)
    assert report.kinds == ("label",) and report.confidence.source_accuracy == 1
    uniform = [np.full_like(p, 0.1) for p in right]
    options |= {"source_probabilities": uniform[0], "target_probabilities": uniform[1]}
    report = diagnose(known.source, known.target, known.source_labels, **options)
    assert report.kinds == ("covariate",)
    assert any("hardly tells some classes apart" in text for text in report.warnings)


def test_without_labels_there_is_covariate_shift_or_none():
    known = make("covariate: noise", 0)
    report = diagnose(known.source, known.target, progress=False)
    assert report.kinds == ("covariate",) and report.label_shift is None and report.confidence is None
    assert any("without source labels" in text for text in report.warnings)
    assert diagnose(known.source[:300], known.source[300:], progress=False).kinds == ()


def test_a_warning_where_coral_is_blind():
    """Gaussian against two points a feature, with its mean and variance."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(600, 3, generator=generator) for _ in range(2))
    report = diagnose(source, target.sign(), progress=False)
    assert report.kinds == ("covariate",) and report.coral_is_blind
    assert any("in higher moments" in text and "CORAL cannot see this shift" in text for text in report.warnings)
    assert report.recommendation.method == "dann"
    report = diagnose(source, target + 0.5, progress=False)
    assert any("only with mean_weight above 0" in text for text in report.warnings)
    assert not any("CORAL" in text for text in diagnose(source, target * 1.5, progress=False).warnings)


def test_new_classes_in_the_target_are_named():
    known = make("none", 0)
    labels = known.target_labels.copy()
    labels[labels == 3] = 17
    report = diagnose(known.source, known.target, known.source_labels, labels, progress=False)
    assert any("a class that the source has not: 17" in text for text in report.warnings)
    assert report.concept.target_error > 0.09


def test_of_large_samples_a_part_is_looked_at():
    x = torch.randn(400, 3)
    report = diagnose(x[:250], x[250:], max_samples=100, progress=False)
    assert (report.num_source, report.num_target) == (250, 150)
    assert sum("a random 100 are looked at" in text for text in report.warnings) == 2
    assert len(report.mmd.null) == 200


def test_same_seed_same_report():
    known = make("covariate: thick pens", 0)
    some = slice(150)
    arguments = known.source[some], known.target[some], known.source_labels[some], known.target_labels[some]
    one, again = (diagnose(*arguments, seed=5, progress=False).to_json() for _ in range(2))
    assert one == again


def test_constant_features_and_duplicates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (200, 3), generator=generator).float()
    x[:, 2] = 5
    assert diagnose(x[:100], x[100:], progress=False).kinds == ()
    assert diagnose(torch.ones(30, 2), torch.ones(40, 2), progress=False).kinds == ()
    assert diagnose(torch.ones(30, 2), 2 * torch.ones(40, 2), progress=False).kinds == ("covariate",)


def test_more_features_than_samples():
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(30, 200, generator=generator) for _ in range(2))
    labels = ["a", "b"] * 15
    assert diagnose(source, target, labels, progress=False).kinds == ()
    assert diagnose(source, target + 1, labels, progress=False).kinds == ("covariate",)


def test_the_residual_of_label_shift_keeps_its_level_with_a_poor_classifier():
    """Predictions that are right in 60 % make the estimated frequencies noisy, which the test has to know."""
    random, generator, rejected = np.random.default_rng(0), torch.Generator().manual_seed(0), 0
    for _ in range(40):
        labels, target_labels = random.integers(0, 3, 200), random.choice(3, 120, p=[0.7, 0.2, 0.1])
        source, target = (
            torch.randn(len(y), 3, generator=generator) + 2 * torch.eye(3)[torch.from_numpy(y)]
            for y in (labels, target_labels)
        )
        predicted = [
            np.eye(3)[np.where(random.random(len(y)) < 0.4, random.integers(0, 3, len(y)), y)]
            for y in (labels, target_labels)
        ]
        left = label_residual(source, target, labels, *predicted, 3.0, 199, random, False)
        rejected += left.p_value <= 0.05
    assert rejected <= 5


def test_density_ratios_are_those_of_two_gaussians():
    """log p_T/p_S of N(1, 1) against N(0, 1) is x − ½."""
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(4000, 1, generator=generator), torch.randn(4000, 1, generator=generator) + 1
    random = np.random.default_rng(0)
    weights = density_ratio(source.double(), target.double(), np.ones(4000), random)
    x = source[:, 0].numpy()
    inner = np.abs(x) < 1.5
    np.testing.assert_allclose(np.log(weights)[inner], x[inner] - 0.5, atol=0.35)
    assert weights.mean() == pytest.approx(1)
    assert weighted_residual(source, target, weights, 1.5, 199, random, False).p_value > 0.05
    assert weighted_residual(source, target, np.ones(4000), 1.5, 199, random, False).p_value == 0.005


def test_the_unexplained_error_is_none_under_covariate_shift():
    """A classifier that errs where x > 0: a target with more such x has more errors, and weights explain them."""
    random, rejected = np.random.default_rng(0), 0
    for _ in range(200):
        x, z = random.standard_normal(300), random.standard_normal(200) + 0.7
        wrong = [random.random(len(v)) < np.where(v > 0, 0.4, 0.1) for v in (x, z)]
        rejected += concept_drift(*wrong, np.exp(0.7 * x)).p_value <= 0.05
    assert rejected <= 18
    drifted = concept_drift(wrong[0], random.random(200) < 0.6, np.exp(0.7 * x))
    assert drifted.p_value < 1e-3 and drifted.low > 0


def test_too_few_effective_samples_settle_nothing():
    weights = np.ones(300)
    weights[0] = 1e4
    found = concept_drift(np.zeros(300, bool), np.ones(100, bool), weights)
    assert np.isnan(found.p_value) and "leave 1 of 300 samples" in found.unsettled


def test_bonferroni():
    adjusted = bonferroni([Test(str(p), "", 0.0, p) for p in (0.01, 0.02, 0.5)], 0.05)
    assert [test.adjusted for test in adjusted] == pytest.approx([0.03, 0.06, 1.0])
    assert [test.rejected for test in adjusted] == [True, False, False]


X = np.random.default_rng(0).standard_normal((40, 2))
Y = [0, 1] * 20
P = np.full((40, 2), 0.5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((X[:19], X), {}, "source: expected at least 20 samples, got 19; collect more"),
        ((X, X[:, :1]), {}, "target: expected as many features as source, 2, got 1"),
        ((X, X, Y[:-1]), {}, r"source_labels: expected 40 labels, one for each sample, got shape \(39,\)"),
        ((X, X, [0] * 40), {}, "source_labels: expected at least 2 classes, got 1"),
        ((X, X, [0] * 39 + [1]), {}, "source_labels: expected at least 2 samples of each class, got fewer of 1"),
        ((X, X, [None, *Y[1:]]), {}, "source_labels: expected a label of each sample, got 1 unknown"),
        ((X, X, None, Y), {}, "source_labels: expected labels, since target_labels is given, got None"),
        ((X, X, Y), {"source_probabilities": P}, "target_probabilities: expected the same classifier's for both"),
        ((X, X, Y), {"permutations": 99}, "permutations: expected at least 199, got 99"),
        ((X, X), {"alpha": 0}, "alpha: expected a number > 0 and <= 0.5, got 0"),
        ((X, X), {"feature_names": ["a"]}, "feature_names: expected 2, one for each feature, got 1"),
        ((np.full((30, 2), np.inf), X), {}, "source: expected finite numbers, got 60 NaN or Inf"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose(*arguments, **options)
