"""Maximum mean discrepancy with a permutation test, for samples whose kernel matrix does not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reference import checks
from .kernel_forms import Forms, quadratic_forms
from .samples import as_pair

MEDIAN_SAMPLES = 2000  # of both domains together, whose distances give the bandwidth


@dataclass(frozen=True)
class MMD:
    """The squared discrepancy and its test.

    Attributes:
        squared: the unbiased estimate of MMD²; about 0, on either side, where the samples are of one distribution.
        p_value: by permutation; NaN without one.
        bandwidth: σ of the Gaussian kernel; 0 where all points are equal.
        permutations: how many.
        null: the estimate under each permutation, (permutations,), float64.
    """

    squared: float
    p_value: float
    bandwidth: float
    permutations: int
    null: Tensor = field(repr=False, compare=False)


def mmd(
    source,
    target,
    *,
    bandwidth: float | None = None,
    permutations: int = 200,
    seed: int = 0,
    progress: bool | None = None,
) -> MMD:
    r"""Maximum mean discrepancy between two samples, with a permutation test, in one pass.

    .. math::
        MMD^2_u = \frac{\sum_{i \ne j} k(s_i, s_j)}{m(m - 1)} + \frac{\sum_{i \ne j} k(t_i, t_j)}{n(n - 1)}
        - \frac{2}{mn} \sum_{i, j} k(s_i, t_j), \qquad k(x, y) = e^{-\|x - y\|^2 / 2 \sigma^2}

    It sees any difference of two distributions, given samples enough; most where the kernel's width fits. Each
    permutation is a vector of signs, and each tile of the kernel matrix is multiplied by all of them at once, so that
    all permutations take one pass over (m + n)²/2 kernel entries, none of which is kept. The p-value is
    (1 + number of permutations with at least this MMD²) / (1 + permutations), which is exact.

    Args:
        source, target: (m, D), (n, D), tensors or arrays. Features of different units should be standardised first.
        bandwidth: σ; by default the median distance between the points of both samples together (of at most 2000).
        permutations: P; 0 for none. Memory: (m + n)·P numbers.
        seed: of the permutations and of the points whose distances are looked at.
        progress: a progress bar (tqdm): True, False, or None for one where tqdm is installed and the terminal shows it.

    Returns:
        An :class:`MMD`.

    Raises:
        TypeError: what is no array of numbers.
        ValueError: fewer than 2 samples, other feature counts, NaN or Inf; a bandwidth that is not above 0.

    Source: Gretton, Borgwardt, Rasch, Schölkopf & Smola, A kernel two-sample test, JMLR 13, 2012.

    Example:
        >>> import torch
        >>> from fastda.shift import mmd
        >>> normal, wider = torch.randn(200, 3), 2 * torch.randn(150, 3)
        >>> mmd(normal, wider).p_value
        0.004975124378109453
    """
    source, target = as_pair(source, target)
    if bandwidth is not None:
        bandwidth = float(checks.number("bandwidth", bandwidth, above=0))
    checks.whole_number("permutations", permutations, 0)
    generator = torch.Generator().manual_seed(checks.whole_number("seed", seed, 0))
    points = torch.cat([source, target])
    points = points - points.mean(0)
    if bandwidth is None:
        bandwidth = median_distance(points, generator)
    if bandwidth == 0:
        null = torch.zeros(permutations, dtype=torch.float64)
        return MMD(0.0, 1.0 if permutations else float("nan"), 0.0, permutations, null)
    coefficients = assignments(len(source), len(target), permutations, generator).to(points.device)
    forms = quadratic_forms(points, coefficients, bandwidth=bandwidth, progress=progress, name="MMD")
    squared, *null = unbiased(forms, coefficients, len(source), len(target)).tolist()
    null = torch.tensor(null, dtype=torch.float64)
    return MMD(squared, permutation_p_value(squared, null), bandwidth, permutations, null)


def assignments(m: int, n: int, permutations: int, generator: torch.Generator) -> Tensor:
    """Columns of 1/m for a source sample and −1/n for a target sample: as they are, then permuted; (m + n, 1 + P)."""
    columns = torch.empty(1 + permutations, m + n)
    columns[:, :m], columns[:, m:] = 1 / m, -1 / n
    for column in columns[1:]:
        column.copy_(column[torch.randperm(m + n, generator=generator)])
    return columns.T.contiguous()


def unbiased(forms: Forms, coefficients: Tensor, m: int, n: int) -> Tensor:
    """MMD²_u of each assignment, float64.

    With the indicator a of source samples, c = a/m − (1 − a)/n has aᵀKa, aᵀK1 and 1ᵀK1 as combinations of what a pass
    gives of c, which lose no digits.
    """
    count, scale = m + n, m * n / (m + n)
    total, mixed = forms.row_sums.sum(), forms.row_sums @ coefficients.double()
    source_all = scale * mixed + m / count * total  # aᵀK1
    source_source = scale**2 * forms.quadratic + 2 * scale * m / count * mixed + (m / count) ** 2 * total
    target_target = total - 2 * source_all + source_source
    source_target = source_all - source_source
    return (source_source / (m * (m - 1)) + target_target / (n * (n - 1)) - 2 * source_target / (m * n)).cpu()


def permutation_p_value(observed: float, null: Tensor) -> float:
    """Ties within rounding count against a difference."""
    if len(null) == 0:
        return float("nan")
    slack = 1e-6 * max(abs(observed), 1e-12)
    return (1 + int((null >= observed - slack).sum())) / (1 + len(null))


def median_distance(points: Tensor, generator: torch.Generator) -> float:
    """The median of the distances that are not 0; 0 where there are none."""
    if len(points) > MEDIAN_SAMPLES:
        points = points[torch.randperm(len(points), generator=generator)[:MEDIAN_SAMPLES].to(points.device)]
    distances = torch.pdist(points)
    distances = distances[distances > 1e-12 * points.abs().max()]
    return distances.median().item() if len(distances) else 0.0
