"""The room of the Triton kernels' tests under Triton's interpreter, on CPU tensors; tests/conftest.py chooses it.

On a GPU machine the kernels run compiled, in tests/gpu.
"""

import functools
import importlib.util
import inspect
import os
from pathlib import Path

import pytest

import fastda
from fastda.kernels import tiles

HERE = Path(__file__).parent


def _forget_plans():
    from fastda.kernels.triton import problem

    problem.plan_forward.cache_clear()
    problem.plan_backward.cache_clear()


@pytest.fixture(scope="module")
def on_triton(quick_interpreter):
    with fastda.use_backend("triton"):
        yield


@pytest.fixture(scope="session")
def quick_interpreter():
    """Triton's interpreter looks for the builtins of its language at each call of a function: here once a module.

    That took most of the time of these tests. Builtins are found in a module before they are first replaced there.
    """
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package):
        return [name for name, member in inspect.getmembers(package) if interpreter.tl.core.is_builtin(member)]

    def patch(package, *rest):
        for name in builtins(package):
            member = getattr(package, name)
            if interpreter.tl.core.is_builtin(member):
                interpreter._patch_attr(package, name, member, *rest)

    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr(interpreter, "_patch_builtin", patch)
        yield


@pytest.fixture
def heuristic(monkeypatch):
    """A function that sets a threshold of fastda.kernels.tiles for the time of the test."""

    def set_(name, value):
        monkeypatch.setattr(tiles, name, value)
        _forget_plans()

    yield set_
    monkeypatch.undo()
    _forget_plans()


@pytest.fixture
def checked_products(heuristic):
    """No Gram matrix is small enough for float64 at once: float32, and float64 only where it cancels."""
    heuristic("EXACT_WORK", 0)


@pytest.fixture
def separate_means(heuristic):
    """The means have a launch of their own, however few the samples."""
    heuristic("FUSED_MEANS", 0)


@pytest.fixture
def half_products(heuristic):
    """Any number of samples is enough for half-precision products."""
    heuristic("HALF_WORK", 0)


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reason = "there is a GPU: Triton's interpreter is off, and tests/gpu has the compiled kernels"
    else:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
