"""Peak memory of a call.

On a GPU it is what PyTorch's caching allocator counts. On the CPU the profiler reports each allocation and release of
PyTorch's allocator, whether Python, a C++ op or compiled code asked for it; the largest running sum is the peak. Not
seen: buffers that the matrix library keeps to itself, and scratch that a C++ op takes from the C++ heap or allocates in
a worker thread.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .correctness import asking, call, incoming_gradients


@contextmanager
def silent_profiler() -> Iterator[None]:
    """The profiler of PyTorch 2.13 writes a line to standard error, past Python, each time it starts or stops."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak(function: Callable[[], object], device: str = "cpu") -> int:
    """The largest number of bytes allocated at once while `function` runs, beyond what stood before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with silent_profiler(), torch.autograd.profiler.profile(profile_memory=True) as profiler:
        kept = function()
    del kept
    allocated = largest = 0
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            largest = max(largest, allocated)
    return largest


def _own_bytes(tensors: tuple[Tensor, ...], arguments: tuple) -> int:
    """Bytes of the storages that are not an argument's."""
    given = {x.untyped_storage().data_ptr() for x in arguments if isinstance(x, Tensor)}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(size for address, size in storages.items() if address not in given)


def memory(function: Callable, arguments: tuple, device: str, seed: int = 0) -> dict[str, int]:
    """Bytes of one forward and backward pass: "peak" beyond the arguments, "extra" beyond the results as well."""
    inputs = asking(arguments)
    incoming = incoming_gradients(call(function, arguments), seed) if inputs else ()
    results: tuple[Tensor, ...] = ()

    def forward_and_backward() -> None:
        nonlocal results
        results = call(function, arguments)
        if inputs:
            results += torch.autograd.grad(results, inputs, incoming, materialize_grads=True)

    largest = peak(forward_and_backward, device)
    return {"peak": largest, "extra": max(0, largest - _own_bytes(results, arguments))}
