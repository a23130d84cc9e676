"""The data of an adaptation: both domains, who may see which labels, and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data_files.labels import UNKNOWN
from ..reference import checks

HELD_OUT = 5
"""Every fifth labelled sample of a class is held out."""
LEAST_HELD_OUT = 2  # of a source class that has at least twice as many


@dataclass(frozen=True, eq=False)
class Task:
    """What is known of both domains.

    Attributes:
        source: (Ns, *shape), float32: (D,) features or (C, H, W) images.
        source_labels: (Ns,), int64, positions in `classes`.
        held_out: (Ns,), bool: source samples that no training sees.
        target: (Nt, *shape), float32.
        target_labels: (Nt,), int64, those that training may see; UNKNOWN elsewhere.
        measured_labels: (Nt,), int64, those that accuracy is measured on and no training sees; UNKNOWN elsewhere.
        classes: names.
        feature_names: of the columns of a table; () where they have none.
    """

    source: Tensor
    source_labels: Tensor
    held_out: Tensor
    target: Tensor
    target_labels: Tensor
    measured_labels: Tensor
    classes: tuple
    feature_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample."""
        return tuple(self.source.shape[1:])

    @property
    def is_images(self) -> bool:
        return len(self.shape) == 3

    @property
    def known(self) -> Tensor:
        """(Nt,) bool: target samples whose label training may see."""
        return self.target_labels != UNKNOWN

    @property
    def num_known(self) -> int:
        return int(self.known.sum())

    @property
    def num_measured(self) -> int:
        return int((self.measured_labels != UNKNOWN).sum())

    def digest(self) -> dict[str, str]:
        """SHA-256 of samples and labels, by which data are recognised."""
        return {
            "source": _sha256(self.source, self.source_labels),
            "target": _sha256(self.target, self.target_labels),
            "measured labels": _sha256(self.measured_labels),
            "classes": hashlib.sha256(repr(self.classes).encode()).hexdigest(),
        }


def make_task(
    source: Tensor,
    source_labels: Tensor | None,
    target: Tensor,
    target_labels: Tensor | None,
    measured_labels: Tensor | None,
    classes: Sequence,
    *,
    measure_only: bool,
    seed: int,
    names: tuple[str, str] = ("source", "target"),
    feature_names: Sequence[str] = (),
) -> Task:
    """Check the data, and hold out what accuracy is measured on.

    Args:
        source, target: (N, *shape), floating; one shape of samples.
        source_labels, target_labels, measured_labels: positions in `classes`, negative where unknown, or None.
        classes: their names.
        measure_only: whether the target's labels are for measuring alone.
        seed: of what is held out.
        names: what to call the domains in errors: their files.
        feature_names: of the columns of a table.

    Raises:
        TypeError, ValueError: data that cannot be adapted from or to.
    """
    source, target = (_samples(name, x) for name, x in zip(names, (source, target)))
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"{names[1]}: expected samples of shape {tuple(source.shape[1:])}, like those of {names[0]}, got "
            f"{tuple(target.shape[1:])}; take the same features of both, or resize the images"
        )
    if source_labels is None or (source_labels < 0).all():
        raise ValueError(
            f"{names[0]}: expected a label of each sample, got none; add labels, or say where they are (--label)"
        )
    source_labels = _labels(names[0], source_labels, len(source), len(classes))
    known = source_labels >= 0
    source, source_labels = source[known], source_labels[known]
    counts = torch.bincount(source_labels, minlength=len(classes))
    if (counts > 0).sum() < 2:
        only = classes[int(counts.argmax())]
        raise ValueError(
            f"{names[0]}: expected labels of at least 2 classes, got {only!r} alone; with one class there is nothing "
            "to tell apart"
        )
    random = np.random.default_rng(seed)
    held_out = hold_out(source_labels, random, LEAST_HELD_OUT)
    nothing = torch.full((len(target),), UNKNOWN)
    seen = nothing if target_labels is None else _labels(names[1], target_labels, len(target), len(classes))
    measured = nothing if measured_labels is None else _labels("target labels", measured_labels, len(target), None)
    if measured_labels is None and measure_only:
        seen, measured = nothing, seen
    elif measured_labels is None:
        apart = hold_out(seen, random)
        seen, measured = torch.where(apart, UNKNOWN, seen), torch.where(apart, seen, UNKNOWN)
    else:
        seen = nothing if measure_only else seen
        measured = torch.where(seen == UNKNOWN, measured, UNKNOWN)
    return Task(source, source_labels, held_out, target, seen, measured, tuple(classes), tuple(feature_names))


def hold_out(labels: Tensor, random: np.random.Generator, least: int = 0) -> Tensor:
    """(N,) bool: a fifth of each class, drawn at random, rounded down; `least` of a class with twice as many."""
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels[labels >= 0].unique():
        own = (labels == label).nonzero()[:, 0].numpy()
        count = len(own) // HELD_OUT
        if len(own) >= 2 * least:
            count = max(count, least)
        chosen[torch.from_numpy(random.permutation(own)[:count])] = True
    return chosen


def _samples(name: str, x: Tensor) -> Tensor:
    checks.floating(name, x)
    if x.dim() not in (2, 4) or 0 in x.shape[1:]:
        raise ValueError(
            f"{name}: expected features (samples, features) or images (samples, channels, height, width), got shape "
            f"{tuple(x.shape)}; reshape them"
        )
    if len(x) < 2:
        raise ValueError(f"{name}: expected at least 2 samples, got {len(x)}; collect more")
    if not x.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or Inf; drop those samples or fill them in")
    return x.float()


def _labels(name: str, labels: Tensor, count: int, num_classes: int | None) -> Tensor:
    """(N,) int64, UNKNOWN where negative. Without `num_classes` there may be others, which no model gets right."""
    checks.tensor(f"labels of {name}", labels)
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"labels of {name}: expected {count} integers, one for each sample, got {checks.describe(labels)}; pass "
            "as many"
        )
    if num_classes is not None and (labels >= num_classes).any():
        raise ValueError(
            f"labels of {name}: expected positions below {num_classes}, the number of classes, got {int(labels.max())};"
            " name all classes"
        )
    return torch.where(labels < 0, UNKNOWN, labels.long())


def _sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(repr((tuple(x.shape), str(x.dtype))).encode())
        digest.update(memoryview(x.contiguous().numpy()).cast("B") if x.numel() else b"")
    return digest.hexdigest()
