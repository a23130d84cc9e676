"""Runs the cases of a topic under pytest-benchmark.

A module `bench_<topic>.py` names its TOPIC; its test gets a `case`, the name of a `side`, and `measure`, which holds
the side to the float64 result and then times it. With `--benchmark-disable` each side runs once, untimed.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from fastda.benchmarks.baselines import Absent, make_side, side_names
from fastda.benchmarks.cases import CPU_CASES, GPU_CASES, Case
from fastda.benchmarks.correctness import Check, asking, call, incoming_gradients

# Compiling takes seconds a side, and half a minute the first one: untimed runs show on one case that it works.
COMPILED_UNTIMED = "domain-adversarial loss 64+64"


def pytest_generate_tests(metafunc) -> None:
    topic = getattr(metafunc.module, "TOPIC", None)
    if topic is None or "case" not in metafunc.fixturenames:
        return
    available = CPU_CASES + (GPU_CASES if torch.cuda.is_available() else ())
    cases = [case for case in available if case.topic == topic]
    pairs = [(case, side) for case in cases for side in side_names(case)]
    metafunc.parametrize("case, side", pairs, ids=[f"{case.name}-{side}" for case, side in pairs])


@lru_cache(maxsize=1)
def _arguments(case: Case) -> tuple:
    """Of the case at hand: they, and its float64 results, serve all of its sides."""
    torch.compiler.reset()
    return case.arguments()


@lru_cache(maxsize=2)
def _check(case: Case, truth) -> Check:
    return Check(case, _arguments(case), truth=truth)


@pytest.fixture
def measure(benchmark, request):
    """Check a side of a case, then time its forward and backward pass."""

    def run(case: Case, name: str) -> None:
        untimed = request.config.getoption("benchmark_disable")
        if untimed and name.endswith(" compiled") and case.name != COMPILED_UNTIMED:
            pytest.skip(f"untimed, compiled sides run for one case only: {COMPILED_UNTIMED}")
        side = make_side(case, name)
        if isinstance(side, Absent):
            pytest.skip(f"{name}: {side.reason}")
        wrong = _check(case, side.truth).judge(side).wrong
        if wrong is not None:
            pytest.fail(f"{name}: wrong, so it is not timed: {wrong}")
        arguments = _arguments(case)
        inputs = asking(arguments) if case.phase == "both" else ()
        incoming = incoming_gradients(call(side.call, arguments), seed=0) if inputs else ()

        def forward_and_backward() -> None:
            outputs = call(side.call, arguments)
            if inputs:
                torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.name
        benchmark(forward_and_backward)

    return run
