"""The machine that measures: what it is, and what it can do at most."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from .cases import Work


def cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's model."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def slug(words: str) -> str:
    """Lower-case letters and digits, joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def load() -> float | None:
    """How many processes ran at a time in the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def name(device: str) -> str:
    """The GPU, or processor and cores, as part of a file name."""
    return slug(torch.cuda.get_device_name() if device == "cuda" else f"{processor()} {cores()} cores")


@dataclass(frozen=True)
class Limits:
    """Measured ceilings: operations a second of a matrix product, by dtype; bytes a second of a copy, both ways."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, work: Work, dtype: torch.dtype) -> float:
        """The time below which the machine cannot do the work from memory."""
        return max(work.flops / self.flops[_dtype_name(dtype)], work.bytes / self.bandwidth)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fastest(function, on_gpu: bool, rounds: int) -> float:
    """Seconds of the fastest of several calls: a ceiling is what was reached undisturbed."""
    seconds = []
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize()
        start = perf_counter()
        function()
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return min(seconds)


def limits(device: str, dtypes: set[torch.dtype], *, size: int | None = None, rounds: int = 10) -> Limits:
    """Measure the ceilings, with as many threads as PyTorch has now. `size` is the side of the square matrices."""
    on_gpu = device == "cuda"
    size = size or (8192 if on_gpu else 2048)
    flops = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = torch.empty_like(a)
        flops[_dtype_name(dtype)] = 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=product), on_gpu, rounds)
    elements = size**2 * (4 if on_gpu else 16)  # 1 GiB on a GPU, 256 MiB elsewhere: beyond all caches
    source, target = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    bandwidth = 2 * 4 * elements / _fastest(lambda: target.copy_(source), on_gpu, rounds)
    return Limits(flops, bandwidth)
