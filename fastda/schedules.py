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
        cure = "divide the step by the number of steps"
        raise ValueError(f"progress: expected a share of training in [0, 1], got {progress}; {cure}")
    return math.tanh(gamma * progress / 2)  # the same, and never overflows


def warm_start_lambda(
    step: int, alpha: float = 1.0, low: float = 0.0, high: float = 1.0, max_steps: int = 1000
) -> float:
    r"""λ of TLlib's warm start, from `low` towards `high`.

    .. math:: \lambda = \frac{2 (h - l)}{1 + e^{-\alpha i / N}} - (h - l) + l

    At i = N with α = 1 it has come 46 % of the way; it goes on rising after that.

    Args:
        step: i, the number of training steps done; at least 0.
        alpha: α, how fast it rises.
        low: l, the value at step 0.
        high: h, the limit.
        max_steps: N, the steps that α counts in; at least 1.

    Raises:
        ValueError: `step` below 0 or `max_steps` below 1.

    Source: WarmStartGradientReverseLayer of the Transfer Learning Library (TLlib).

    Example:
        >>> from fastda.schedules import warm_start_lambda
        >>> round(warm_start_lambda(1000), 3)
        0.462
    """
    _check_steps(step, max_steps)
    return low + (high - low) * math.tanh(alpha * step / max_steps / 2)  # the same, and never overflows


def normalised_lambda(step: int, max_steps: int, lambda_max: float = 1.0, gamma: float = 1.0) -> float:
    r"""λ of the library adapt, from 0 to exactly `lambda_max` at the last step.

    .. math::
        \lambda = \lambda_{max} \, \frac{2 / (1 + e^{-\gamma p}) - 1}{2 / (1 + e^{-\gamma}) - 1},
        \qquad p = \min(i / N, 1)

    Args:
        step: i, the number of training steps done; at least 0.
        max_steps: N, the number of training steps; at least 1.
        lambda_max: the last value.
        gamma: γ, how fast it rises; not 0.

    Raises:
        ValueError: `step` below 0, `max_steps` below 1 or `gamma` 0.

    Source: UpdateLambda of the library adapt, after Ganin et al., JMLR 2016.

    Example:
        >>> from fastda.schedules import normalised_lambda
        >>> [round(normalised_lambda(step, 100, lambda_max=0.5), 3) for step in (0, 50, 100, 200)]
        [0.0, 0.265, 0.5, 0.5]
    """
    _check_steps(step, max_steps)
    if gamma == 0:
        raise ValueError("gamma: expected a number other than 0, got 0; a small one gives a straight line")
    return lambda_max * dann_lambda(min(step / max_steps, 1.0), gamma) / dann_lambda(1.0, gamma)


def _check_steps(step: int, max_steps: int) -> None:
    if step < 0:
        raise ValueError(f"step: expected at least 0, got {step}; count the training steps done")
    if max_steps < 1:
        raise ValueError(f"max_steps: expected at least 1, got {max_steps}; give the number of training steps")
