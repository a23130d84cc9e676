"""How far apart two samples of features are: the proxy A-distance, and CORAL's distance with a test."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..accumulate import CovarianceAccumulator
from ..reference import checks
from .kernel_forms import quadratic_forms
from .label_shift import normal_quantile
from .logistic import balanced, fit_logistic, folds_of
from .mmd import assignments, permutation_p_value
from .samples import as_pair, require_scipy


@dataclass(frozen=True)
class ProxyADistance:
    """How well a classifier tells the domains of samples that it has not seen.

    Attributes:
        distance: 2(1 − 2ε), from 0 (no better than chance) to 2 (always right).
        low, high: its 95 % interval.
        error: ε, the mean of the error on source and on target samples.
        auc: area under the ROC curve: the probability that a target sample looks more like the target than a source
            sample does.
        p_value: of the Mann-Whitney test that it is ½.
    """

    distance: float
    low: float
    high: float
    error: float
    auc: float
    p_value: float


def proxy_a_distance(source, target, *, seed: int = 0) -> ProxyADistance:
    r"""Proxy A-distance: how well a linear classifier tells two domains apart.

    .. math:: \hat d_A = 2 (1 - 2 \epsilon)

    with ε the balanced error, on held-out samples, of logistic regression that was trained to tell source from target.
    It stands for the divergence in the bound on the target's error

    .. math:: \epsilon_T(h) \le \epsilon_S(h) + \tfrac12 d_{H \Delta H}(S, T) + \lambda_{ideal}

    where λ_ideal is the least sum of both domains' errors that one hypothesis can have. DANN makes the middle term
    small; no method that looks at the inputs alone can change λ_ideal. The classifier is linear, so that differences
    which leave the mean of all features as it was are invisible to it: :func:`fastda.shift.mmd` sees these.

    The distance is 0 where ε is above ½, which happens by chance.

    Args:
        source, target: (Ns, D), (Nt, D), at least 4 samples each; tensors or arrays. Half of each trains, half is
            held out; features are standardised.
        seed: of the division into halves.

    Returns:
        A :class:`ProxyADistance`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: too few samples, other feature counts, NaN or Inf.
        ModuleNotFoundError: scipy or threadpoolctl is missing: `pip install 'fastda-kernels[shift]'`.

    Source: Ben-David, Blitzer, Crammer, Kulesza, Pereira & Vaughan, A theory of learning from different domains,
    Machine Learning 79, 2010; the proxy: Ben-David, Blitzer, Crammer & Pereira, Analysis of representations for domain
    adaptation, NIPS 2006.

    Example:
        >>> import torch
        >>> from fastda.shift import proxy_a_distance
        >>> found = proxy_a_distance(torch.randn(400, 5), torch.randn(300, 5) + 3)
        >>> found.distance > 1.9, found.p_value < 0.001
        (True, True)
    """
    source, target = as_pair(source, target, least=4)
    random = np.random.default_rng(checks.whole_number("seed", seed, 0))
    features = torch.cat([source, target])
    domains = torch.cat([torch.zeros(len(source)), torch.ones(len(target))]).long().to(features.device)
    held_out = torch.from_numpy(folds_of(domains.cpu().numpy(), random, folds=2) == 1).to(features.device)
    train = domains[~held_out]
    classifier = fit_logistic(features[~held_out], train, 2, balanced(train, 2))
    logits = classifier.logits(features[held_out])
    scores, truth = (logits[:, 1] - logits[:, 0]).cpu(), domains[held_out].cpu()
    return from_scores(scores[truth == 0], scores[truth == 1])


def from_scores(source: Tensor, target: Tensor) -> ProxyADistance:
    """From the scores of held-out samples; above 0 says target. A score of 0 is half an error."""
    mannwhitneyu = require_scipy("proxy_a_distance", "stats").mannwhitneyu
    errors = [(source > 0).double() + 0.5 * (source == 0), (target < 0).double() + 0.5 * (target == 0)]
    error = sum(e.mean().item() for e in errors) / 2
    # of each error as Agresti and Caffo do: two samples more, one of them wrong
    shares = [(e.sum().item() + 1) / (len(e) + 2) for e in errors]
    noise = 0.5 * math.sqrt(sum(share * (1 - share) / (len(e) + 2) for share, e in zip(shares, errors)))
    half = 4 * normal_quantile(0.95) * noise
    centre, distance = 2 * (1 - sum(shares)), max(2 * (1 - 2 * error), 0.0)
    test = mannwhitneyu(target.numpy(), source.numpy(), alternative="greater", method="asymptotic")
    p_value = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)
    return ProxyADistance(
        distance=distance,
        low=min(max(centre - half, 0.0), distance),
        high=max(min(centre + half, 2.0), distance),
        error=error,
        auc=float(test.statistic) / (len(source) * len(target)),
        p_value=p_value,
    )


@dataclass(frozen=True)
class CORALDistance:
    """What CORAL sees, and a test of it.

    Attributes:
        distance: ‖Cs − Ct‖²_F / 4D², as :func:`fastda.coral_loss` gives it.
        p_value: of the test that the covariances are equal, by permutation; NaN without one.
    """

    distance: float
    p_value: float


def coral_distance(
    source, target, *, permutations: int = 0, seed: int = 0, progress: bool | None = None
) -> CORALDistance:
    r"""CORAL's distance of two samples, and whether it is more than chance.

    .. math:: \frac{1}{4 D^2} \| C_s - C_t \|_F^2

    The test takes no covariance of any permutation: ‖Cs − Ct‖² is the squared MMD, with the kernel (x·y)², of the two
    samples, each centred on its own mean, and all permutations take one pass over that kernel matrix. It is exact up to
    the means, which are estimated.

    Args:
        source, target: (Ns, D), (Nt, D), tensors or arrays. It depends on the features' scale, by its fourth power.
        permutations: 0 for no test.
        seed: of the permutations.
        progress: a progress bar (tqdm): True, False, or None for one where tqdm is installed and the terminal shows it.

    Returns:
        A :class:`CORALDistance`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: fewer than 2 samples, other feature counts, NaN or Inf.

    Source: Sun & Saenko, Deep CORAL, ECCV workshops 2016; the test as :func:`fastda.shift.mmd`'s.

    Example:
        >>> import torch
        >>> from fastda.shift import coral_distance
        >>> coral_distance(torch.randn(300, 3), 2 * torch.randn(200, 3), permutations=199).p_value
        0.005
    """
    source, target = as_pair(source, target)
    checks.whole_number("permutations", permutations, 0)
    generator = torch.Generator().manual_seed(checks.whole_number("seed", seed, 0))
    one, other = CovarianceAccumulator().update(source), CovarianceAccumulator().update(target)
    distance = one.coral_distance(other).item()
    if permutations == 0:
        return CORALDistance(distance, math.nan)
    points = torch.cat([source - source.mean(0), target - target.mean(0)])
    points = points / points.square().mean().sqrt().clamp(min=1e-300)
    coefficients = assignments(len(source), len(target), permutations, generator).to(points.device)
    forms = quadratic_forms(points, coefficients, bandwidth=None, progress=progress, name="covariances")
    squared = forms.quadratic + coefficients.double().square().T @ forms.diagonal
    return CORALDistance(distance, permutation_p_value(squared[0].item(), squared[1:].cpu()))
