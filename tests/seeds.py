"""Random numbers that depend on a test's name alone: not on chance, nor on which tests ran before it.

`FASTDA_TEST_SEED=1` (or any other number) gives all tests other ones, to see whether an outcome hangs on luck.
"""

from __future__ import annotations

import os
import random
import zlib

import numpy as np
import torch
from hypothesis import register_random

SEED = int(os.environ.get("FASTDA_TEST_SEED", "0"))


def seed(name: str) -> None:
    """Seed random, NumPy's global generator and PyTorch's."""
    number = zlib.crc32(f"{SEED} {name}".encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


class TorchGenerator:
    """PyTorch's global generator, as hypothesis wants it: it seeds those that it knows before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_GENERATOR = TorchGenerator()  # hypothesis holds it by a weak reference
register_random(TORCH_GENERATOR)
