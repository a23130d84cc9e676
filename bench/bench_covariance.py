"""Covariance matrices: against the formula and one careful product."""

from __future__ import annotations

TOPIC = "covariance"


def test_covariance(case, side, measure) -> None:
    measure(case, side)
