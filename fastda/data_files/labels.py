"""Labels as files have them, numbers or text, become class indices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..reference import checks

UNKNOWN = -1
"""The index of no class, of a sample whose label is not known."""
LARGEST = 2**53  # beyond, float64 has no odd numbers


def encode(where: str, values: np.ndarray, class_names: Sequence | None = None) -> tuple[np.ndarray, tuple]:
    """Class indices (N,), int64, UNKNOWN where there is no label; and the names of the classes, sorted.

    Args:
        where: file and column or key, for error messages.
        values: (N,), whole numbers (also as floats or text) or text. Negative ones, NaN, None and "" are unknown.
        class_names: impose these and their order.

    Raises:
        ValueError: labels that are neither; a label that `class_names` does not have.
    """
    values, known = _numbers(where, values) if values.dtype.kind in "biuf" else _text(where, values)
    names, codes = np.unique(values[known], return_inverse=True)
    names = names.tolist()
    indices = np.full(len(values), UNKNOWN, dtype=np.int64)
    if class_names is not None:
        class_names = tuple(class_names)
        position = {name: index for index, name in enumerate(class_names)}
        new = [name for name in names if name not in position]
        if new:
            raise ValueError(
                f"{where}: expected labels among the source's classes, {listed(class_names)}, got {listed(new)} too; "
                "leave these samples out, or their labels empty"
            )
        codes = np.array([position[name] for name in names], dtype=np.int64)[codes]
    indices[known] = codes
    return indices, tuple(names) if class_names is None else class_names


def listed(names: Sequence, most: int = 10) -> str:
    """A few names, and how many there are where these are not all."""
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


def _numbers(where: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, and which of them are labels."""
    if values.dtype.kind == "f":
        known = ~np.isnan(values)
        broken = known & ((values != np.floor(values)) | (np.abs(values) > LARGEST))
        if broken.any():
            row = int(np.flatnonzero(broken)[0])
            raise ValueError(
                f"{where}: expected class labels, whole numbers or text, got {float(values[row])!r} at sample {row}; "
                "continuous values are no classes: bin them first, or name another column with the classes"
            )
        return np.where(known, values, UNKNOWN).astype(np.int64), known & (values >= 0)
    values = values.astype(np.int64)
    return values, values >= 0


def _text(where: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Text, or the whole numbers that all of it says; and which of it are labels."""
    if values.dtype.kind not in "USO":
        raise ValueError(
            f"{where}: expected class labels, whole numbers or text, got {values.dtype}; convert them to one of these"
        )
    texts = ["" if value is None else value for value in values.tolist()]
    texts = [text.decode() if isinstance(text, bytes) else text for text in texts]
    wrong = next((value for value in texts if not isinstance(value, str)), None)
    if wrong is not None:
        raise ValueError(f"{where}: expected labels of text, got {checks.describe(wrong)}; convert all of them to text")
    texts = np.array([text.strip() for text in texts], dtype=object)
    known = texts != ""
    for kind in (np.int64, np.float64):  # float: pandas writes 2.0 where other labels of the column are missing
        try:
            numbers = texts[known].astype(kind)
        except (ValueError, OverflowError):
            continue
        values = np.full(len(texts), UNKNOWN if kind is np.int64 else np.nan, dtype=kind)
        values[known] = numbers
        return _numbers(where, values)
    return texts, known
