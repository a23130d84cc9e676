"""Progress bars."""

from __future__ import annotations

import sys

import pytest

from fastda.progress import NoBar, progress_bar


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_bar_is_seen_where_it_is_wanted(progress, capsys):
    """Standard error is no terminal here."""
    with progress_bar(progress, total=2, unit="step") as bar:
        bar.update()
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        bar.update()
    bar.close()
    assert ("2/2" in capsys.readouterr().err) == (progress is True)


def test_without_tqdm_only_a_bar_that_was_asked_for_raises(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert isinstance(progress_bar(None), NoBar)
    with pytest.raises(
        ModuleNotFoundError, match="progress: expected tqdm to be installed, got none; pip install tqdm"
    ):
        progress_bar(True)
