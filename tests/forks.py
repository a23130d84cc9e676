"""Runs in processes of their own, with all modules imported already, to be killed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def start(run: Callable[[Path], None], folder: Path) -> int:
    """Call `run(folder)` in a process of its own; returns its number. It ends with 0 unless something is raised."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run(folder)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child
