"""One function for all kinds of files, and one for the two domains that belong together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..reference import checks
from .arrays import open_npy, open_npz
from .images import open_folder
from .labels import listed
from .samples import Samples
from .tables import open_csv, open_parquet

FORMATS = ".npz, .npy, .csv, .parquet, or a folder of images"


def open_samples(
    path: str | os.PathLike,
    *,
    label: str = "label",
    class_names: Sequence | None = None,
    feature_names: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
) -> Samples:
    """Open features or images, with labels or without; what they are comes from the ending of the name.

    - `.npz`: features under one of `features`, `images`, `x`, `X`; labels under one of `labels`, `label`, `y`, `Y`,
      `targets`. Features (N, D), images (N, H, W), (N, C, H, W) or (N, H, W, C); uint8 images are divided by 255.
    - `.npy`: the same, without labels; memory-mapped.
    - `.csv`, `.parquet`: a column a feature, all of them numbers, and one of labels. A first line of names; separated
      by commas, semicolons or tabs. Needs pyarrow.
    - a folder of images, such as .png or .jpg: a folder for each class, or images alone, which then have no labels.
      Needs Pillow.

    Only the labels are read now; features come from `chunks()` and `read()` of what this returns. Labels are whole
    numbers (as numbers or text) or text; negative ones, NaN and empty ones are unknown.

    Args:
        path: of the file or folder.
        label: name of the column, or key, that has the labels.
        class_names: the source's, so that the same label is the same class; by default those that are found, sorted.
        feature_names: the source's, to take the same columns of a table in the same order.
        image_size: pixels, side or (height, width): resize the images of a folder.
        channels: 1 or 3, of the images of a folder; by default 1 where all are grey.

    Raises:
        FileNotFoundError: no such file.
        ValueError: what cannot be read, says why in a sentence: unknown ending, empty, truncated, pickled, columns that
            are not numbers, labels that are neither whole numbers nor text, images of several sizes.
        ModuleNotFoundError: pyarrow or Pillow is missing: `pip install 'fastda-kernels[files]'`.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> from fastda.data_files import open_samples
        >>> file = pathlib.Path(tempfile.mkdtemp(), "pets.npz")
        >>> numpy.savez(file, features=numpy.eye(3, 4), labels=["dog", "cat", "dog"])
        >>> pets = open_samples(file)
        >>> len(pets), pets.shape, pets.class_names, pets.labels
        (3, (4,), ('cat', 'dog'), tensor([1, 0, 1]))
        >>> [len(features) for features, labels in pets.chunks(2)]
        [2, 1]
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected {FORMATS}, got nothing of that name; check the path")
    size = _as_size(image_size)
    if channels is not None:
        checks.option("channels", channels, (1, 3))
    if path.is_dir():
        with needs("Pillow", path):
            return open_folder(path, class_names, size, channels)
    suffix = path.suffix.lower()
    if suffix not in (".npz", ".npy", ".csv", ".parquet"):
        raise ValueError(f"{path}: expected {FORMATS}, got the ending {suffix!r}; convert it to one of these")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: expected samples, got an empty file; check how it was written")
    if suffix == ".npz":
        samples = open_npz(path, label, class_names)
    elif suffix == ".npy":
        samples = open_npy(path)
    else:
        with needs("pyarrow", path):
            reader = open_csv if suffix == ".csv" else open_parquet
            samples = reader(path, label, class_names, feature_names)
    if size is not None and samples.shape[1:] != size:
        raise ValueError(
            f"{path}: expected a folder of images where an image size is given, got samples of shape {samples.shape}; "
            "leave the size out, or resize what the file holds"
        )
    return samples


def open_pair(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    label: str = "label",
    image_size: int | tuple[int, int] | None = None,
    labelled: bool = True,
) -> tuple[Samples, Samples]:
    """Open a labelled source, and a target of the same shape, with the source's classes and columns.

    Args:
        source, target: paths, as of :func:`open_samples`; the two need not be of one format.
        label: name of the column, or key, that has the labels.
        image_size: pixels, side or (height, width): resize the images of folders.
        labelled: insist on labels of the source, and on none in the target that are of other classes. Without, the
            target has its own `class_names`, of which some have to be the source's if both have labels.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as of :func:`open_samples`.
        ValueError: as there; a source without labels, with unknown ones or with one class only; other shapes; labels in
            the target that the source does not have.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> from fastda.data_files import open_pair
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> numpy.savez(folder / "studio.npz", features=numpy.eye(3, 4), labels=["dog", "cat", "eel"])
        >>> numpy.savez(folder / "phone.npz", features=numpy.eye(2, 4), labels=["eel", ""])
        >>> source, target = open_pair(folder / "studio.npz", folder / "phone.npz")
        >>> source.class_names, target.labels
        (('cat', 'dog', 'eel'), tensor([ 2, -1]))
    """
    options = {"label": label, "image_size": image_size}
    first = open_samples(source, **options)
    if labelled or first.labels is not None:
        check_labelled(first, label)
    same = {"class_names": first.class_names if labelled else None, "feature_names": first.feature_names or None}
    second = open_samples(target, **options, **same)
    if {first.shape[0], second.shape[0]} == {1, 3} and first.shape[1:] == second.shape[1:]:  # one of them is grey
        if first.shape[0] == 1 and first.path.is_dir():
            first = open_samples(source, **options, channels=3)
        elif second.shape[0] == 1 and second.path.is_dir():
            second = open_samples(target, **options, **same, channels=3)
    check_same_shape(first, second)
    if first.class_names and second.class_names and not set(first.class_names) & set(second.class_names):
        raise ValueError(
            f"{second.path}: expected labels of the classes of {first.path}, {listed(first.class_names)}, got "
            f"{listed(second.class_names)}; label both alike, or name the column of labels (--label)"
        )
    return first, second


def check_labelled(samples: Samples, label: str = "label") -> None:
    """Raise a ValueError unless every sample has a label, and there are two classes at least."""
    if samples.labels is None:
        columns = samples.feature_names
        has = f"it has the columns {listed(columns)}" if columns else "see --help for formats"
        raise ValueError(
            f"{samples.path}: expected a label of each sample, got none, under {label!r} or elsewhere; add them, or "
            f"name where they are (--label); {has}"
        )
    unknown = len(samples) - samples.num_labelled
    if unknown:
        raise ValueError(
            f"{samples.path}: expected a label of each sample, got {unknown} of {len(samples)} without (negative, "
            "empty or NaN); leave these samples out"
        )
    if len(samples.class_names) < 2:
        raise ValueError(
            f"{samples.path}: expected labels of at least two classes, got {listed(samples.class_names)} alone; add "
            "samples of others"
        )


def check_same_shape(source: Samples, target: Samples) -> None:
    """Raise a ValueError unless the samples of both have the same shape."""
    if source.shape == target.shape:
        return
    what = "features" if len(source.shape) == len(target.shape) == 1 else "images or features of the same shape"
    cure = "take both from the same columns or layer"
    if len(source.shape) == len(target.shape) == 3:
        cure = "resize the images of folders with --image-size"
    extra = [name for name in target.feature_names if name not in source.feature_names] if source.feature_names else []
    if extra:
        cure += f"; only the target has {listed(extra)}"
    raise ValueError(
        f"{target.path}: expected {what} as in {source.path}, {_words(source.shape)}, got {_words(target.shape)}; "
        f"{cure}"
    )


def _words(shape: tuple[int, ...]) -> str:
    return f"{shape[0]} features" if len(shape) == 1 else "×".join(map(str, shape))


def _as_size(image_size) -> tuple[int, int] | None:
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2:
        raise ValueError(
            f"image_size: expected a side or (height, width), got {checks.describe(image_size)}; pass one of these"
        )
    return tuple(checks.whole_number("image_size", side, 1) for side in sides)


@contextmanager
def needs(library: str, path: Path) -> Iterator[None]:
    """A missing library as a sentence that says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: to read it, expected {library} to be installed, got none; pip install 'fastda-kernels[files]'",
            name=error.name,
        ) from error
