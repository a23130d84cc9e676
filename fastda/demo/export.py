"""The demo's domains as files, as somebody would have them who meets them in practice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import write_atomically
from .data import make_domains

FILES = ("source.npz", "target.npz", "target_labels.npz", "target_test.npz")


def write_domains(folder: Path, seed: int = 0) -> Iterator[tuple[Path, str]]:
    """Write what `fastda demo` trains on with this seed; gives each file, once it is written, and what is in it.

    The target has no labels: those are in a file of their own, for whoever wants to know how well it went.
    """
    folder.mkdir(parents=True, exist_ok=True)
    domains = make_domains(seed)
    source, target, test = domains.source_train, domains.target_train, domains.target_test
    contents = (
        ({"images": source.images, "labels": source.labels}, f"{len(source)} studio images with labels"),
        ({"images": target.images}, f"{len(target)} phone images of other digits, without labels"),
        ({"labels": target.labels}, "their labels, to measure with"),
        ({"images": test.images, "labels": test.labels}, f"{len(test)} more phone images with labels, to measure with"),
    )
    for name, (arrays, words) in zip(FILES, contents):
        arrays = {key: value.numpy() for key, value in arrays.items()}
        write_atomically(folder / name, lambda file, arrays=arrays: np.savez_compressed(file, **arrays))
        yield folder / name, words
