"""The domain-adversarial loss: against the formula, and cross-entropy with logits on the joined domains."""

from __future__ import annotations

TOPIC = "domain_loss"


def test_domain_loss(case, side, measure) -> None:
    measure(case, side)
