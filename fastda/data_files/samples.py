"""What was opened: its size, its labels, and its features chunk by chunk or all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..reference import checks
from .labels import UNKNOWN
from .memory import available_memory, gibibytes

CHUNK_BYTES = 64 * 2**20
Blocks = Callable[[int], Iterable[np.ndarray]]


@dataclass(frozen=True, eq=False)
class Samples:
    """A file or folder of samples, of which only the labels are in memory. :func:`open_samples` makes it.

    Attributes:
        path: of the file or folder.
        shape: of one sample: (D,) features, or (C, H, W) pixels from 0 to 1 if they were stored as 8 bits.
        labels: (N,), int64, positions in `class_names`, -1 where unknown; None where the file has no labels.
        class_names: sorted, or those that were imposed; int where all are whole numbers, else str. () without labels.
        feature_names: of the columns of a table; () for arrays and images.
        blocks: gives arrays (n, *shape), float32, in order, where asked for about so many rows each.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    blocks: Blocks = field(repr=False)
    labels: Tensor | None = field(default=None, repr=False)
    class_names: tuple = ()
    feature_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def nbytes(self) -> int:
        """Of all features in float32."""
        return 4 * self.count * math.prod(self.shape)

    @property
    def num_labelled(self) -> int:
        """How many labels are known."""
        return 0 if self.labels is None else int((self.labels != UNKNOWN).sum())

    def chunks(self, rows: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Features (n, *shape), float32, and labels (n,) or None, in the file's order, `rows` at a time.

        By default so many that a chunk takes 64 MiB. The file is read anew each time.

        Raises:
            ValueError: NaN or Inf, with sample and feature; what cannot be decoded.
        """
        if rows is None:
            rows = max(1, CHUNK_BYTES // max(1, 4 * math.prod(self.shape)))
        checks.whole_number("rows", rows, 1)
        start = 0
        for block in _regrouped(self.blocks(rows), rows):
            self._check_finite(block, start)
            stop = start + len(block)
            yield torch.from_numpy(block), None if self.labels is None else self.labels[start:stop]
            start = stop
        if start != self.count:
            raise ValueError(f"{self.path}: expected {self.count} samples, got {start}; it changed, open it again")

    def read(self) -> tuple[Tensor, Tensor | None]:
        """All features (N, *shape), float32, and labels (N,) or None.

        Raises:
            ValueError: more than fits into memory, before it is tried; as :meth:`chunks`.
        """
        self.check_memory()
        features, start = torch.empty(self.count, *self.shape), 0
        for chunk, _ in self.chunks():
            features[start : start + len(chunk)] = chunk
            start += len(chunk)
        return features, self.labels

    def draw(self, most: int, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        """At most so many samples, drawn at random without replacement, in the file's order; read in chunks."""
        checks.whole_number("most", most, 1)
        if self.count <= most:
            return self.read()
        chosen = np.sort(np.random.default_rng(seed).choice(self.count, most, replace=False))
        self.check_memory(most)
        parts, start = [], 0
        for chunk, _ in self.chunks():
            here = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(chunk))]
            parts.append(chunk[torch.from_numpy(here - start)])
            start += len(chunk)
        return torch.cat(parts), None if self.labels is None else self.labels[torch.from_numpy(chosen)]

    def check_memory(self, count: int | None = None, copies: int = 1) -> None:
        """Raise a ValueError where so many samples (by default all) do not fit into memory, so many times."""
        count = self.count if count is None else count
        needed, there = 4 * copies * count * math.prod(self.shape), available_memory()
        if there is not None and needed > there:
            raise ValueError(
                f"{self.path}: expected samples that fit into memory, got {count} of shape {self.shape}, which take "
                f"{gibibytes(needed)} to work with where {gibibytes(there)} are there; take fewer samples or features"
            )

    def _check_finite(self, block: np.ndarray, start: int) -> None:
        if np.isfinite(block).all():
            return
        row, *place = (int(index) for index in np.argwhere(~np.isfinite(block))[0])
        value = block[(row, *place)]
        if self.feature_names:
            where = f"column {self.feature_names[place[0]]!r}"
        else:
            where = f"feature {place[0]}" if len(place) == 1 else f"pixel {tuple(place)}"
        raise ValueError(
            f"{self.path}: expected finite numbers in float32, got {value} at sample {start + row}, {where} (counted "
            "from 0); drop such samples or fill them in"
        )


def _regrouped(blocks: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """The same rows, so many at a time, the last ones fewer; each an array of its own."""
    waiting, count = [], 0
    for block in blocks:
        while len(block):
            part = block[: rows - count]
            block = block[len(part) :]
            waiting.append(part)
            count += len(part)
            if count == rows:
                yield _joined(waiting)
                waiting, count = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)
