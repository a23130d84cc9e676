"""Shifts whose kind is known, made from scikit-learn's real handwritten digits: what the diagnosis is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..demo.data import SIDE, photograph, studio_digits

RARE = 0.01  # in the target, of a class that is 10 % of the source
NUM_SOURCE, NUM_TARGET = 790, 500
LARGEST_CLASS = 95  # target images of a class, so that 79 are left of each for the source


@dataclass(frozen=True)
class KnownShift:
    """Two samples of digits and what was done to the second. Features (N, 64) in [0, 1]; no digit is in both."""

    source: np.ndarray
    target: np.ndarray
    source_labels: np.ndarray
    target_labels: np.ndarray
    kinds: tuple[str, ...]
    target_frequencies: np.ndarray
    """Of the classes, from which the target's labels were drawn."""


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """The 1797 digits, (1797, 64) in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    ink, labels = load_digits(return_X_y=True)
    return ink / 16, labels.astype(np.int64)


def frequencies(rare: tuple[int, ...] = ()) -> np.ndarray:
    """Each class alike, but for the rare ones."""
    q = np.full(10, (1 - RARE * len(rare)) / (10 - len(rare)))
    q[list(rare)] = RARE
    return q


def divide(labels: np.ndarray, q: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a source with as many of each class, and of a target whose labels are drawn with frequencies q."""
    while True:
        counts = random.multinomial(NUM_TARGET, q)
        if counts.max() <= LARGEST_CLASS:
            break
    source, target = [], []
    for digit, count in enumerate(counts):
        own = random.permutation(np.flatnonzero(labels == digit))
        target.append(own[:count])
        source.append(own[count : count + NUM_SOURCE // 10])
    return random.permutation(np.concatenate(source)), random.permutation(np.concatenate(target))


def make(name: str, seed: int) -> KnownShift:
    """One of :data:`KNOWN_SHIFTS`."""
    random = np.random.default_rng(seed)
    return KNOWN_SHIFTS[name](random)


def no_shift(random) -> KnownShift:
    return label_shift(random, ())


def label_shift(random, rare=(1,)) -> KnownShift:
    """Some classes are rare in the target; the images of a class are what they were."""
    images, labels = pixels()
    q = frequencies(rare)
    s, t = divide(labels, q, random)
    return KnownShift(images[s], images[t], labels[s], labels[t], ("label",) if rare else (), q)


def phone(random, rare=()) -> KnownShift:
    """The target is photographed with a phone: `fastda demo`'s blur, light and noise."""
    images, labels = studio_digits()
    q = frequencies(rare)
    s, t = divide(labels, q, random)
    target = photograph(images[t], int(random.integers(2**31)))
    kinds = ("covariate", "label") if rare else ("covariate",)
    return KnownShift(halved(images[s]), halved(target), labels[s], labels[t], kinds, q)


def halved(images: np.ndarray) -> np.ndarray:
    """16×16 pixels averaged to 8×8."""
    return images.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).mean((2, 4)).reshape(len(images), -1)


def noise(random, rare=(), deviation: float = 0.15) -> KnownShift:
    """The target's sensor is noisier."""
    known = label_shift(random, rare)
    target = (known.target + deviation * random.standard_normal(known.target.shape)).clip(0, 1)
    kinds = ("covariate", "label") if rare else ("covariate",)
    return KnownShift(known.source, target, known.source_labels, known.target_labels, kinds, known.target_frequencies)


def thick_pens(random) -> KnownShift:
    """Within each class, digits with much ink are likelier to be in the target: selected by what is seen."""
    images, labels = pixels()
    ink = images.mean(1)
    source, target = [], []
    for digit in range(10):
        own = random.permutation(np.flatnonzero(labels == digit))
        z = (ink[own] - ink[own].mean()) / ink[own].std()
        chance = random.random(len(own)) < 1 / (1 + np.exp(-1.5 * z))
        target.append(own[chance][: NUM_TARGET // 10])
        source.append(own[~chance][: NUM_SOURCE // 10])
    s, t = random.permutation(np.concatenate(source)), random.permutation(np.concatenate(target))
    return KnownShift(images[s], images[t], labels[s], labels[t], ("covariate",), frequencies())


def selected(random) -> KnownShift:
    """Digits with much ink in the lower half are likelier to be in the target, whatever they are.

    p(y | x) is kept, and p(y) changes with p(x), since some digits have more ink there.
    """
    images, labels = pixels()
    score = images[:, 32:].mean(1)
    z = (score - score.mean()) / score.std()
    chance = random.random(len(labels)) < 1 / (1 + np.exp(-1.5 * z))
    t = random.permutation(np.flatnonzero(chance))[:NUM_TARGET]
    s = random.permutation(np.flatnonzero(~chance))[:NUM_SOURCE]
    q = np.bincount(labels, weights=1 / (1 + np.exp(-1.5 * z)), minlength=10)
    return KnownShift(images[s], images[t], labels[s], labels[t], ("covariate", "label"), q / q.sum())


def relabelled(random, of: Callable = no_shift) -> KnownShift:
    """Whoever labels the target calls every other 7 a 1 and every other 8 a 3: images as before, other labels."""
    known = of(random)
    labels = known.target_labels.copy()
    for old, new in ((7, 1), (8, 3)):
        labels[(labels == old) & (random.random(len(labels)) < 0.5)] = new
    kinds = tuple(known.kinds) + ("concept",)
    return KnownShift(known.source, known.target, known.source_labels, labels, kinds, known.target_frequencies)


SEVERAL = (1, 4, 8)
KNOWN_SHIFTS: dict[str, Callable[[np.random.Generator], KnownShift]] = {
    "none": no_shift,
    "label: one rare class": label_shift,
    "label: three rare classes": lambda random: label_shift(random, SEVERAL),
    "covariate: phone": phone,
    "covariate: noise": noise,
    "covariate: thick pens": thick_pens,
    "covariate: selected by ink": selected,
    "concept: relabelled": relabelled,
    "covariate and label: noise, three rare": lambda random: noise(random, SEVERAL),
    "covariate and label: phone, three rare": lambda random: phone(random, SEVERAL),
    "label and concept": lambda random: relabelled(random, lambda r: label_shift(r, (4, 5, 6))),
    "covariate and concept: thick pens": lambda random: relabelled(random, thick_pens),
}
