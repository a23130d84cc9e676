"""Source samples weighted to look like the target: does that explain the shift, and the error?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .kernel_forms import quadratic_forms
from .label_shift import as_frequencies, confusion_matrix, normal_quantile
from .logistic import FOLDS, Logistic, fit_logistic, folds_of
from .mmd import permutation_p_value

LEAST_EFFECTIVE_SAMPLES = 30
LARGEST_ODDS = 19.0
"""Of a sample to be the target's, 95 %: above, a few samples would stand for all (Crump et al., Biometrika 2009)."""


@dataclass(frozen=True)
class Residual:
    """What is left of the difference after reweighting.

    Attributes:
        squared: MMD² of the weighted source and the target, less what chance gives.
        p_value: of the test that nothing is left.
    """

    squared: float
    p_value: float


def label_residual(
    source: Tensor,
    target: Tensor,
    labels: np.ndarray,
    source_predictions: np.ndarray,
    target_predictions: np.ndarray,
    bandwidth: float,
    permutations: int,
    random: np.random.Generator,
    progress: bool | None,
) -> Residual:
    r"""Whether p(x | y) is the same in both domains: the squared MMD of Σ_j q_j p_S(x | y = j) and p_T(x).

    q is the black-box estimate of the target's class frequencies from the predictions, which may be the labels
    themselves, one-hot, where they are known. The null distribution is by a multiplier bootstrap: each sample's
    contribution to Σ_j q̂_j μ̂_j − μ̂_T has a random sign, its contribution to q̂ included, so that the noise of the
    estimated frequencies is accounted for, within what frequencies can be. Each draw is one vector of coefficients in
    the kernel's feature map, and all draws take one pass over the kernel.

    Source: the bootstrap of degenerate statistics: Arcones & Giné, On the bootstrap of U and V statistics, Annals of
    Statistics 20, 1992; Chwialkowski, Sejdinovic & Gretton, A wild bootstrap for degenerate kernel tests, NIPS 2014.
    """
    counts = np.bincount(labels, minlength=source_predictions.shape[1])
    confusion = confusion_matrix(labels, source_predictions, len(counts))
    inverse = np.linalg.pinv(confusion, rcond=1e-6)
    mean = target_predictions.mean(0)
    raw = inverse @ mean
    q = as_frequencies(raw)
    own = (q / counts)[labels]  # a_i, a source sample's share
    n_target = len(target)

    signs_s = random.choice([-1.0, 1.0], size=(len(source), permutations))
    signs_t = random.choice([-1.0, 1.0], size=(n_target, permutations))
    one_hot = np.eye(len(counts))[labels]
    weighted = own[:, None] * signs_s
    class_sums = one_hot.T @ weighted  # (C, P)
    noise_t = (target_predictions - mean).T @ signs_t / n_target
    noise_s = (source_predictions - confusion.T[labels]).T @ weighted
    delta = as_frequencies(raw[:, None] + inverse @ (noise_t - noise_s)) - q[:, None]
    drawn_s = weighted + ((delta - class_sums) / counts[:, None])[labels]
    drawn_t = -(signs_t - signs_t.mean(0)) / n_target
    coefficients = np.concatenate(
        [
            np.concatenate([own[:, None], drawn_s], 1),
            np.concatenate([np.full((n_target, 1), -1 / n_target), drawn_t], 1),
        ]
    )
    return _test(source, target, coefficients, bandwidth, progress, "label shift")


def weighted_residual(
    source: Tensor,
    target: Tensor,
    weights: np.ndarray,
    bandwidth: float,
    permutations: int,
    random: np.random.Generator,
    progress: bool | None,
) -> Residual:
    """Whether the source with these weights is like the target: as `label_residual`, the weights taken as they are."""
    own = weights / weights.sum()
    n_target = len(target)
    signs_s = random.choice([-1.0, 1.0], size=(len(source), permutations))
    signs_t = random.choice([-1.0, 1.0], size=(n_target, permutations))
    drawn_s = own[:, None] * (signs_s - own @ signs_s)
    drawn_t = -(signs_t - signs_t.mean(0)) / n_target
    coefficients = np.concatenate(
        [
            np.concatenate([own[:, None], drawn_s], 1),
            np.concatenate([np.full((n_target, 1), -1 / n_target), drawn_t], 1),
        ]
    )
    return _test(source, target, coefficients, bandwidth, progress, "reweighting")


def _test(source, target, coefficients: np.ndarray, bandwidth: float, progress, name: str) -> Residual:
    points = torch.cat([source, target])
    coefficients = torch.from_numpy(coefficients).to(points.device)
    forms = quadratic_forms(
        points - points.mean(0), coefficients.float(), bandwidth=bandwidth, progress=progress, name=name
    )
    squared = (forms.quadratic + coefficients.square().T @ forms.diagonal).cpu()
    observed, null = squared[0].item(), squared[1:]
    return Residual(observed - null.mean().item(), permutation_p_value(observed, null))


def density_ratio(
    source: Tensor, target: Tensor, source_weights: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """p_T(x) / p_S(x) at each source sample, where p_S has the given weights; of mean 1 under them.

    The odds of a domain classifier that has not seen the sample. It is linear in the features and their squares.
    """
    features = torch.cat([source, target]).clamp(-3, 3)  # standardised: one pixel far out must not decide alone
    features = torch.cat([features, features.square()], 1)
    domains = np.concatenate([np.zeros(len(source), dtype=np.int64), np.ones(len(target), dtype=np.int64)])
    fold = folds_of(domains, random)
    labels = torch.from_numpy(domains).to(features.device)
    weights = torch.cat([torch.from_numpy(source_weights), torch.ones(len(target))]).to(features.device)
    scores = torch.empty(len(features), 1, dtype=torch.float64, device=features.device)
    for k in range(FOLDS):
        train, own = (torch.from_numpy(x).to(features.device) for x in (fold != k, fold == k))
        classifier = fit_logistic(features[train], labels[train], 2, domain_importance(labels[train], weights[train]))
        scores[own] = log_odds(classifier, features[own])
    # Trained on few samples it is too sure of itself: its own scores, held out, are calibrated (Platt scaling).
    calibrated = log_odds(fit_logistic(scores, labels, 2, domain_importance(labels, weights)), scores)
    ratio = calibrated[: len(source), 0].exp().clamp(max=LARGEST_ODDS).cpu().numpy()
    return ratio / np.average(ratio, weights=source_weights)


def domain_importance(labels: Tensor, weights: Tensor) -> Tensor:
    """The weights, scaled so that both domains count the same."""
    totals = torch.stack([weights[labels == domain].sum() for domain in range(2)])
    return weights / totals[labels]


def log_odds(classifier: Logistic, features: Tensor) -> Tensor:
    """Of the second of two classes, (N, 1)."""
    logits = classifier.logits(features)
    return logits[:, 1:] - logits[:, :1]


@dataclass(frozen=True)
class ConceptDrift:
    """The error on the target that reweighting the source does not explain. Shares from 0 to 1.

    Attributes:
        source_error: of the classifier on source samples that it was not trained on.
        target_error: on the labelled target samples.
        reweighted_error: on source samples weighted to have the target's inputs or class frequencies.
        excess: target error − reweighted error.
        low, high: its 95 % interval.
        p_value: of the one-sided test that it is 0; NaN where reweighting cannot make the source look like the target,
            so that nothing is known.
        effective_samples: (Σw)² / Σw² of the weights: as many source samples as they are worth.
        unsettled: why there is no p-value; empty where there is one.
    """

    source_error: float
    target_error: float
    reweighted_error: float
    excess: float
    low: float
    high: float
    p_value: float
    effective_samples: float
    unsettled: str


def concept_drift(
    source_wrong: np.ndarray, target_wrong: np.ndarray, weights: np.ndarray, unsettled: str = ""
) -> ConceptDrift:
    r"""Compare errors: (Ns,) and (Nt,) bool, and the source's weights.

    .. math:: excess = \epsilon_T - \frac{\sum_i w_i e_i}{\sum_i w_i}

    Under covariate shift with w = p_T(x)/p_S(x), and under label shift with w = p_T(y)/p_S(y), it is 0 whatever the
    classifier: what is left is a change of p(y | x). Its noise is taken with the effective number of samples, and two
    samples more in each domain, one of them wrong, as Agresti and Caffo do.
    """
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    reweighted = float(np.average(source_wrong, weights=weights))
    target_error = float(target_wrong.mean())
    shares = [(reweighted * effective + 1) / (effective + 2), (target_wrong.sum() + 1) / (len(target_wrong) + 2)]
    noise = math.sqrt(sum(s * (1 - s) / (n + 2) for s, n in zip(shares, (effective, len(target_wrong)))))
    centre, half = shares[1] - shares[0], normal_quantile(0.95) * noise
    if not unsettled and effective < LEAST_EFFECTIVE_SAMPLES:
        unsettled = (
            f"the weights that make the source look like the target leave {effective:.0f} of "
            f"{len(source_wrong)} samples"
        )
    return ConceptDrift(
        source_error=float(source_wrong.mean()),
        target_error=target_error,
        reweighted_error=reweighted,
        excess=target_error - reweighted,
        low=min(centre - half, target_error - reweighted),
        high=max(centre + half, target_error - reweighted),
        p_value=math.nan if unsettled else 0.5 * math.erfc(centre / noise / math.sqrt(2)),
        effective_samples=effective,
        unsettled=unsettled,
    )
