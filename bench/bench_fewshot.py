"""MAML against a loop over tasks, `vmap` by hand and learn2learn; many episodes against batched PyTorch and easyfsl."""

from __future__ import annotations

TOPIC = "fewshot"


def test_fewshot(case, side, measure) -> None:
    measure(case, side)
