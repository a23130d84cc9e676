"""The build stamp: what a compiled core was built for and from, in a text file beside it.

`setup.py` writes it. It is read before the library is loaded, since a mismatched one can die while loading. This file
imports the standard library alone: setup.py runs it where the rest of fastda cannot be imported.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

FILE = "_C.json"
SOURCES = (".cpp", ".h", ".cu", ".cuh")


def make(
    csrc: Path, version: str, torch_version: str, cuda_version: str | None, without_cuda: str
) -> dict[str, str | None]:
    """The stamp of a build of the sources under `csrc` in this environment; `without_cuda`: why CUDA was left out."""
    return {
        "fastda": version,
        "torch": torch_version,
        "cuda": cuda_version,
        "python": sys.implementation.cache_tag,
        "compiler": compiler(),
        "CUDA kernels": f"left out: {without_cuda}" if without_cuda else "built",
        "sources": sources_hash(csrc),
    }


def sources_hash(csrc: Path) -> str:
    """SHA-256 over names and contents of the C++ and CUDA sources."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in SOURCES):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler() -> str:
    """The first line of what the C++ compiler says of its version."""
    if sys.platform == "win32":
        return "MSVC"
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "--version"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.partition("\n")[0]
