"""The reversal fork: against a plain autograd Function, pytorch-adapt, and using the features twice."""

from __future__ import annotations

TOPIC = "gradient_reversal"


def test_gradient_reversal(case, side, measure) -> None:
    measure(case, side)
