"""Functions in several processes at once, which import PyTorch once for all of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch

# A server that has imported them is forked for each process. The compiler is imported by whoever makes an optimiser.
PRELOADED = ["torch", "torch._dynamo", "fastda"]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def run_in_processes(function: Callable[..., None], *arguments: object, count: int) -> None:
    """Call `function(rank, *arguments)` in `count` processes, and raise what one of them raises."""
    multiprocessing.get_context(METHOD).set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(function, arguments, count, start_method=METHOD)
