"""Files that commands write: whole or not at all, and refused beforehand where they cannot be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write beside `path`, flush to the disk, then rename: whoever looks sees the old file or the whole new one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_writable(argument: str, path: Path | None) -> None:
    """Raise a ValueError where writing to `path` would fail, before the work that is to be written is done."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(
            f"{argument}: expected a file in a folder that exists and is writable, got {str(path)!r}; choose another"
        )
