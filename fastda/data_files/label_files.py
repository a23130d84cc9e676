"""Labels alone, from a file of their own: those that accuracy is measured on."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .arrays import LABEL_KEYS, check_size, label_values, only, open_archive, read_header
from .labels import UNKNOWN, encode, listed
from .opening import needs, open_samples
from .tables import as_array, delimiter_of, first_lines, sentences, stacked


def open_labels(path: str | os.PathLike, *, count: int, class_names: Sequence, label: str = "label") -> Tensor:
    """One label for each of so many samples, as positions in `class_names`, -1 where unknown.

    Args:
        path: an .npz with labels under one of `labels`, `label`, `y`; an .npy; a .csv or .parquet with a column of
            labels; a folder with a folder of images for each class. Features beside them are not looked at.
        count: how many samples there are.
        class_names: names of the classes.
        label: name of the column, or key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no labels, another number of them, labels of other classes, a damaged or pickled file.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> from fastda.data_files import open_labels
        >>> file = pathlib.Path(tempfile.mkdtemp(), "labels.npz")
        >>> numpy.savez(file, labels=["dog", "", "cat"])
        >>> open_labels(file, count=3, class_names=("cat", "dog"))
        tensor([ 1, -1,  0])
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a file of labels, got nothing of that name; check the path")
    suffix = "" if path.is_dir() else path.suffix.lower()
    if suffix == ".npz":
        where, values = _from_npz(path, label)
    elif suffix == ".npy":
        where, values = str(path), _from_npy(path)
    elif suffix in (".csv", ".parquet"):
        with needs("pyarrow", path):
            where, values = f"{path}, column {label!r}", _from_table(path, label)
    elif path.is_dir():
        labels = open_samples(path, class_names=class_names).labels
        return _checked(path, torch.full((count,), UNKNOWN) if labels is None else labels, count)
    else:
        raise ValueError(
            f"{path}: expected labels in .npz, .npy, .csv, .parquet or a folder of images, got the ending "
            f"{path.suffix!r}; convert it to one of these"
        )
    indices, _ = encode(where, values.ravel(), class_names)
    return _checked(path, torch.from_numpy(indices), count)


def _checked(path: Path, labels: Tensor, count: int) -> Tensor:
    if len(labels) != count:
        raise ValueError(
            f"{path}: expected a label for each of the {count} samples, got {len(labels)}; give as many, in the same "
            "order, empty or negative where unknown"
        )
    if (labels == UNKNOWN).all():
        raise ValueError(f"{path}: expected labels, got none that is known; add some")
    return labels


def _from_npz(path: Path, label: str) -> tuple[str, np.ndarray]:
    with open_archive(path) as archive:
        members = {name[: -len(".npy")]: name for name in archive.namelist() if name.endswith(".npy")}
        key = only(path, "labels", members, LABEL_KEYS if label == "label" else (label,))
        return f"{path}, {key!r}", label_values(path, key, archive, members[key])


def _from_npy(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        shape, _, dtype, start = read_header(path, str(path), file)
        size = dtype.itemsize * math.prod(shape)
        check_size(str(path), path.stat().st_size - start, size)
        return np.frombuffer(file.read(size), dtype)


def _from_table(path: Path, label: str) -> np.ndarray:
    import pyarrow
    from pyarrow import csv as arrow
    from pyarrow import parquet

    with sentences(path):
        if path.suffix.lower() == ".parquet":
            names = parquet.read_schema(path).names
        else:
            header, _ = first_lines(path)
            parsing = arrow.ParseOptions(delimiter=delimiter_of(header))
            names = next(csv.reader([header], delimiter=parsing.delimiter))
        if label not in names:
            raise ValueError(
                f"{path}: expected a column {label!r} of labels, got {listed(names)}; name it (--label)"
            )
        if path.suffix.lower() == ".parquet":
            table = parquet.read_table(path, columns=[label])
        else:
            options = {"include_columns": [label], "column_types": {label: pyarrow.string()}}
            converting = arrow.ConvertOptions(**options, strings_can_be_null=True)
            table = arrow.read_csv(path, parse_options=parsing, convert_options=converting)
        return stacked([as_array(chunk) for chunk in table.column(0).chunks] or [np.zeros(0)])
