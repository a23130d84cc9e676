"""The folder of a run: whose it is, what of it is done, and what is left to do."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..files import write_atomically

RUN, MODEL, PREDICTIONS, JSON, MARKDOWN = "run.json", "model.safetensors", "predictions.csv", "report.json", "report.md"
RESULTS = (MODEL, PREDICTIONS, JSON, MARKDOWN)
CHECKPOINTS = ("pretraining.pt", "adaptation.pt")
FORMAT = 1


class RunFolder:
    """A folder for one run. The same run finds it again and goes on; another one is refused.

    Args:
        path: a folder that does not exist, is empty, or is of the same run.
        identity: what makes a run the same, as plain values by name.

    Raises:
        ValueError: a folder of another run, or that holds something else, or that cannot be made.
    """

    def __init__(self, path: str | os.PathLike, identity: dict) -> None:
        self.path = Path(path)
        self.identity = json.loads(json.dumps({"format": FORMAT, **identity}))  # as it is read back
        self._check()

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return all((self / name).is_file() for name in RESULTS)

    @property
    def begun(self) -> bool:
        return any((self / name).is_file() for name in CHECKPOINTS)

    def begin(self) -> None:
        """Make the folder, and write down whose it is; sweep up what a killed process was writing."""
        self.path.mkdir(exist_ok=True)
        for leftover in self.path.glob(".*.part"):
            leftover.unlink(missing_ok=True)
        if not (self / RUN).exists():
            self.write(RUN, json.dumps(self.identity, indent=2))

    def write(self, name: str, text: str) -> None:
        write_atomically(self / name, lambda file: file.write(text.encode() + b"\n"))

    def end(self) -> None:
        """Remove what was needed to go on."""
        for name in CHECKPOINTS:
            (self / name).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove all that the run wrote, and the folder if nothing else is in it."""
        for name in (*CHECKPOINTS, *RESULTS, RUN):
            (self / name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _check(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: expected a folder, got {str(path)!r}, which is a file; choose another")
        if not path.exists():
            if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
                raise ValueError(
                    f"out: expected a new folder in one that exists and is writable, got {str(path)!r}; choose another"
                )
            return
        if not os.access(path, os.W_OK):
            raise ValueError(f"out: expected a folder that is writable, got {str(path)!r}; choose another")
        if not (self / RUN).is_file():
            others = sorted(p.name for p in path.iterdir() if not p.name.endswith(".part"))
            if others:
                raise ValueError(
                    f"out: expected a new or empty folder, or that of an earlier run, got {str(path)!r}, which holds "
                    f"{others[0]!r}; choose another"
                )
            return
        try:
            before = json.loads((self / RUN).read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise ValueError(f"out: expected the folder of an earlier run, got {str(path)!r}, whose {RUN} is broken")
        for name in {**before, **self.identity}:
            one, other = before.get(name), self.identity.get(name)
            if one != other:
                shown = "other data" if isinstance(one, dict) or isinstance(other, dict) else f"{name} = {one!r}"
                now = "" if isinstance(one, dict) or isinstance(other, dict) else f", not {other!r}"
                raise ValueError(
                    f"out: expected a new folder, or that of the same run, got {str(path)!r}, whose run has {shown}"
                    f"{now}; choose another folder, or remove that one"
                )
