"""Which backend serves a call, and what is said where the one that was asked for cannot."""

from __future__ import annotations

import logging
import os
import sys

import fresh
import pytest
import torch

import fastda
from fastda import backend
from fastda.kernels import cpp

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def absent_core(monkeypatch):
    monkeypatch.setattr(cpp, "status", cpp.Status(False, None, None, "absent: for this test"))
    monkeypatch.setattr(backend, "_told", set())


@pytest.mark.compiled_core
def test_the_compiled_core_serves_cpu_tensors():
    assert {op: backend.serve(op, X) for op in backend.KERNELS["cpp"]} == dict.fromkeys(backend.KERNELS["cpp"], "cpp")


@pytest.mark.compiled_core
def test_use_backend_sets_and_a_with_block_restores():
    with fastda.use_backend("reference"):
        assert backend.serve("coral_loss", X) == "reference"
        with fastda.use_backend("cpp"):
            assert backend.serve("coral_loss", X) == "cpp"
        assert backend.requested() == "reference"
    assert backend.requested() == "auto"


def test_a_choice_can_be_used_again():
    choice = fastda.use_backend("reference")
    choice.__exit__()
    for _ in range(2):
        with choice:
            assert backend.requested() == "reference"
        assert backend.requested() == "auto"


@pytest.mark.compiled_core
def test_the_reference_really_runs(monkeypatch):
    from fastda import reference

    called = []
    monkeypatch.setattr(reference, "coral_loss", lambda *args, **options: called.append(args) or torch.zeros(()))
    fastda.coral_loss(X, X)
    assert not called
    with fastda.use_backend("reference"):
        fastda.coral_loss(X, X)
    assert called


def test_an_unknown_name():
    with pytest.raises(ValueError, match="^name: expected one of 'auto', 'reference', 'cpp', 'cuda', 'triton', got 'f"):
        fastda.use_backend("fast")
    assert backend.requested() == "auto"


@pytest.mark.compiled_core
@pytest.mark.skipif("cuda" in cpp.devices, reason="the compiled core has kernels for CUDA")
def test_asking_for_cuda_without_its_kernels_raises_with_the_reason():
    with pytest.raises(RuntimeError, match=r"^name: backend 'cuda' cannot be had: .*kernels for cuda \(left out: "):
        fastda.use_backend("cuda")


def test_asking_for_an_absent_core_raises_with_the_reason(absent_core):
    with pytest.raises(RuntimeError, match=r"^name: backend 'cpp' cannot be had.*absent: for this test"):
        fastda.use_backend("cpp")


@pytest.mark.compiled_core
def test_asking_for_the_core_on_another_device_raises():
    with fastda.use_backend("cpp"), pytest.raises(RuntimeError, match=r"^coral_loss: backend 'cpp'.*cpu.*meta.*auto"):
        fastda.coral_loss(X.to("meta"), X.to("meta"))


def test_falling_back_is_said_once(absent_core, caplog):
    with caplog.at_level(logging.WARNING, logger="fastda"):
        losses = {fastda.coral_loss(X, 2 * X).item() for _ in range(3)}
    assert losses == {fastda.reference.coral_loss(X, 2 * X).item()}
    assert [record.getMessage() for record in caplog.records] == [
        "coral_loss runs as plain PyTorch on cpu: the compiled core is absent: for this test"
    ]


@pytest.mark.compiled_core
def test_the_report_has_a_row_for_each_op_and_device():
    rows = {(row.op, row.device): row for row in backend.serving()}
    assert rows.keys() == {(op, device) for op in fastda.reference.__all__ for device in ("cpu", "cuda")}
    assert rows["deep_coral_loss", "cpu"].backend == "cpp" and not rows["deep_coral_loss", "cpu"].reason
    assert all(row.reason for row in rows.values() if row.backend == "reference")


@pytest.mark.parametrize("op", fastda.reference.__all__)
def test_an_op_without_a_kernel_is_the_reference_itself(op):
    has_kernel = op in backend.KERNELS["cpp"]
    assert (getattr(fastda, op) is getattr(fastda.reference, op)) != has_kernel


def run(variable, program):
    elsewhere = os.path.dirname(sys.executable)
    return fresh.python("-c", program, cwd=elsewhere, env=os.environ | {"FASTDA_BACKEND": variable})


def test_the_environment_variable_chooses():
    program = "import torch, fastda.backend as b; print(b.requested(), b.serve('coral_loss', torch.ones(1)))"
    assert run("reference", program).stdout.split() == ["reference", "reference"]


def test_an_unknown_environment_variable_is_named_at_the_first_op():
    process = run("fast", "import torch, fastda; fastda.coral_loss(torch.eye(3), torch.eye(3))")
    assert "ValueError: FASTDA_BACKEND: expected one of 'auto', 'reference', 'cpp', 'cuda', 'tri" in process.stderr
