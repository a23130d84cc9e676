"""Confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def interval(values: Sequence[float] | Tensor, level: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t; NaN for a single value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return values.mean().item(), math.nan
    from scipy.special import stdtrit

    quantile = float(stdtrit(len(values) - 1, 0.5 + level / 2))
    return values.mean().item(), quantile * values.std().item() / math.sqrt(len(values))
