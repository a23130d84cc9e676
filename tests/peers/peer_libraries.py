"""The libraries that fastda patches: those that are installed, and stand-ins of their names and formulas for others."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastda
from fastda.benchmarks.peers import PeerMissing, import_peer
from fastda.patching.libraries import _version

STAND_INS = Path(__file__).parent / "stand_ins"
MODULES = {
    "domainbed": "domainbed.algorithms",
    "easyfsl": "easyfsl.methods",
    "learn2learn": "learn2learn.nn.protonet",
    "pytorch_adapt": "pytorch_adapt.layers",
    "tllib": "tllib.alignment.dann",
    "torchmeta": "torchmeta.utils.prototype",
}
used: dict[str, str] = {}
"""What the tests called under each name: a version, or a stand-in and why."""


def is_installed(library: str) -> bool:
    """The library itself; a stand-in may be found where another one is imported."""
    spec = find_spec(library)
    return spec is not None and STAND_INS not in Path(spec.origin or "").parents


@contextmanager
def imported(library: str) -> Iterator[None]:
    """Within the block the library can be imported. Afterwards it is unpatched, and a stand-in is gone."""
    installed = is_installed(library)
    sys.path.append(str(STAND_INS))  # last: what is installed comes first
    try:
        import_peer(MODULES[library])
        used[library] = _version(library) if installed else "a stand-in: it is not installed"
        yield
    except PeerMissing as error:
        used[library] = f"skipped: {error}"
        pytest.skip(str(error))
    finally:
        fastda.unpatch(library)
        sys.path.remove(str(STAND_INS))
        if not installed:
            for name in [name for name in sys.modules if name.partition(".")[0] == library]:
                del sys.modules[name]
