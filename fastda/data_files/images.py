"""Folders of images: a folder for each class, or images alone, which have no labels. Read with Pillow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .labels import encode, listed
from .samples import Samples

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I")


def open_folder(
    path: Path, class_names: Sequence | None, image_size: tuple[int, int] | None, channels: int | None
) -> Samples:
    """Images beside the folders of classes have no label. What begins with a dot, and other files, are left out."""
    files = [(file, "") for file in _images(path)]
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        files += [(file, folder.name) for file in sorted(folder.rglob("*")) if _is_image(file)]
    if not files:
        raise ValueError(
            f"{path}: expected images ({', '.join(SUFFIXES)}), one folder for each class or all in one, got none; "
            "check the path"
        )
    size, found_channels = _size_and_channels(path, [file for file, _ in files], image_size)
    channels = channels or found_channels
    labels, names = None, ()
    if any(name for _, name in files):
        codes, names = encode(f"{path}", np.array([name for _, name in files], dtype=object), class_names)
        labels = torch.from_numpy(codes)

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), rows):
            chosen = files[start : start + rows]
            block = np.empty((len(chosen), channels, *size), np.float32)
            for row, (file, _) in enumerate(chosen):
                block[row] = _pixels(file, size, channels)
            yield block

    return Samples(path, len(files), (channels, *size), blocks, labels, names)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_image(file))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _size_and_channels(path: Path, files: list[Path], wanted) -> tuple[tuple[int, int], int]:
    """Height, width; 1 channel where all images are grey, else 3. Only their headers are read."""
    first, channels = None, 1
    for file in files:
        with _opened(file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # lying on its side
                width, height = height, width
            channels = channels if image.mode in GREY else 3
        if first is None:
            first = file, (height, width)
        if wanted is None and (height, width) != first[1]:
            raise ValueError(
                f"{path}: expected images of one size, got {first[1][1]}×{first[1][0]} pixels in {first[0].name} and "
                f"{width}×{height} in {file.name}; resize them all (--image-size 64)"
            )
    return wanted or first[1], channels


def _pixels(file: Path, size: tuple[int, int], channels: int) -> np.ndarray:
    """(C, H, W) from 0 to 1, upright."""
    from PIL import Image, ImageOps

    with _opened(file) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray(np.asarray(image).astype(np.float32) / 65535)
        elif image.mode != "F":
            image = image.convert("RGB" if channels == 3 else "L")
        if image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(image, dtype=np.float32)
        if image.mode != "F":
            pixels = pixels / 255
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (channels, *size))
    return np.moveaxis(pixels, 2, 0)


@contextmanager
def _opened(file: Path) -> Iterator:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            yield image
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, PermissionError):
            raise
        raise ValueError(
            f"{file}: expected an image that can be read, got {'an empty file' if not file.stat().st_size else error}; "
            "remove or replace it"
        ) from error
