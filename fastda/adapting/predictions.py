"""Predictions as a table: row, label, confidence."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

from ..files import write_atomically

HEADINGS = ("row", "label", "confidence")


def write_predictions(path: Path, logits: Iterable[Tensor], classes: Sequence) -> None:
    """Write a CSV file, whole or not at all, chunk by chunk.

    Args:
        path: of the file.
        logits: chunks (n, C), in the order of the rows.
        classes: names.
    """

    def write(file) -> None:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        table, row = csv.writer(text, lineterminator="\n"), 0
        table.writerow(HEADINGS)
        for chunk in logits:
            confidence, predicted = chunk.double().softmax(1).max(1)
            for sure, index in zip(confidence.tolist(), predicted.tolist()):
                table.writerow((row, classes[index], f"{sure:.6f}"))
                row += 1
        text.flush()
        text.detach()

    write_atomically(path, write)
