"""The build backend: setuptools, made to compile against the torch that will run fastda.

pip builds in an environment of its own, where it would put the newest torch; libtorch has no stable ABI, and a core
compiled for another torch cannot be loaded. So this looks for the torch of the interpreter behind that environment,
and asks for one as a build requirement only where there is none. Other front ends (uv, python -m build) isolate with an
interpreter of their own: there torch is a build requirement.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401: these hooks need no torch
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

ROOT = Path(__file__).resolve().parents[1]

# Asked of the interpreter without pip's changes to its environment: which torch it has, and where it looks for modules.
PROBE = """
import importlib.metadata, json, sys
version = next((torch.version for torch in importlib.metadata.distributions(name="torch")), None)
print(json.dumps([version, [entry for entry in sys.path if entry]]))
"""


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    if not kernels_wanted():
        return []
    check_compiler()
    return ["ninja"] if find_torch() else ["ninja", torch_requirement()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    prepare()
    for leftover in ROOT.glob("build/lib*"):  # setuptools would pack what an earlier build left there
        shutil.rmtree(leftover)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    prepare()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def kernels_wanted() -> bool:
    return os.environ.get("FASTDA_NO_KERNELS") != "1"


def prepare() -> None:
    """Check for what the compilation needs, and make torch importable."""
    if not kernels_wanted():
        return
    check_compiler()
    if not find_torch():
        raise SystemExit(f"fastda compiles against torch, and found no {torch_requirement()}; pip install torch first")


def torch_requirement() -> str:
    """What pyproject.toml says of torch."""
    return re.search(r'"(torch>=[\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8")).group(1)


def find_torch() -> str | None:
    """Version of the torch to compile against, this environment's or the interpreter's own; it becomes importable."""
    version, path = torch_here(), []
    if version is None:
        probe = subprocess.run([sys.executable, "-E", "-c", PROBE], check=True, capture_output=True, text=True)
        version, path = json.loads(probe.stdout)
    if version is None or not is_recent(version):  # pip is about to replace an older one
        return None
    sys.path.extend(entry for entry in path if entry not in sys.path)  # last: this environment's setuptools wins
    return version


def torch_here() -> str | None:
    """Version of the torch that can be imported in this process."""
    return next((torch.version for torch in importlib.metadata.distributions(name="torch")), None)


def is_recent(version: str) -> bool:
    """Is that version of torch one that pyproject.toml allows?"""
    return numbers(version) >= numbers(torch_requirement().removeprefix("torch>="))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.match(r"\d+(\.\d+)*", version).group().split("."))


def check_compiler() -> None:
    """Exit with one sentence where C++ cannot be compiled."""
    if sys.platform == "win32":
        return  # setuptools looks for MSVC in places of its own, and says itself when there is none
    chosen = os.environ.get("CXX")
    compiler = shlex.split(chosen or "c++")[0]
    if shutil.which(compiler) is None:
        missing = f"C++ compiler found (looked for {compiler}{', which CXX names' if chosen else ' on PATH'})"
        cure = "apt install g++, dnf install gcc-c++, conda install cxx-compiler or xcode-select --install"
    elif not Path(header := sysconfig.get_path("include"), "Python.h").exists():
        missing = f"Python headers found (looked for {header}/Python.h)"
        cure = "apt install python3-dev or dnf install python3-devel"
    else:
        return
    raise SystemExit(
        f"fastda cannot compile its kernels: no {missing}; install what is missing, for example with {cure}, "
        f"or set FASTDA_NO_KERNELS=1 to install without kernels, on the slower reference ops"
    )
