"""Training scripts of other libraries give the same losses under the patch, and the record says so."""

from __future__ import annotations

import json

import pytest
from peer_libraries import is_installed

from fastda.benchmarks import patched_training
from fastda.benchmarks.patched_training import SCRIPTS, Script, compare
from fastda.benchmarks.peers import PeerMissing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_losses_are_the_same(script):
    if not is_installed(script.library):
        pytest.skip(f"{script.library} is not installed")
    row = compare(script, steps=12, rounds=1)
    losses = row["losses"]
    assert losses["largest relative difference"] < 1e-5
    assert losses["last"] != losses["first"]
    assert row["milliseconds"]["before"] > 0 and row["ratio"] > 0


def test_the_record(monkeypatch, tmp_path, capsys):
    row = {
        "library": "easyfsl",
        "script": "5-way",
        "steps": 3,
        "milliseconds": {"before": 2.0, "after": 1.0},
        "ratio": 2.0,
        "losses": {"first": 1.0, "last": 0.5, "largest relative difference": 1e-7},
    }

    def compared(script, steps, progress):
        if script.name == "absent":
            raise PeerMissing("easyfsl is not installed")
        return row

    absent = Script("easyfsl", "absent", (), None)
    monkeypatch.setattr(patched_training, "SCRIPTS", (SCRIPTS[2], absent))
    monkeypatch.setattr(patched_training, "compare", compared)
    assert patched_training.main(["--output", str(tmp_path), "--steps", "3"]) == 0
    (written,) = tmp_path.glob("*.json")
    record = json.loads(written.read_text())
    assert record["scripts"] == [row, {"library": "easyfsl", "script": "absent", "reason": "easyfsl is not installed"}]
    table = written.with_suffix(".md").read_text()
    assert (
        "| 5-way, 3 steps | 2.00 | 1.00 | 2.00× | 1.0e-07 |" in table
        and "| absent | easyfsl is not installed |" in table
    )
    assert table in capsys.readouterr().out
