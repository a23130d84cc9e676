"""`reduction="mean" | "sum" | "none"`."""

from __future__ import annotations

from torch import Tensor

from . import checks

REDUCTIONS = ("mean", "sum", "none")


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Mean or sum of all values, or the values themselves."""
    checks.option("reduction", reduction, REDUCTIONS)
    if reduction == "none" or losses.dim() == 0:
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
