"""CORAL: against the covariance formula, Gram matrices by hand, and pytorch-adapt."""

from __future__ import annotations

TOPIC = "coral"


def test_coral(case, side, measure) -> None:
    measure(case, side)
