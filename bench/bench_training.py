"""Training steps with adaptation: against the same passes without reversal, and with the task loss alone."""

from __future__ import annotations

TOPIC = "training"


def test_training(case, side, measure) -> None:
    measure(case, side)
