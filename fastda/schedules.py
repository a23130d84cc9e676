"""Schedules of the reversal's λ: plain functions from progress or step to a number."""

from __future__ import annotations

import math


def dann_lambda(progress: float, gamma: float = 10.0) -> float:
    r"""λ of the DANN paper, from 0 at the start to nearly 1 at the end.

    .. math:: \lambda = \frac{2}{1 + e^{-\gamma p}} - 1

    Args:
        progress: p, the share of training that is done, in [0, 1].
        gamma: how fast it rises.

    Raises:
        ValueError: `progress` outside [0, 1].

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> from fastda.schedules import dann_lambda
        >>> [round(dann_lambda(p), 3) for p in (0.0, 0.1, 0.5, 1.0)]
        [0.0, 0.462, 0.987, 1.0]
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress: expected a share of training in [0, 1], got {progress}; divide the step by their number")
    return 2 / (1 + math.exp(-gamma * progress)) - 1
