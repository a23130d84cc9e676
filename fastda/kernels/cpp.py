"""Finds and loads the compiled core, `fastda._C`, whose kernels register themselves with PyTorch.

`status` says whether it is loaded, and if not, why and what to do. Nothing is printed or raised at import.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from ..version import __version__
from . import stamp

MODULE = "fastda._C"
PACKAGE = Path(__file__).resolve().parents[1]
CSRC = PACKAGE.parent / "csrc"  # exists where fastda is imported from its source folder


@dataclass(frozen=True)
class Status:
    """Whether the compiled core is in use.

    Attributes:
        available: it is loaded.
        path: of the library, loaded or refused; None where there is none.
        stamp: what it was built for; None where there is none.
        reason: continues "the compiled core is ...": why it is not available, and the cure; empty if it is.
    """

    available: bool
    path: str | None
    stamp: dict[str, str | None] | None
    reason: str


def find(package: Path, csrc: Path, search_path: Sequence[str]) -> Path | None:
    """The folder of the compiled core: the package's, or, for a source folder without one, the installed package's."""
    folders = [package]
    if csrc.is_dir():
        folders += [Path(entry or ".").resolve() / package.name for entry in search_path]
    return next((folder for folder in folders if (folder / stamp.FILE).is_file()), None)


def expected(csrc: Path) -> dict[str, str | None]:
    """What the stamp must say for the core to be loaded: this environment, and in a source folder these sources."""
    running = {
        "fastda": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.implementation.cache_tag,
    }
    return running | ({"sources": stamp.sources_hash(csrc)} if csrc.is_dir() else {})


def rebuild(folder: Path, csrc: Path) -> str:
    """The command that compiles it anew."""
    if not csrc.is_dir():
        return "rebuild in fastda's source folder with: pip install --no-deps --force-reinstall ."
    editable = folder.parent == csrc.parent
    return f"rebuild in {csrc.parent} with: pip install --no-deps --force-reinstall {'-e ' if editable else ''}."


def mismatch(built: dict[str, str | None], running: dict[str, str | None]) -> str:
    """Where the stamp differs from what runs; empty if it does not."""
    differing = [key for key in running if built.get(key) != running[key]]
    if differing == ["sources"]:
        return "compiled from other sources than those in csrc"
    differing = [key for key in differing if key != "sources"]
    compiled = ", ".join(f"{key} {built.get(key)}" for key in differing)
    return compiled and f"compiled for {compiled}, running {', '.join(f'{key} {running[key]}' for key in differing)}"


def load(package: Path = PACKAGE, csrc: Path = CSRC, search_path: Sequence[str] | None = None) -> Status:
    """Load the compiled core if its stamp fits."""
    folder = find(package, csrc, sys.path if search_path is None else search_path)
    if folder is None and csrc.is_dir():
        reason = f"not built: fastda runs from its source folder; build it in {csrc.parent} with: pip install ."
        return Status(False, None, None, reason)
    if folder is None:
        reason = "absent: installed without kernels (FASTDA_NO_KERNELS=1 at install); reinstall without it"
        return Status(False, None, None, reason)

    built = json.loads((folder / stamp.FILE).read_text(encoding="utf-8"))
    libraries = [str(file) for suffix in EXTENSION_SUFFIXES if (file := folder / f"_C{suffix}").is_file()]
    path = libraries[0] if libraries else None
    difference = mismatch(built, expected(csrc))
    if difference:
        return Status(False, path, built, f"not loaded: {difference}; {rebuild(folder, csrc)}")
    if path is None:
        return Status(False, None, built, f"gone: {folder} has its stamp but no library; {rebuild(folder, csrc)}")

    spec = importlib.util.spec_from_file_location(MODULE, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return Status(False, path, built, f"not loadable: {error}; {rebuild(folder, csrc)}")
    sys.modules[MODULE] = module
    return Status(True, path, built, "")


status = load()
library = sys.modules.get(MODULE)
"""The module `fastda._C`, or None."""
devices = library.build_info()["devices"] if library else ()
"""Types of the devices that it has kernels for."""
