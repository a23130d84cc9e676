"""NumPy's files: .npz with features and labels, .npy with features alone. Nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .labels import encode, listed
from .samples import Samples

FEATURE_KEYS = ("features", "images", "x", "X")
LABEL_KEYS = ("labels", "label", "y", "Y", "targets")
CHANNELS = (1, 3, 4)


def open_npz(path: Path, label: str, class_names: Sequence | None) -> Samples:
    """Features are read from the archive chunk by chunk."""
    with open_archive(path) as archive:
        members = {name[: -len(".npy")]: name for name in archive.namelist() if name.endswith(".npy")}
        if not members:
            found = listed(archive.namelist()) or "nothing"
            raise ValueError(f"{path}: expected arrays as numpy.savez writes them, got {found}; use numpy.savez")
        key = only(path, "features", members, FEATURE_KEYS)
        any_key = label == "label"
        label_key = only(path, "labels", members, LABEL_KEYS if any_key else (label,), needed=not any_key)
        with archive.open(members[key]) as file:
            array = _header(path, key, file, archive.getinfo(members[key]).file_size)
        labels, names = None, ()
        if label_key is not None:
            where = f"{path}, {label_key!r}"
            values = label_values(path, label_key, archive, members[label_key])
            labels, names = encode(where, _one_each(where, values, array.count), class_names)

    def blocks(rows: int) -> Iterator[np.ndarray]:
        with open_archive(path) as archive, archive.open(members[key]) as file:
            again = _header(path, key, file, archive.getinfo(members[key]).file_size)
            if again != array:
                raise ValueError(f"{path}: expected the file that was opened, got another; open it again")
            for count in _counts(array.count, array.count if array.fortran_order else rows):
                yield array.pixels(array.decode(_exactly(path, file, count * array.row_bytes), count))

    return _samples(path, key, array, blocks, labels, names)


def open_npy(path: Path) -> Samples:
    """Features, memory-mapped."""
    with open(path, "rb") as file:
        array = _header(path, "", file, path.stat().st_size)

    def blocks(rows: int) -> Iterator[np.ndarray]:
        mapped, start = np.load(path, mmap_mode="r", allow_pickle=False), 0
        for count in _counts(array.count, rows):
            yield array.pixels(np.asarray(mapped[start : start + count]))
            start += count

    return _samples(path, "", array, blocks, None, ())


class _Array:
    """What an .npy header says of an array of samples."""

    def __init__(self, where: str, shape: tuple[int, ...], fortran_order: bool, dtype: np.dtype) -> None:
        self.stored, self.fortran_order, self.dtype = shape, fortran_order, dtype
        if len(shape) not in (2, 3, 4) or 0 in shape[1:]:
            raise ValueError(
                f"{where}: expected samples × features, N × H × W or N × C × H × W, got shape {shape}; reshape it"
            )
        self.count = shape[0]
        self.row_bytes = dtype.itemsize * math.prod(shape[1:])
        self.channels_last = len(shape) == 4 and shape[1] not in CHANNELS and shape[3] in CHANNELS
        self.shape = shape[1:] if len(shape) != 3 else (1, *shape[1:])
        if self.channels_last:
            self.shape = (shape[3], shape[1], shape[2])

    def __eq__(self, other) -> bool:
        return vars(self) == vars(other)

    def decode(self, data: bytes, count: int) -> np.ndarray:
        values = np.frombuffer(data, self.dtype)
        order = "F" if self.fortran_order else "C"
        return values.reshape((count, *self.stored[1:]), order=order)

    def pixels(self, block: np.ndarray) -> np.ndarray:
        """(n, *shape) in float32; 8-bit images from 0 to 1."""
        if self.channels_last:
            block = np.moveaxis(block, 3, 1)
        with np.errstate(over="ignore"):  # what is too large becomes Inf, which is refused
            values = block.reshape(len(block), *self.shape).astype(np.float32)
        return values / 255 if self.dtype == np.uint8 and len(self.shape) == 3 else values


def _samples(path, key, array, blocks, labels, names) -> Samples:
    if array.count == 0:
        raise ValueError(f"{path}: expected at least one sample, got none; check how it was written")
    return Samples(path, array.count, array.shape, blocks, None if labels is None else torch.from_numpy(labels), names)


def only(path, what: str, members, keys: Sequence[str], needed: bool = True) -> str | None:
    found = [key for key in keys if key in members]
    if len(found) > 1 or (needed and not found):
        got = listed(found) if found else listed(members)
        raise ValueError(
            f"{path}: expected the {what} under {'one of ' if len(keys) > 1 else ''}{listed(keys)}, got {got}; "
            f"numpy.savez(..., {keys[0]}=...) names them so"
        )
    return found[0] if found else None


def _header(path: Path, key: str, file: BinaryIO, size: int) -> _Array:
    where = f"{path}, {key!r}" if key else str(path)
    shape, fortran_order, dtype, start = read_header(path, where, file)
    if dtype.kind not in "biuf":
        raise ValueError(f"{where}: expected features that are numbers, got {dtype}; convert them with .astype(float)")
    check_size(where, size - start, dtype.itemsize * math.prod(shape))
    return _Array(where, shape, fortran_order, dtype)


def read_header(path: Path, where: str, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, order, dtype, and where the data begin. The header is literals alone: nothing is unpickled."""
    start = file.read(8)
    if start[:6] != np.lib.format.MAGIC_PREFIX:
        if start[:1] == b"\x80":
            raise ValueError(_pickled(where))
        raise ValueError(
            f"{where}: expected an array as numpy.save writes it, got {'nothing' if not start else 'something else'}; "
            "write it with numpy.save"
        )
    readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if len(start) < 8 or start[6] not in readers:
        raise ValueError(f"{where}: expected version 1 or 2 of .npy, got another; write it with numpy.save again")
    try:
        shape, fortran_order, dtype = readers[start[6]](file)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{where}: expected the header of an array, got a damaged one; write it again") from error
    if dtype.hasobject:
        raise ValueError(_pickled(where))
    return shape, fortran_order, dtype, file.tell()


def _pickled(where: str) -> str:
    return (
        f"{where}: expected plain numbers, got pickled Python objects, which could run any code and are never loaded; "
        "write an array of numbers (or, for labels, of text) instead, such as numpy.asarray(values, dtype=float)"
    )


def check_size(where: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(
            f"{where}: expected {expected} bytes of data, got {got}: it is truncated; write or copy it again"
        )


def label_values(path: Path, key: str, archive: zipfile.ZipFile, member: str) -> np.ndarray:
    where = f"{path}, {key!r}"
    with archive.open(member) as file:
        shape, fortran_order, dtype, start = read_header(path, where, file)
        size = dtype.itemsize * math.prod(shape)
        check_size(where, archive.getinfo(member).file_size - start, size)
        return np.frombuffer(_exactly(path, file, size), dtype).reshape(shape, order="F" if fortran_order else "C")


def _one_each(where: str, values: np.ndarray, count: int) -> np.ndarray:
    if values.size != count or values.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"{where}: expected {count} labels, one for each sample, got shape {values.shape}; "
            "pass a flat array of as many"
        )
    return values.reshape(count)


def _counts(total: int, rows: int) -> list[int]:
    """How many rows come with each block."""
    return [min(rows, total - start) for start in range(0, total, rows)]


def _exactly(path: Path, file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ValueError(f"{path}: expected more data, got its end: it is truncated; write or copy it again")
    return data


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """The errors of a damaged archive as one sentence."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":
                raise ValueError(_pickled(str(path))) from error
        raise ValueError(
            f"{path}: expected a whole archive as numpy.savez writes it, got a truncated or damaged file ({error}); "
            "write or copy it again"
        ) from error
    except (RuntimeError, NotImplementedError) as error:  # encrypted, or compressed by a method that Python lacks
        raise ValueError(
            f"{path}: expected an archive that numpy wrote, got another ({error}); use numpy.savez"
        ) from error
