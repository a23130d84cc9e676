"""Fixtures that import a library, and a summary that says of each whether it was the library itself or a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from peer_libraries import imported, used
from remarks import remark

from fastda.patching import LIBRARIES


@pytest.fixture(params=LIBRARIES)
def library(request) -> Iterator[str]:
    with imported(request.param):
        yield request.param


@pytest.fixture
def importing() -> Iterator[Callable[[str], None]]:
    """importing("easyfsl"): until the end of the test it can be imported."""
    with ExitStack() as stack:
        yield lambda library: stack.enter_context(imported(library))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    for library, which in sorted(used.items()):
        remark(f"tests/peers: {library}: {which}")
