"""Checkpoints: written whole or not at all, and read without unpickling anything."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..files import write_atomically

FORMAT = 1


def save(path: Path, state: dict) -> None:
    """Whoever looks finds the old checkpoint or the whole new one, after a power failure too."""
    _check_plain("checkpoint", state)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))
    for leftover in path.parent.glob(f".{path.name}.*.part"):  # of processes that were killed while writing
        leftover.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU; only tensors and plain values are read."""
    try:
        with open(path, "rb") as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint: expected a file that all processes see, got {str(path)!r}, which the first one alone has; "
            "put it on a disk that they share"
        ) from None
    except Exception as error:  # whatever a file that is no checkpoint makes of the reader
        raise ValueError(
            f"checkpoint: expected one of fastda's, got {str(path)!r}, which cannot be read ({type(error).__name__}: "
            f"{error}); remove it, or pass resume=False"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: expected one of fastda's of format {FORMAT}, got another file, {str(path)!r}; remove it, or "
            "pass resume=False"
        )
    return state


def _check_plain(where: str, value) -> None:
    """Only what can be read back without unpickling."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_plain(f"{where}[{key!r}]", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            _check_plain(f"{where}[{index}]", part)
    elif not isinstance(value, (Tensor, int, float, str, type(None))):
        raise TypeError(
            f"checkpoint: expected tensors and plain values, got a {type(value).__name__} at {where}; it could not be "
            "read back without unpickling (instead of a LambdaLR, pass lr_schedule)"
        )
