"""What all tests share: the fastda they run against, their seeds, hypothesis profiles and fixtures.

`HYPOTHESIS_PROFILE=dev|ci|sanitize|soak` chooses the profile, `FASTDA_TEST_SEED` other random numbers than usually.
"""

from __future__ import annotations

import gc
import os

# Before NumPy and SciPy are loaded: in problems as small as these, OpenBLAS's threads wait for each other most of the
# time, and even more where something else runs.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import installed
import pytest
import torch
from hypothesis import HealthCheck, settings
from remarks import remark, remarks
from seeds import SEED, seed

from fastda.kernels import cpp

# Without a GPU the Triton kernels are tested under Triton's interpreter, to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=25, **COMMON)
settings.register_profile("ci", max_examples=25, derandomize=True, **COMMON)
settings.register_profile("sanitize", max_examples=5, derandomize=True, **COMMON)
settings.register_profile("soak", max_examples=int(os.environ.get("SOAK_EXAMPLES", 10_000)), **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


def pytest_configure() -> None:
    installed.check()


def pytest_report_header() -> str:
    return f"{installed.description()}; FASTDA_TEST_SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where fastda is installed without its compiled core, on purpose, tests of that are skipped."""
    if not cpp.status.available:
        without = pytest.mark.skip(reason=f"the compiled core is {cpp.status.reason}")
        for item in items:
            if item.get_closest_marker("compiled_core"):
                item.add_marker(without)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector need not look through it dozens of times."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, in the processes that run tests
        session.config.workeroutput["remarks"] = list(remarks)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for sentence in getattr(node, "workeroutput", {}).get("remarks", ()):
        remark(sentence)


def pytest_terminal_summary(terminalreporter) -> None:
    for sentence in sorted(remarks):
        terminalreporter.write_line(sentence)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries that look for leaks when the process ends find none


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request) -> None:
    """A fixture that several tests share draws the same whichever of them comes first."""
    if fixturedef.scope != "function":
        seed(f"{request.node.nodeid} {fixturedef.argname}")


@pytest.fixture(autouse=True)
def seeded(request) -> None:
    seed(request.node.nodeid)


@pytest.fixture(scope="module")
def poisoned_memory():
    """Uninitialised memory holds NaN (integers: the largest value), so that reading it is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors gain nothing from threads, and on a busy machine threads that wait for each other cost much."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
