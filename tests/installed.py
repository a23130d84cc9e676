"""Is the fastda that the tests import the one that they are about? Otherwise they would prove nothing, silently."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

try:
    import fastda
    from fastda.kernels import cpp, stamp
except ModuleNotFoundError as error:
    raise pytest.UsageError(f"{error}; install fastda in its repository with: pip install '.[test]'") from error

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(fastda.__file__).resolve().parent
AGAIN = "pip install --no-deps --force-reinstall ."

# what the extras install: imported by what needs it alone
EXTRAS = {"PIL", "matplotlib", "pyarrow", "rich", "safetensors", "scipy", "sklearn", "tensorboard", "threadpoolctl"}
EXTRAS |= {"tqdm", "triton"}


def check() -> None:
    """Stop the session where it would test another fastda."""
    is_installed = any(importlib.metadata.distributions(name="fastda-kernels"))
    message = complaint(cpp.status, PACKAGE, ROOT, is_installed)
    if message:
        raise pytest.UsageError(message)


def description() -> str:
    """The fastda that is tested."""
    core = "compiled core in use" if cpp.status.available else f"the compiled core is {cpp.status.reason}"
    return f"fastda {fastda.__version__} from {PACKAGE}: {core}"


def complaint(status: cpp.Status, package: Path, root: Path, installed: bool) -> str:
    """Why the tests must not run, and what to do; empty if they may.

    Args:
        status: of the compiled core.
        package: the folder that fastda is imported from.
        root: the repository's root, which the tests belong to.
        installed: whether fastda is installed, with or without its compiled core.
    """
    if not installed:
        return f"fastda is not installed; install it in {root} with: pip install '.[test]'"
    if status.available and status.stamp["sources"] != stamp.sources_hash(root / "csrc"):
        return f"the installed compiled core is of other sources than those in csrc; in {root}: {AGAIN}"
    if not status.available and status.stamp is not None:  # without a stamp it was left out on purpose
        return f"the compiled core is {status.reason}"
    others = other_files(package, root / "fastda")
    if others:
        return f"{package} differs from the source folder in {', '.join(others[:5])}; in {root}: {AGAIN}"
    return ""


def other_files(package: Path, source: Path) -> list[str]:
    """Python files that only one of the two folders has, or that differ."""
    files = {path.relative_to(folder) for folder in (package, source) for path in folder.rglob("*.py")}
    return sorted(file.as_posix() for file in files if read(package / file) != read(source / file))


def read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None
