"""Tables, .csv and .parquet, a column a feature and one with the labels; read with pyarrow, batch by batch."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .labels import encode, listed
from .samples import Samples

BLOCK_BYTES = 16 * 2**20  # of a .csv; no line may be longer
DELIMITERS = (",", ";", "\t")


def open_csv(path: Path, label: str, class_names: Sequence | None, feature_names: Sequence[str] | None) -> Samples:
    """The first line has the names; columns are separated by commas, semicolons or tabs."""
    from pyarrow import csv as arrow

    first, second = first_lines(path)
    delimiter = delimiter_of(first)
    names = next(csv.reader([first], delimiter=delimiter))
    _check_names(path, names)
    decimal = "," if delimiter == ";" and "," in second and "." not in second else "."
    parsing = arrow.ParseOptions(delimiter=delimiter)
    reading = arrow.ReadOptions(block_size=BLOCK_BYTES)

    def batches(columns: list[str], types: dict | None, rows: int = 0) -> Iterator:
        converting = arrow.ConvertOptions(
            include_columns=columns, column_types=types, strings_can_be_null=True, decimal_point=decimal
        )
        return iter(arrow.open_csv(path, reading, parsing, converting))

    with sentences(path):
        import pyarrow

        beginning = next(batches(names, {label: pyarrow.string()} if label in names else None), None)
        if beginning is None or beginning.num_rows == 0:
            raise ValueError(_empty(path))
    return _samples(path, beginning.schema, batches, label, class_names, feature_names)


def open_parquet(path: Path, label: str, class_names: Sequence | None, feature_names: Sequence[str] | None) -> Samples:
    """The index of a pandas table is left out."""
    from pyarrow import parquet

    with sentences(path), parquet.ParquetFile(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    if count == 0:
        raise ValueError(f"{path}: expected at least one row, got none; check how it was written")

    def batches(columns: list[str], types: dict | None, rows: int = 65_536) -> Iterator:
        with parquet.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)

    return _samples(path, schema, batches, label, class_names, feature_names)


def _samples(path: Path, schema, batches: Callable, label: str, class_names, feature_names) -> Samples:
    """Names and types checked, labels read."""
    import pyarrow

    alike = [name for name in schema.names if name.strip().lower() == label.lower()]
    if alike and label not in alike:
        raise ValueError(
            f"{path}: expected labels in a column {label!r}, got one named {alike[0]!r}; rename it, or pass its name "
            "(--label)"
        )
    columns = [name for name in schema.names if name != label and not name.startswith("__index_level_")]
    if feature_names is not None:
        missing = [name for name in feature_names if name not in columns]
        if missing:
            raise ValueError(
                f"{path}: expected a column for each feature of the source, got none named {listed(missing)}; "
                f"it has {listed(columns)}"
            )
        columns = list(feature_names)
    if not columns:
        raise ValueError(f"{path}: expected columns of features, got {listed(schema.names)} alone; add the features")
    text = [name for name in columns if not _is_number(schema.field(name).type)]
    if text:
        kinds = sorted({str(schema.field(name).type) for name in text})
        raise ValueError(
            f"{path}: expected columns of numbers beside {label!r}, got {listed(text)} of {', '.join(kinds)}; drop or "
            "encode them, or name the column of labels (--label)"
        )
    types = {name: pyarrow.float64() for name in columns} | {label: pyarrow.string()}
    codes, names = None, ()
    with sentences(path):
        if label in schema.names:
            parts = [as_array(batch.column(0)) for batch in batches([label], types)]
            count = sum(map(len, parts))
            codes, names = encode(f"{path}, column {label!r}", stacked(parts), class_names)
            codes = torch.from_numpy(codes)
        else:
            count = sum(batch.num_rows for batch in batches(columns[:1], types))

    def blocks(rows: int) -> Iterator[np.ndarray]:
        with sentences(path):
            for batch in batches(columns, types, rows):
                values = np.empty((batch.num_rows, len(columns)), np.float32)
                with np.errstate(over="ignore"):  # what is too large becomes Inf, which is refused
                    for column, name in enumerate(columns):
                        values[:, column] = _as_floats(batch.column(name))
                yield values

    return Samples(path, count, (len(columns),), blocks, codes, names, tuple(columns))


def first_lines(path: Path) -> tuple[str, str]:
    with open(path, "rb") as file:
        lines = [file.readline(BLOCK_BYTES) for _ in range(2)]
    first, second = (line.decode("utf-8-sig", errors="replace").strip("\r\n") for line in lines)
    if "\x00" in first:
        raise ValueError(f"{path}: expected text in UTF-8, got binary data or UTF-16; save it as CSV UTF-8")
    if not first or not lines[1]:
        raise ValueError(_empty(path))
    return first, second


def _empty(path: Path) -> str:
    return f"{path}: expected a line of names and one for each sample, got no sample; check how it was written"


def delimiter_of(header: str) -> str:
    return max(DELIMITERS, key=header.count)


def _check_names(path: Path, names: list[str]) -> None:
    """Columns without a name, several of one name, and a first line that is no header."""
    if "" in names:
        raise ValueError(
            f"{path}: expected a name for each column in the first line, got none for column {names.index('') + 1}; "
            "name it, or drop it where it is an index (pandas: to_csv(..., index=False))"
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"{path}: expected each column to have its own name, got {listed(twice)} twice; rename them")
    if all(map(_is_float, names)) and names not in ([str(i + k) for i in range(len(names))] for k in (0, 1)):
        raise ValueError(
            f"{path}: expected the names of the columns in the first line, got numbers, {listed(names, 3)}; add a line "
            "with names"
        )


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_number(kind) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind)


def _as_floats(column) -> np.ndarray:
    """(n,), float64; NaN where there is no value."""
    import pyarrow

    if not pyarrow.types.is_floating(column.type):
        column = column.cast(pyarrow.float64())
    return column.to_numpy(zero_copy_only=False)


def as_array(column) -> np.ndarray:
    """Of labels: numbers, or objects."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_null(column.type):
        return np.full(len(column), None, dtype=object)
    if pyarrow.types.is_decimal(column.type):
        column = column.cast(pyarrow.float64())
    if pyarrow.types.is_boolean(column.type):
        column = column.cast(pyarrow.int8())
    return column.to_numpy(zero_copy_only=False)


def stacked(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(parts))


@contextmanager
def sentences(path: Path) -> Iterator[None]:
    """pyarrow's errors as one sentence that names the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # the system's, which say enough
            raise
        message = " ".join(str(error).split())
        raise ValueError(
            f"{path}: expected a whole table of numbers, got one that pyarrow cannot read ({message}); correct it, or "
            "write or copy it again"
        ) from error
