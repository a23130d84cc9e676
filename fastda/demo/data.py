"""Two domains of handwritten digits: as scanned in a studio, and as photographed with a phone.

The digits are the 1797 real ones that ship with scikit-learn (8×8 pixels, UCI optical recognition of handwritten
digits), enlarged to 16×16 so that blur has pixels to act on. Each digit goes into one part of one domain, so no image,
however distorted, is in two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 16  # pixels
NUM_CLASSES = 10
HELD_OUT_SEED = 2024  # which digits are held out: the same for every training seed, so that tuning can leave them alone
SOURCE_TEST, TARGET_TEST = 250, 400  # images


@dataclass(frozen=True)
class Phone:
    """What a phone's camera does to a studio image; each photograph draws its own value, uniformly from a range.

    Light is measured in units in which white paper in the studio is 1 and ink is 0.
    """

    blur: tuple[float, float] = (0.6, 1.1)
    """Standard deviation of the lens's Gaussian blur, pixels: a hand-held close-up is a little out of focus."""
    exposure: tuple[float, float] = (0.6, 1.0)
    """Light on the paper where it is brightest: indoors it is dimmer than on the scanner."""
    falloff: tuple[float, float] = (0.2, 0.6)
    """Share of that light missing on the side away from the lamp: a desk lamp or a window lights from one side."""
    contrast: tuple[float, float] = (0.15, 0.4)
    """Share of the paper's contrast that is left: stray light in the lens and automatic exposure lift the blacks."""
    veil: tuple[float, float] = (0.4, 0.6)
    """Grey towards which contrast is lost: what stray light adds up to where nothing else arrives."""
    read_noise: tuple[float, float] = (0.005, 0.015)
    """Standard deviation of the sensor's noise in the dark: small pixels at a high gain."""
    shot_noise: tuple[float, float] = (0.01, 0.03)
    """Standard deviation of the photon noise at light 1; it grows with the root of the light."""


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 16, 16) in [0, 1], float32; labels (N,), 0 to 9; and which of the 1797 digits they are."""

    images: Tensor
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Domains:
    """Clean source, phone target. The methods know the labels of `source_train`, and the images of `target_train`."""

    source_train: Digits
    source_test: Digits
    target_train: Digits
    target_test: Digits


def studio_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits as dark ink on white paper, (1797, 16, 16) in [0, 1], float64; and their labels."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    ink = torch.from_numpy(ink).reshape(-1, 1, 8, 8) / 16
    ink = F.interpolate(ink, size=(SIDE, SIDE), mode="bicubic", align_corners=False).clamp(0, 1)
    return 1 - ink.squeeze(1).numpy(), labels.astype(np.int64)


def photograph(images: np.ndarray, seed: int, phone: Phone = Phone()) -> np.ndarray:
    """Phone photographs of studio images (N, H, W) in [0, 1]; the same seed gives the same photographs.

    In the order in which light meets it: uneven light on the paper, blur and stray light in the lens, noise of the
    sensor, and the 8 bits of the file.
    """
    random = np.random.default_rng(seed)
    count, height, width = images.shape

    def draw(bounds: tuple[float, float]) -> np.ndarray:
        return random.uniform(*bounds, size=(count, 1, 1))

    angle = draw((0, 2 * np.pi))  # where the lamp stands
    y, x = np.linspace(-0.5, 0.5, height)[:, None], np.linspace(-0.5, 0.5, width)
    away = 0.5 + (x * np.cos(angle) + y * np.sin(angle)) / (np.abs(np.cos(angle)) + np.abs(np.sin(angle)))  # 0 to 1
    light = images * draw(phone.exposure) * (1 - draw(phone.falloff) * away)

    sigma = draw(phone.blur)
    light = blur_matrix(height, sigma) @ light @ blur_matrix(width, sigma).swapaxes(1, 2)
    contrast = draw(phone.contrast)
    light = contrast * light + (1 - contrast) * draw(phone.veil)

    deviation = np.sqrt(draw(phone.read_noise) ** 2 + draw(phone.shot_noise) ** 2 * light)
    light = light + deviation * random.standard_normal(light.shape)
    return np.round(255 * light.clip(0, 1)) / 255


def blur_matrix(side: int, sigma: np.ndarray) -> np.ndarray:
    """Gaussian blur along one axis as matrices (N, side, side); sigma (N, 1, 1) in pixels. White paper stays white."""
    pixel = np.arange(side)
    weights = np.exp(-0.5 * ((pixel[:, None] - pixel) / sigma) ** 2)
    return weights / weights.sum(axis=-1, keepdims=True)


def make_domains(seed: int, *, development: bool = False, phone: Phone = Phone()) -> Domains:
    """Divide the digits among the two domains and photograph the target's.

    Args:
        seed: which training digits are source and which target, and the photographs of all target digits. Which digits
            are held out for testing does not depend on it.
        development: leave the held-out digits away altogether and hold out a part of the training digits instead. All
            hyperparameters of the demo were chosen on such data.
        phone: the camera.
    """
    images, labels = studio_digits()
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(labels))
    source_test, target_test, train = np.split(order, [SOURCE_TEST, SOURCE_TEST + TARGET_TEST])
    train = np.random.default_rng(seed).permutation(train)
    if development:
        source_test, target_test, train = np.split(train, [150, 400])
    source_train, target_train = np.array_split(train, 2)

    def digits(index: np.ndarray, photograph_seed: int | None = None) -> Digits:
        pictures = images[index] if photograph_seed is None else photograph(images[index], photograph_seed, phone)
        pictures = torch.from_numpy(pictures).float().unsqueeze(1)
        return Digits(pictures, torch.from_numpy(labels[index]), torch.from_numpy(index))

    train_photographs, test_photographs = np.random.SeedSequence(seed).generate_state(2)
    return Domains(
        source_train=digits(source_train),
        source_test=digits(source_test),
        target_train=digits(target_train, int(train_photographs)),
        target_test=digits(target_test, int(test_photographs)),
    )
