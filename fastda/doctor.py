"""`fastda doctor`: what is installed, what it was built for, and which backend serves which op."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import backend
from .kernels import cpp
from .version import __version__

LONGEST_IN_ROW = 60  # columns of a reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show versions, devices, the compiled core with its build stamp, and which backend serves which op, and why.\n"
        "Exit code 0, or 1 where FASTDA_BACKEND asks for a backend that cannot serve."
    )
    parser.epilog = "examples:\n  fastda doctor\n  FASTDA_BACKEND=reference fastda doctor"


def run(args: argparse.Namespace) -> int:
    for name, value in environment():
        print(f"{name:<16}{value}")
    print()
    print(table(backend.serving()))
    try:
        backend.check_requested()
    except (ValueError, RuntimeError) as error:
        print(f"fastda doctor: {error}", file=sys.stderr)
        return 1
    return 0


def environment() -> list[tuple[str, str]]:
    """Names and values of what the ops run on."""
    variable = os.environ.get("FASTDA_BACKEND", "not set")
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return [
        ("fastda", f"{__version__}, {Path(__file__).parent}"),
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("torch", f"{torch.__version__}, {Path(torch.__file__).parent}"),
        ("CUDA", torch.version.cuda or "none: this torch is built for the CPU alone"),
        ("triton", triton_version()),
        ("CPU", f"{platform.machine()}, {threads}"),
        ("GPU", gpus()),
        ("compiled core", core()),
        *((f"  {name}", str(value)) for name, value in (cpp.status.stamp or {}).items()),
        ("backend", f"{backend.requested()} (FASTDA_BACKEND: {variable})"),
    ]


def table(services: list[backend.OpService]) -> str:
    """A row for each op and device; what is too long to stand in a row stands once below, and rows refer to it."""
    notes = list(dict.fromkeys(row.reason for row in services if len(row.reason) > LONGEST_IN_ROW))
    rows = [("op", "device", "backend", "why")]
    for row in services:
        why = f"[{notes.index(row.reason) + 1}]" if row.reason in notes else row.reason
        rows.append((row.op, row.device, row.backend, why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(x.ljust(width) for x, width in zip(row, widths)), row[3]]).rstrip() for row in rows]
    if notes:
        lines += ["", *(f"[{number}] {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


def triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "not installed: pip install triton"


def gpus() -> str:
    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(device) for device in range(count)) or "none that torch can use"


def core() -> str:
    """Where the compiled core is, or why it is not in use."""
    status = cpp.status
    if not status.available:
        return status.reason
    threads = "" if cpp.library.build_info()["openmp"] else ", built without OpenMP: runs on one thread"
    return f"in use, {status.path}{threads}"
