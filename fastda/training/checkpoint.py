"""Checkpoints: written whole or not at all, and read without unpickling anything."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 1


def save(path: Path, state: dict) -> None:
    """Write beside `path`, flush to the disk, then rename: whoever looks finds the old checkpoint or the whole new
    one."""
    _check_plain("checkpoint", state)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.part"):  # of processes that were killed while writing
        leftover.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read a checkpoint onto the CPU; only tensors and plain values are read."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint: expected one of fastda's of format {FORMAT}, got another file, {str(path)!r}; remove it"
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
            f"checkpoint: expected tensors and plain values, got a {type(value).__name__} at {where}; it could not "
            "be read back "
            f"without unpickling (of a LambdaLR, pass lr_schedule to fit instead)"
        )
