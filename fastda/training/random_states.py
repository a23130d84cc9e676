"""The states of all random number generators that training draws from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch


def capture(generators: Sequence[torch.Generator] = ()) -> dict:
    """The states of Python's, NumPy's and PyTorch's generators, and of those given, as plain values and tensors."""
    numpy = np.random.get_state(legacy=False)
    version, internal, gauss = random.getstate()
    return {
        "python": [version, torch.tensor(internal), gauss],
        "numpy": {
            "key": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def restore(states: dict, generators: Sequence[torch.Generator] = ()) -> None:
    """Set all generators to what `capture` saw."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    numpy = states["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]},
            "has_gauss": numpy["has_gauss"],
            "gauss": numpy["gauss"],
        }
    )
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
    for generator, state in zip(generators, states["generators"], strict=True):
        generator.set_state(state)


@contextmanager
def unchanged(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """What is drawn within does not change what is drawn after."""
    states = capture(generators)
    try:
        yield
    finally:
        restore(states, generators)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws within depend on the seed alone."""
    with unchanged():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
