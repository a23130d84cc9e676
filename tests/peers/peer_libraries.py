"""The libraries that fastda patches: those that are installed, and stand-ins of the same names and formulas for the others."""

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


@contextmanager
def imported(library: str) -> Iterator[None]:
    """Within the block the library can be imported. Afterwards it is unpatched, and a stand-in is gone."""
    installed = find_spec(library) is not None
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
