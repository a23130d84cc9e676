"""Label shift: how often each class occurs in the target, from a classifier's confusion and its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..reference import checks
from .samples import as_indices, as_label_list, as_probabilities

DRAWS = 9999  # of the permutation test


@dataclass(frozen=True, eq=False)
class LabelShift:
    """Class frequencies of source and target. Arrays have an entry for each class.

    Attributes:
        classes: their names.
        source_frequencies: shares of the source's labels.
        target_frequencies: the estimate, at least 0, of sum 1.
        low, high: of the intervals.
        level: of the intervals, 0.95 unless another was asked for.
        weights: importance weights w = target / source frequency: weighted so, the source has the target's frequencies.
        p_value: of the test that predictions have the same frequencies in both domains, by permutation.
        condition: of the confusion matrix; where it is large, the classifier cannot tell classes apart, and the
            intervals are wide.
    """

    classes: tuple
    source_frequencies: np.ndarray
    target_frequencies: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    weights: np.ndarray
    p_value: float
    condition: float

    @property
    def changed(self) -> tuple:
        """The classes whose interval leaves the source frequency out."""
        outside = (self.source_frequencies < self.low) | (self.source_frequencies > self.high)
        return tuple(name for name, out in zip(self.classes, outside) if out)

    def correct(self, probabilities) -> np.ndarray:
        r"""Probabilities of the source's classifier, as they are under the target's frequencies.

        .. math:: p_T(y | x) = \frac{w_y \, p_S(y | x)}{\sum_{y'} w_{y'} \, p_S(y' | x)}

        A class whose estimated frequency is 0 is not predicted any more.

        Args:
            probabilities: (N, C), columns in the order of `classes`.

        Source: Saerens, Latinne & Decaestecker, Adjusting the outputs of a classifier to new a priori probabilities,
        Neural Computation 14(1), 2002.
        """
        probabilities = as_probabilities("probabilities", probabilities, len(probabilities), len(self.classes))
        weighted = probabilities * self.weights
        total = weighted.sum(1, keepdims=True)
        return np.where(total > 0, weighted / np.where(total > 0, total, 1), probabilities)


def estimate_label_shift(
    source_labels,
    source_probabilities,
    target_probabilities,
    *,
    classes: Sequence | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> LabelShift:
    r"""The target's class frequencies, without one of its labels: black-box shift estimation.

    Where p(x | y) is the same in both domains, the mean prediction in the target is a mixture of the source's mean
    predictions for each class: with M the matrix whose column j is the mean prediction for source samples of class j,
    and t the mean prediction in the target,

    .. math:: M q = t, \qquad q = M^{-1} t, \qquad w_j = q_j / p_j

    The classifier may be poor and uncalibrated; it has only to tell the classes apart, and **must not have been trained
    on these source samples**, or M is too good.

    Intervals: with h_ic = (M⁻¹v_i)_c for the prediction v_i of source sample i, and s²_cj its variance over the n_j
    samples of class j, the estimate of q_c has the variance

    .. math::
        v_c(q) = \frac{q_c (1 - q_c) + \sum_j q_j s_{cj}^2}{N_t} + \sum_j \frac{q_j^2 s_{cj}^2}{n_j}

    which has the noise of the target's sample, of its predictions, and of the confusion. The interval is all q_c with

    .. math:: (|\hat q_c - q_c| - 1 / 2N_t)^2 \le z^2 v_c(q)

    the other frequencies scaled to leave q_c. For a perfect classifier it is Wilson's with continuity correction, and
    like that it holds for rare classes, where q̂ ± z·√v does not.

    Args:
        source_labels: (Ns,), integers or strings.
        source_probabilities: (Ns, C), held out.
        target_probabilities: (Nt, C), of the same classifier.
        classes: what the columns are; by default the sorted labels, or 0 … C − 1 where labels are integers below C.
        level: of the intervals.
        seed: of the test's permutations.

    Returns:
        A :class:`LabelShift`. Where predictions cannot tell classes apart (M is singular), frequencies are those of
        least norm, and the intervals of these classes go from 0 to 1.

    Raises:
        TypeError, ValueError: labels and probabilities that do not fit together; a class with fewer than 2 source
            samples.

    Source: Lipton, Wang & Smola, Detecting and correcting for label shift with black box predictors, ICML 2018; the
    intervals by the delta method, inverted as in Wilson, Probable inference, JASA 22, 1927.

    Example:
        >>> import numpy as np
        >>> from fastda.shift import estimate_label_shift
        >>> random = np.random.default_rng(0)
        >>> source, target = np.arange(1000) % 2, (np.arange(1000) < 100).astype(int)  # half and a tenth of class 1
        >>> predict = lambda labels: np.eye(2)[np.where(random.random(1000) < 0.9, labels, 1 - labels)]
        >>> shift = estimate_label_shift(source, predict(source), predict(target))
        >>> bool(shift.low[1] < 0.1 < shift.high[1]), shift.changed
        (True, (0, 1))
    """
    labels = as_label_list("source_labels", source_labels, len(source_labels))
    columns = as_probabilities("source_probabilities", source_probabilities, len(labels)).shape[1]
    classes = class_names(labels, columns, classes)
    indices = as_indices(labels, classes)
    if (indices < 0).any():
        raise ValueError(
            f"source_labels: expected a label of each sample, got {int((indices < 0).sum())} unknown; leave these out"
        )
    source = as_probabilities("source_probabilities", source_probabilities, len(labels), len(classes))
    target = as_probabilities("target_probabilities", target_probabilities, len(target_probabilities), len(classes))
    if not 0 < checks.number("level", level, above=0, most=1) < 1:
        raise ValueError("level: expected a number > 0 and < 1, got 1; 0.95 is usual")
    random = np.random.default_rng(checks.whole_number("seed", seed, 0))
    return from_predictions(indices, source, target, tuple(classes), level, random)


def class_names(labels: list, columns: int | None, classes: Sequence | None) -> tuple:
    """What the classes are, in the order of the columns."""
    present = sorted({label for label in labels if label is not None})
    if classes is None:
        integers = all(isinstance(label, int) for label in present)
        if columns is not None and len(present) != columns and integers and (not present or present[-1] < columns):
            classes = range(columns)
        else:
            classes = present
    classes = tuple(classes.tolist() if isinstance(classes, np.ndarray) else classes)
    unknown = [label for label in present if label not in set(classes)]
    if unknown:
        raise ValueError(
            f"classes: expected all classes of the labels, got none for {', '.join(map(repr, unknown[:5]))}; add them"
        )
    if columns is not None and len(classes) != columns:
        raise ValueError(
            f"classes: expected a name for each of the {columns} columns of probabilities, got {len(classes)} classes; "
            "pass classes=[...] in the order of the columns"
        )
    if len(classes) < 2:
        raise ValueError(
            f"source_labels: expected at least 2 classes, got {len(classes)}; "
            "leave labels away to compare features alone"
        )
    return classes


def from_predictions(
    labels: np.ndarray, source: np.ndarray, target: np.ndarray, classes: tuple, level: float, random
) -> LabelShift:
    """The estimate from checked arrays: labels (Ns,), predictions (Ns, C) and (Nt, C)."""
    counts = np.bincount(labels, minlength=len(classes))
    rare = [classes[j] for j in np.flatnonzero(counts < 2)]
    if rare:
        raise ValueError(
            f"source_labels: expected at least 2 samples of each class, got fewer of {', '.join(map(repr, rare[:5]))}; "
            "merge or drop these classes"
        )
    confusion = confusion_matrix(labels, source, len(classes))
    inverse = np.linalg.pinv(confusion, rcond=1e-6)
    resolved = np.abs(inverse @ confusion - np.eye(len(classes))).max(1) < 1e-3
    raw = inverse @ target.mean(0)
    scores = source @ inverse.T  # h
    # s², classes × given class. One sample more of each, predicted without preference: no error seen is not no error.
    padded = [np.concatenate([scores[labels == j], inverse.mean(1)[None]]) for j in range(len(classes))]
    variance = np.stack([own.var(0, ddof=1) for own in padded], 1)
    estimate = as_frequencies(raw)
    low, high = np.zeros(len(classes)), np.ones(len(classes))
    for c in np.flatnonzero(resolved):
        low[c], high[c] = score_interval(raw[c], c, estimate, variance[c], counts, len(target), normal_quantile(level))
    frequencies = counts / counts.sum()
    return LabelShift(
        classes=classes,
        source_frequencies=frequencies,
        target_frequencies=estimate,
        low=np.minimum(low, estimate),
        high=np.maximum(high, estimate),
        level=level,
        weights=estimate / frequencies,
        p_value=same_frequencies(source.argmax(1), target.argmax(1), len(classes), random),
        condition=float(np.linalg.cond(confusion)),
    )


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """M: column j is the mean prediction for class j."""
    return np.stack([predictions[labels == j].mean(0) for j in range(num_classes)], 1)


def as_frequencies(q: np.ndarray) -> np.ndarray:
    """Estimates of sum 1 along the first axis, those below 0 set to 0 and the others scaled."""
    positive = q.clip(0)
    positive = np.where(positive.sum(0) > 0, positive, 1.0)
    return positive / positive.sum(0)


def score_interval(
    raw: float, c: int, q: np.ndarray, variance: np.ndarray, counts: np.ndarray, num_target: int, z: float
) -> tuple[float, float]:
    """The interval of one class: a quadratic inequality in q_c, solved."""
    others = np.delete(q, c)
    others = others / others.sum() if others.sum() > 0 else np.full(len(others), 1 / len(others))
    own, rest = variance[c], np.delete(variance, c)
    own_noise, rest_noise = own / counts[c], others**2 @ (rest / np.delete(counts, c))
    # v(x) = constant + linear·x + square·x²
    constant = others @ rest / num_target + rest_noise
    linear = (1 + own - others @ rest) / num_target - 2 * rest_noise
    square = own_noise + rest_noise - 1 / num_target
    if z**2 * square >= 1:
        return 0.0, 1.0
    ends = []
    for sign in (-1, 1):
        centre = raw + sign / (2 * num_target)
        a, b, c0 = 1 - z**2 * square, -(2 * centre + z**2 * linear), centre**2 - z**2 * constant
        ends.append((-b + sign * math.sqrt(max(b**2 - 4 * a * c0, 0.0))) / (2 * a))
    return tuple(np.clip(ends, 0, 1).tolist())


def wilson_interval(counts: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's intervals of the classes' shares, with continuity correction."""
    shares, none = counts / counts.sum(), np.zeros(len(counts))
    z = normal_quantile(level)
    ends = [score_interval(q, c, shares, none, np.ones(len(counts)), counts.sum(), z) for c, q in enumerate(shares)]
    low, high = np.array(ends).T
    return np.minimum(low, shares), np.maximum(high, shares)


def normal_quantile(level: float) -> float:
    """z of a two-sided interval."""
    from statistics import NormalDist

    return NormalDist().inv_cdf(0.5 + level / 2)


def same_frequencies(source: np.ndarray, target: np.ndarray, num_classes: int, random: np.random.Generator) -> float:
    """p-value of χ² of the counts of two samples of classes, under all ways to divide them among the domains."""
    counts = np.stack([np.bincount(x, minlength=num_classes) for x in (source, target)])
    counts = counts[:, counts.sum(0) > 0]
    if counts.shape[1] < 2:
        return 1.0
    total = counts.sum(0)
    expected = total * len(target) / total.sum()

    def statistic(drawn: np.ndarray) -> np.ndarray:
        return (np.square(drawn - expected) / expected).sum(-1)

    drawn = random.multivariate_hypergeometric(total, len(target), size=DRAWS)
    return float((1 + (statistic(drawn) >= statistic(counts[1]) * (1 - 1e-9)).sum()) / (1 + DRAWS))
