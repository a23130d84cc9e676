"""Prototypes: episodes, many classes, nearest classes and class means, against matrix products by hand and peers."""

from __future__ import annotations

TOPIC = "prototypes"


def test_prototypes(case, side, measure) -> None:
    measure(case, side)
