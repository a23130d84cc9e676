"""The record of `tests/soak.py`: what is written in it, and what must not be."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest
import soak

STATISTICS = "    - 9 passing, 0 failing, and 1 invalid examples\n"


def ended(code: int, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], code, said, "")


def record(folder, monkeypatch, done: subprocess.CompletedProcess[str]) -> tuple[int, str]:
    """How `python tests/soak.py` ends when pytest ended so, and the text of its record."""
    monkeypatch.setattr(soak, "revision", lambda: "0123456789ab")
    monkeypatch.setattr(soak.subprocess, "run", lambda *words, **options: done)
    monkeypatch.setattr("sys.argv", ["soak.py", "--ops", "covariance", "--examples", "9", "--output", str(folder)])
    code = soak.main()
    return code, "".join(path.read_text() for path in sorted(folder.iterdir()))


@pytest.mark.compiled_core
@pytest.mark.parametrize(
    "done",
    [
        ended(4, "ERROR: not found: tests/test_contract.py::test_other[covariance]"),
        ended(1, "E   RuntimeError: no memory for the inputs"),
        ended(-signal.SIGKILL),
        ended(0, "9 passed"),
    ],
    ids=["not found", "set-up failed", "killed", "nothing counted"],
)
def test_a_run_that_did_not_start_leaves_the_record(tmp_path, monkeypatch, capsys, done):
    code, before = record(tmp_path, monkeypatch, ended(0, STATISTICS))
    assert code == 0 and "| `covariance` | 9 | 0 |" in before
    assert record(tmp_path, monkeypatch, done) == (1, before)
    said = capsys.readouterr().err
    assert said.startswith("covariance: did not start") and (done.stdout.removeprefix("E   ") or "-9") in said


@pytest.mark.compiled_core
@pytest.mark.parametrize(
    ("done", "counts"),
    [
        (ended(1, "    - 3 passing, 1 failing\nE   AssertionError: 2 not 1\n"), (3, 1, "AssertionError: 2 not 1")),
        (ended(-signal.SIGSEGV, "Fatal Python error"), (0, 1, "exit code -11: Fatal Python error")),
    ],
    ids=["an example failed", "an example crashed"],
)
def test_a_failure_is_written(tmp_path, monkeypatch, done, counts):
    record(tmp_path, monkeypatch, ended(0, STATISTICS))
    code, _ = record(tmp_path, monkeypatch, done)
    (row,) = json.loads(next(tmp_path.glob("*.json")).read_text())["ops"]
    assert code == 1 and (row["passed"], row["failed"], row["reason"]) == counts
