"""Covariance matrices, and the moments that CORAL compares."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .distributed import all_reduce_sum
from .precision import accumulate, no_autocast


def moments(name: str, x: Tensor, correction: int, process_group=None) -> tuple[Tensor, Tensor]:
    """Mean (..., D) and covariance (..., D, D) over the samples, of all processes if there is a group."""
    x = accumulate(x)
    if process_group is None:
        count = x.shape[-2]
        checks.enough_samples(name, count, correction)
        mean = x.mean(-2, keepdim=True)
        centred = x - mean
        scatter = centred.mT @ centred
    else:
        # Local counts may differ; reading the total back is the one synchronisation, and only distributed calls pay it.
        count = int(all_reduce_sum(torch.tensor(x.shape[-2], device=x.device), process_group))
        checks.enough_samples(name, count, correction)
        mean = all_reduce_sum(x.sum(-2, keepdim=True), process_group) / count
        centred = x - mean
        scatter = all_reduce_sum(centred.mT @ centred, process_group)
    return mean.squeeze(-2), scatter / (count - correction)


def covariance(x: Tensor, *, correction: int = 1) -> Tensor:
    r"""Covariance matrix of the features, for each batch.

    .. math:: C = \frac{1}{N - \text{correction}} \sum_n (x_n - \mu)(x_n - \mu)^T, \qquad \mu = \frac1N \sum_n x_n

    Args:
        x: features of shape `(..., N, D)`: N samples of D features, any leading batch dimensions. float32, float64,
            bfloat16 or float16.
        correction: 1 for the unbiased estimate, 0 for the population's.

    Returns:
        `(..., D, D)` in float64 for float64 input, else in float32; in the squared unit of the features.

    Raises:
        TypeError: `x` is not a floating tensor.
        ValueError: fewer than two dimensions, or fewer than `correction + 1` samples.

    Differentiable any number of times with respect to `x`. NaN and Inf propagate. The mean is subtracted before the
    product is taken, so that features far from zero lose no digits.

    Example:
        >>> import torch, fastda
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
        >>> fastda.covariance(x)
        tensor([[ 4., -1.],
                [-1.,  7.]])
    """
    (x,) = checks.features("(..., samples, features)", x=x)
    checks.whole_number("correction", correction, 0)
    with no_autocast(x):
        return moments("x", x, correction)[1]
