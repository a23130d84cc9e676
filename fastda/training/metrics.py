"""Rows of metrics: to a CSV or JSON-lines file, and to TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from pathlib import Path

from ..files import check_writable

SUFFIXES = (".csv", ".jsonl")


class MetricsFile:
    """A CSV (.csv) or JSON-lines (.jsonl) file that grows by a row at a time, and can be cut back to an earlier
    length."""

    def __init__(self, path: str | os.PathLike, columns: list[str]) -> None:
        self.path, self.columns = Path(path), columns
        if self.path.suffix not in SUFFIXES:
            raise ValueError(f"log: expected a file that ends in {' or '.join(SUFFIXES)}, got {str(path)!r}; rename it")
        check_writable("log", self.path)

    def begin(self, length: int = 0) -> None:
        """Cut the file to a length that it had, or begin anew."""
        if length and self.path.exists() and self.path.stat().st_size >= length:
            os.truncate(self.path, length)
        elif length:
            raise ValueError(
                f"log: expected the file that the checkpoint goes with, of at least {length} bytes, got "
                f"{str(self.path)!r}; put it back, or remove the checkpoint"
            )
        else:
            header = self._line(self.columns) if self.path.suffix == ".csv" else ""
            self.path.write_text(header, encoding="utf-8")

    def write(self, row: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            if self.path.suffix == ".csv":
                file.write(self._line([row.get(column, "") for column in self.columns]))
            else:
                finite = {key: None if math.isnan(value) or math.isinf(value) else value for key, value in row.items()}
                file.write(json.dumps(finite, allow_nan=False) + "\n")

    @property
    def length(self) -> int:
        return self.path.stat().st_size

    @staticmethod
    def _line(values: list) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue()


def tensorboard(folder: str | os.PathLike, first_step: int):
    """A writer to TensorBoard; what an interrupted run wrote after the step that training goes on from is hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            f"tensorboard: expected TensorBoard to be installed, got: {error}; pip install tensorboard, or pass None"
        ) from error
    return SummaryWriter(str(folder), purge_step=first_step or None)
