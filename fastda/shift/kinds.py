"""Which kind of shift: the tests, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ..data_files.labels import UNKNOWN
from ..reference import checks
from .distances import CORALDistance, coral_distance, proxy_a_distance
from .feature_tests import feature_labels, feature_tests
from .label_shift import LabelShift, class_names, from_predictions, same_frequencies, wilson_interval
from .logistic import cross_fitted
from .mmd import MMD, mmd
from .report import Confidence, ShiftReport, Test
from .reweighting import ConceptDrift, concept_drift, density_ratio, label_residual, weighted_residual
from .samples import LEAST_SAMPLES, as_label_list, as_pair, as_probabilities, standardised

EXPLAINED = 0.5
"""Where more than frequencies differ, label shift is named too if class weights remove this share of MMD²."""

LEAST_PERMUTATIONS = 199
LARGEST_CONDITION = 1e3  # of a confusion matrix that tells the classes apart


@dataclass(frozen=True)
class Data:
    """Both samples, standardised, and what is known of them. Labels are positions in `classes`.

    Attributes:
        source, target: (Ns, D), (Nt, D).
        classes: names; empty without source labels.
        source_labels: (Ns,), or None.
        target_labels: (Nt,), UNKNOWN where unknown, len(classes) for a class that the source does not have; or None.
        source_probabilities, target_probabilities: (Ns, C), (Nt, C), or None without source labels.
    """

    source: Tensor
    target: Tensor
    classes: tuple = ()
    source_labels: np.ndarray | None = None
    target_labels: np.ndarray | None = None
    source_probabilities: np.ndarray | None = None
    target_probabilities: np.ndarray | None = None

    @property
    def known(self) -> np.ndarray:
        """Which target samples have labels, (Nt,) bool."""
        if self.target_labels is None:
            return np.zeros(len(self.target), dtype=bool)
        return self.target_labels != UNKNOWN

    @property
    def fully_labelled(self) -> bool:
        return bool(self.known.all())


def diagnose(
    source,
    target,
    source_labels=None,
    target_labels=None,
    *,
    source_probabilities=None,
    target_probabilities=None,
    classes: Sequence | None = None,
    feature_names: Sequence[str] | None = None,
    unlabelled: int | None = None,
    alpha: float = 0.05,
    permutations: int = 200,
    max_samples: int = 10_000,
    seed: int = 0,
    progress: bool | None = None,
) -> ShiftReport:
    """What kind of shift lies between two samples, how large it is, and what to do about it.

    Four tests ask whether p(x) changed: MMD, a domain classifier, each feature by itself, and how often each class is
    predicted. With target labels there is the error, and, where all are known, how often each class occurs. Together
    they raise an alarm without a shift with a probability of at most `alpha` (Bonferroni). What is found then is told
    apart:

    - **label shift**, p(y) differs and p(x | y) does not: classes are predicted with other frequencies, and the source,
      its classes weighted by the estimated ones, cannot be told from the target.
    - **covariate shift**, p(x) differs beyond that: something is left after this weighting. Label shift is named beside
      it where the weighting removes half of MMD² or, with labels of all target samples, where these say so. Without
      target labels, a large covariate shift can hide a label shift.
    - **concept drift**, p(y | x) differs: where target labels are known, more errors than on the source weighted to
      look like the target. Where no weights can make it look so, because the domains hardly overlap, covariate shift
      and concept drift cannot be told apart, and a warning says that.

    Args:
        source, target: features (Ns, D), (Nt, D), tensors or arrays: columns of a table, or what a network's layer
            gives. At least 20 samples each. Features are standardised.
        source_labels: (Ns,), integers or strings; without them label shift cannot be told.
        target_labels: (Nt,); unknown ones are negative, empty or None. Known ones should be drawn at random.
        source_probabilities: (Ns, C), class probabilities of your classifier, which must **not have been trained on
            these source samples**.
        target_probabilities: (Nt, C), of the same classifier. Without both, logistic regression on the features,
            cross-fitted, takes its place.
        classes: what the columns are; by default the sorted labels.
        feature_names: D strings.
        unlabelled: how many target samples without labels there are in all, for the recommendation.
        alpha: the probability of a false alarm, and the false discovery rate of the features.
        permutations: of each kernel test; at least 199, or they could never reject.
        max_samples: of each domain; of larger ones a random part is looked at, and a warning says so.
        seed: of all that is random.
        progress: progress bars (tqdm): True, False, or None for some where tqdm is installed and the terminal shows
            them.

    Returns:
        A :class:`ShiftReport`: print it.

    Raises:
        TypeError, ValueError: samples, labels and probabilities that do not fit together; NaN or Inf; one class only.
        ModuleNotFoundError: scipy or threadpoolctl is missing: `pip install 'fastda-kernels[shift]'`.

    Source: detection through predictions: Lipton, Wang & Smola, ICML 2018; Rabanser, Günnemann & Lipton, Failing
    loudly, NeurIPS 2019. The kinds: Moreno-Torres et al., A unifying view on dataset shift in classification, Pattern
    Recognition 45, 2012.

    Example:
        >>> import torch
        >>> from fastda.shift import diagnose
        >>> labels = torch.arange(600) % 3
        >>> source = 3 * torch.eye(3)[labels] + torch.randn(600, 3)
        >>> rare = torch.cat([torch.full((20,), 0), torch.full((290,), 1), torch.full((290,), 2)])
        >>> target = 3 * torch.eye(3)[rare] + torch.randn(600, 3)
        >>> report = diagnose(source, target, labels)
        >>> report.kinds, report.recommendation.method
        (('label',), 'reweight')
    """
    checks.number("alpha", alpha, above=0, most=0.5)
    checks.whole_number("permutations", permutations, LEAST_PERMUTATIONS)
    checks.whole_number("max_samples", max_samples, LEAST_SAMPLES)
    checks.whole_number("seed", seed, 0)
    random = np.random.default_rng(seed)
    data, warnings = prepare(
        source, target, source_labels, target_labels, source_probabilities, target_probabilities, classes,
        max_samples, random,
    )  # fmt: skip
    num_target = len(target)
    num_labelled = int(data.known.sum()) if num_target == len(data.target) else count_known(target_labels, num_target)
    names = feature_labels(feature_names, data.source.shape[1])

    distance = proxy_a_distance(data.source, data.target, seed=seed)
    kernel = mmd(data.source, data.target, permutations=permutations, seed=seed, progress=progress)
    coral = coral_distance(data.source, data.target, permutations=permutations, seed=seed, progress=progress)
    features = feature_tests(data.source, data.target, feature_names=names, alpha=alpha, progress=progress)
    tests = [
        Test("MMD", "is p(x) the same?", kernel.squared, kernel.p_value),
        Test("domain classifier", "can the domains be told apart?", distance.auc, distance.p_value),
        Test("single features", "does any feature differ?", float(features.statistics.max()), features.adjusted.min()),
    ]
    predicted, labels, confidence, concept = None, None, None, None
    if data.classes:
        predicted = from_predictions(
            data.source_labels, data.source_probabilities, data.target_probabilities, data.classes, 0.95, random
        )
        labels = counted(predicted, data.target_labels) if data.fully_labelled else predicted
        confidence = confidence_drop(data)
        largest = np.abs(labels.target_frequencies - labels.source_frequencies).max()
        tests.append(Test("predicted classes", "are they predicted as often?", float(largest), labels.p_value))
    if data.classes and data.fully_labelled:
        both, count = (data.source_labels, data.target_labels), len(data.classes) + 1
        before, after = (np.bincount(x, minlength=count) / len(x) for x in both)
        p_value = same_frequencies(*both, count, random)
        tests.append(Test("labels", "do the classes occur as often?", float(np.abs(after - before).max()), p_value))
    if data.classes and data.known.any():
        tests.append(Test("error", "is it what reweighting explains?", float("nan"), 1.0))
    tests = bonferroni(tests, alpha)

    inputs = explain(data, tests, kernel, predicted, alpha / len(tests), permutations, random, progress)
    kinds = inputs.kinds
    if data.classes and data.known.any():
        concept = drift(data, inputs)
        p_value = 1.0 if concept.unsettled else concept.p_value
        tests = bonferroni([*tests[:-1], replace(tests[-1], statistic=concept.excess, p_value=p_value)], alpha)
        if tests[-1].rejected:
            kinds = tuple(kind for kind in kinds if kind != "label" or not inputs.by_counts) + ("concept",)
        elif concept.unsettled:
            warnings.append(
                f"concept drift can neither be seen nor excluded: {concept.unsettled}; label more target samples and "
                "train on them"
            )
    warnings += blind_spots(data, kinds, tests, coral, labels, alpha, permutations, seed, progress)
    return ShiftReport(
        kinds=kinds,
        tests=tuple(tests),
        proxy_a_distance=distance,
        mmd=kernel,
        coral=coral,
        features=features,
        label_shift=labels,
        concept=concept,
        confidence=confidence,
        warnings=tuple(warnings),
        num_source=len(source),
        num_target=num_target,
        num_features=data.source.shape[1],
        num_labelled=num_labelled,
        num_unlabelled=num_target - num_labelled if unlabelled is None else unlabelled,
        alpha=alpha,
    )


def prepare(
    source,
    target,
    source_labels,
    target_labels,
    source_probabilities,
    target_probabilities,
    classes,
    max_samples,
    random,
) -> tuple[Data, list[str]]:
    """Arguments checked, large samples thinned, features standardised, predictions made where none were given."""
    source, target = as_pair(source, target, least=LEAST_SAMPLES)
    warnings = []
    given = [p is not None for p in (source_probabilities, target_probabilities)]
    if any(given) and not all(given):
        missing = "target_probabilities" if given[0] else "source_probabilities"
        raise ValueError(f"{missing}: expected the same classifier's for both domains, got None; pass both or neither")
    if source_labels is None:
        for name, value in (("target_labels", target_labels), ("source_probabilities", source_probabilities)):
            if value is not None:
                raise ValueError(f"source_labels: expected labels, since {name} is given, got None; pass them too")
    names, indices, found, probabilities = (), None, None, [None, None]
    if source_labels is not None:
        listed = as_label_list("source_labels", source_labels, len(source))
        if None in listed:
            raise ValueError(
                f"source_labels: expected a label of each sample, got {listed.count(None)} unknown; leave these "
                "samples out"
            )
        columns = None
        if all(given):
            columns = as_probabilities("source_probabilities", source_probabilities, len(source)).shape[1]
        names = class_names(listed, columns, classes)
        position = {name: index for index, name in enumerate(names)}
        indices = np.array([position[label] for label in listed])
        if all(given):
            probabilities = [
                as_probabilities("source_probabilities", source_probabilities, len(source), len(names)),
                as_probabilities("target_probabilities", target_probabilities, len(target), len(names)),
            ]
        if target_labels is not None:
            listed = as_label_list("target_labels", target_labels, len(target))
            found = np.array([UNKNOWN if label is None else position.get(label, len(names)) for label in listed])
            new = sorted({label for label in listed if label is not None and label not in position}, key=str)
            if new:
                warnings.append(
                    f"the target has {'a class' if len(new) == 1 else 'classes'} that the source has not: "
                    f"{', '.join(map(str, new[:5]))}; no method that aligns the domains can learn it, "
                    "label some samples"
                )
    parts = []
    for x, which in ((source, "source"), (target, "target")):
        if len(x) > max_samples:
            warnings.append(
                f"of {len(x)} {which} samples a random {max_samples} are looked at; max_samples=... takes more"
            )
            parts.append(np.sort(random.choice(len(x), max_samples, replace=False)))
        else:
            parts.append(np.arange(len(x)))
    source, target = standardised(source[parts[0]], target[parts[1]])
    if indices is None:
        return Data(source, target), warnings
    indices, found = indices[parts[0]], None if found is None else found[parts[1]]
    probabilities = [p if p is None else p[part] for p, part in zip(probabilities, parts)]
    if probabilities[0] is None:
        if (np.bincount(indices, minlength=len(names)) < 2).any():
            rare = [names[j] for j in np.flatnonzero(np.bincount(indices, minlength=len(names)) < 2)]
            raise ValueError(
                f"source_labels: expected at least 2 samples of each class, got fewer of "
                f"{', '.join(map(repr, rare[:5]))}; merge or drop these classes"
            )
        probabilities = cross_fitted(source, indices, target, len(names), random)
    return Data(source, target, names, indices, found, *probabilities), warnings


def count_known(target_labels, count: int) -> int:
    if target_labels is None:
        return 0
    return sum(label is not None for label in as_label_list("target_labels", target_labels, count))


def counted(predicted: LabelShift, labels: np.ndarray) -> LabelShift:
    """The target's labels in place of its predictions, unless some are of classes that the source does not have."""
    counts = np.bincount(labels, minlength=len(predicted.classes))
    if len(counts) > len(predicted.classes):
        return predicted
    low, high = wilson_interval(counts)
    shares = counts / counts.sum()
    weights = shares / predicted.source_frequencies
    return replace(predicted, target_frequencies=shares, low=low, high=high, weights=weights)


def confidence_drop(data: Data) -> Confidence:
    """How sure the classifier is, and how right it would be if its accuracy fell as its confidence does."""
    source, target = (p.max(1).mean() for p in (data.source_probabilities, data.target_probabilities))
    accuracy = (data.source_probabilities.argmax(1) == data.source_labels).mean()
    return Confidence(
        source=float(source),
        target=float(target),
        drop=float(source - target),
        source_accuracy=float(accuracy),
        expected_target_accuracy=float(np.clip(accuracy - (source - target), 0, 1)),
    )


def bonferroni(tests: list[Test], alpha: float) -> list[Test]:
    """p-values times their number: the chance that any of these tests rejects what is true is at most alpha."""
    adjusted = [min(len(tests) * test.p_value, 1.0) for test in tests]
    return [replace(test, adjusted=p, rejected=p <= alpha) for test, p in zip(tests, adjusted)]


def changes_inputs(tests: list[Test]) -> bool:
    return any(test.rejected for test in tests if test.name not in ("labels", "error"))


@dataclass(frozen=True)
class Explanation:
    """What accounts for the change of the inputs, before the error is looked at.

    Attributes:
        kinds: "covariate", "label", or both.
        weights: of the source samples, which take the change away, (Ns,).
        by_counts: label shift is there by the target's labels alone; a concept drift would change these as well.
        unsettled: why the weighted source is not like the target; empty where it is.
    """

    kinds: tuple[str, ...]
    weights: np.ndarray
    by_counts: bool = False
    unsettled: str = ""


def explain(
    data: Data,
    tests: list[Test],
    kernel: MMD,
    predicted: LabelShift | None,
    level: float,
    permutations,
    random,
    progress,
) -> Explanation:
    """Covariate shift, label shift, or both."""
    uniform = np.ones(len(data.source))
    rejected = {test.name for test in tests if test.rejected}
    if not changes_inputs(tests):
        return Explanation(("label",) if "labels" in rejected else (), uniform, by_counts=True)
    if not data.classes:
        return Explanation(("covariate",), uniform)
    options = {"bandwidth": kernel.bandwidth, "permutations": permutations, "random": random, "progress": progress}
    kinds, weights, by_counts = ("covariate",), uniform, False
    if rejected & {"labels", "predicted classes"}:
        residual = label_residual(
            data.source,
            data.target,
            data.source_labels,
            data.source_probabilities,
            data.target_probabilities,
            **options,
        )
        class_weights = predicted.weights[data.source_labels]
        if residual.p_value > level:
            return Explanation(("label",), class_weights)
        if residual.squared <= (1 - EXPLAINED) * kernel.squared:
            kinds, weights = ("covariate", "label"), class_weights
        elif "labels" in rejected:
            kinds, by_counts = ("covariate", "label"), True
    if not data.known.any():
        return Explanation(kinds, weights)
    weights = weights * density_ratio(data.source, data.target, weights, random)
    left = weighted_residual(data.source, data.target, weights, **options)
    unsettled = "" if left.p_value > level else "no weights of the source samples make them look like the target's"
    return Explanation(kinds, weights, by_counts, unsettled)


def drift(data: Data, inputs: Explanation) -> ConceptDrift:
    """Of the samples whose labels are known."""
    known = data.known
    return concept_drift(
        data.source_probabilities.argmax(1) != data.source_labels,
        data.target_probabilities[known].argmax(1) != data.target_labels[known],
        inputs.weights,
        inputs.unsettled,
    )


def blind_spots(
    data: Data, kinds, tests, coral: CORALDistance, labels: LabelShift | None, alpha, permutations, seed, progress
) -> list[str]:
    """What CORAL cannot see, and what these tests could not."""
    found = []
    if "covariate" in kinds and coral.p_value > alpha:
        centred = [x - x.mean(0) for x in (data.source, data.target)]
        beyond = mmd(*centred, permutations=permutations, seed=seed, progress=progress).p_value <= alpha
        if beyond or "domain classifier" not in {test.name for test in tests if test.rejected}:
            found.append(
                "the domains differ in higher moments, and not measurably in their covariances: CORAL cannot see this "
                "shift, DANN can"
            )
        else:
            found.append(
                "the domains differ in their means, and not measurably in their covariances: CORAL sees this shift "
                "only with mean_weight above 0"
            )
    if labels is not None and labels.condition > LARGEST_CONDITION:
        found.append(
            "the classifier hardly tells some classes apart, so that the target's frequencies are uncertain: pass the "
            "probabilities of a better one"
        )
    if kinds == ("covariate",) and data.classes and not data.known.any():
        found.append(
            "without target labels, a label shift beside the covariate shift cannot be excluded: class frequencies can "
            "be estimated only where p(x | y) is the same in both domains, and are not shown"
        )
    if "covariate" in kinds and not data.classes:
        found.append("without source labels, label shift cannot be told from covariate shift: pass them")
    return found
