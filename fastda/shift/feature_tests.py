"""Which features differ: a test of each, and the false discovery rate of them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..progress import progress_bar
from ..reference import checks
from .samples import as_pair, require_scipy


@dataclass(frozen=True, eq=False)
class FeatureTests:
    """A test of each feature. Arrays are (D,).

    Attributes:
        names: of the features.
        statistics: the largest distance of the two distribution functions, 0 to 1.
        p_values: of each feature by itself.
        adjusted: the least false discovery rate at which it counts as different.
        different: indices of those that do at the rate asked for, largest statistic first.
    """

    names: tuple[str, ...]
    statistics: np.ndarray
    p_values: np.ndarray
    adjusted: np.ndarray
    different: tuple[int, ...]


def feature_tests(
    source,
    target,
    *,
    feature_names: Sequence[str] | None = None,
    alpha: float = 0.05,
    progress: bool | None = None,
) -> FeatureTests:
    r"""Two-sample Kolmogorov-Smirnov tests of each feature, adjusted by Benjamini and Hochberg.

    .. math:: D_j = \sup_x |F_{S, j}(x) - F_{T, j}(x)|

    Of the features in `different`, a share of at most `alpha` is expected to be there by chance, where features are
    independent or positively dependent; where no feature differs, the chance that there is any is at most `alpha`.
    Equal values (ties) make the tests conservative.

    Args:
        source, target: (Ns, D), (Nt, D), tensors or arrays.
        feature_names: D strings; by default "feature 0", "feature 1", …
        alpha: the false discovery rate.
        progress: a progress bar (tqdm): True, False, or None for one where tqdm is installed and the terminal shows it.

    Returns:
        A :class:`FeatureTests`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: fewer than 2 samples, other feature counts, NaN or Inf; names that do not fit.
        ModuleNotFoundError: scipy is missing: `pip install 'fastda-kernels[shift]'`.

    Source: Smirnov, Table for estimating the goodness of fit of empirical distributions, Annals of Mathematical
    Statistics 19, 1948; Benjamini & Hochberg, Controlling the false discovery rate, JRSS B 57, 1995.

    Example:
        >>> import torch
        >>> from fastda.shift import feature_tests
        >>> source, target = torch.randn(300, 4), torch.randn(200, 4)
        >>> target[:, 2] += 1
        >>> feature_tests(source, target, alpha=1e-6).different
        (2,)
    """
    stats = require_scipy("feature_tests", "stats")
    source, target = (x.cpu().numpy() for x in as_pair(source, target))
    checks.number("alpha", alpha, above=0, most=1)
    names = feature_labels(feature_names, source.shape[1])
    statistics, p_values = np.zeros(len(names)), np.ones(len(names))
    with progress_bar(progress, total=len(names), unit="feature", desc="features") as bar:
        for j in range(len(names)):
            test = stats.ks_2samp(source[:, j], target[:, j], method="asymp")
            statistics[j], p_values[j] = test.statistic, test.pvalue
            bar.update()
    adjusted = stats.false_discovery_control(p_values.clip(0, 1))
    different = [j for j in np.argsort(-statistics, kind="stable").tolist() if adjusted[j] <= alpha]
    return FeatureTests(names, statistics, p_values, adjusted, tuple(different))


def feature_labels(names: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(f"feature {j}" for j in range(count))
    if len(names) != count:
        raise ValueError(f"feature_names: expected {count}, one for each feature, got {len(names)}; pass as many")
    return tuple(map(str, names))
