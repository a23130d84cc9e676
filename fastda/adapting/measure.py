"""What is measured before and after: accuracy where labels exist, confidence, and how far apart the features are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ..data_files.labels import UNKNOWN
from ..shift import coral_distance, mmd, proxy_a_distance
from ..shift.label_shift import wilson_interval
from ..shift.samples import LEAST_SAMPLES, standardised
from .model import AdaptedModel
from .training import Data

MOST = 2000
"""Samples of a domain whose features are compared."""


@dataclass(frozen=True)
class Accuracy:
    """Share of samples that are right, from 0 to 1, with its 95 % interval (Wilson)."""

    share: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor) -> Accuracy | None:
        """None where no label is known."""
        known = labels != UNKNOWN
        count = int(known.sum())
        if count == 0:
            return None
        return cls.of_counts(int((predicted[known] == labels[known]).sum()), count)

    @classmethod
    def of_counts(cls, right: int, count: int) -> Accuracy:
        """From how many are right, of at least one."""
        low, high = wilson_interval(np.array([right, count - right]))
        return cls(right / count, float(low[0]), float(high[0]), count)


@dataclass(frozen=True)
class Distances:
    """How far the domains' features are apart: what the network makes of them, standardised over both."""

    proxy_a_distance: float
    mmd_squared: float
    coral: float


@dataclass(frozen=True)
class Measurement:
    """How a model does.

    Attributes:
        target_accuracy: on target samples whose label no training saw; None without any.
        target_confidence: mean probability of the predicted class, 0 to 1.
        source_accuracy, source_confidence: on source samples that no training saw.
        predicted: how many target samples of each class, in the order of the classes.
        distances: None where a domain has too few samples.
    """

    target_accuracy: Accuracy | None
    target_confidence: float
    source_accuracy: Accuracy | None
    source_confidence: float
    predicted: tuple[int, ...]
    distances: Distances | None

    def to_dict(self) -> dict:
        """Plain values, for JSON: NaN is None."""
        found = asdict(self) | {"predicted": list(self.predicted)}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}

    @classmethod
    def from_dict(cls, content: dict) -> Measurement:
        """What `to_dict` gave."""
        parts = {"target_accuracy": Accuracy, "source_accuracy": Accuracy, "distances": Distances}
        made = {name: None if content[name] is None else kind(**content[name]) for name, kind in parts.items()}
        sure = math.nan if content["source_confidence"] is None else content["source_confidence"]
        return cls(**{**content, **made, "source_confidence": sure, "predicted": tuple(content["predicted"])})


def measure(model: AdaptedModel, data: Data, seed: int) -> tuple[Measurement, Tensor]:
    """The measurement, and the logits of all target samples."""
    task, held_out = data.task, data.task.held_out
    logits = model.logits(data.target, scaled=True)
    confidence, predicted = logits.double().softmax(1).max(1)
    source_accuracy, source_confidence = None, math.nan
    if held_out.any():
        sure, found = model.logits(data.source[held_out], scaled=True).double().softmax(1).max(1)
        source_accuracy = Accuracy.of(found, task.source_labels[held_out])
        source_confidence = float(sure.mean())
    measurement = Measurement(
        target_accuracy=Accuracy.of(predicted, task.measured_labels),
        target_confidence=float(confidence.mean()),
        source_accuracy=source_accuracy,
        source_confidence=source_confidence,
        predicted=tuple(torch.bincount(predicted, minlength=len(task.classes)).tolist()),
        distances=_distances(model, data, seed),
    )
    return measurement, logits


def _distances(model: AdaptedModel, data: Data, seed: int) -> Distances | None:
    """Of source samples that no training saw, since a network makes more of what it learnt by heart."""
    random = np.random.default_rng(seed)
    parts = []
    for inputs in (data.source[data.task.held_out], data.target):
        if len(inputs) < LEAST_SAMPLES:
            return None
        chosen = np.sort(random.permutation(len(inputs))[:MOST])
        parts.append(model.features(inputs[torch.from_numpy(chosen)], scaled=True))
    source, target = standardised(*(part.double() for part in parts))
    return Distances(
        proxy_a_distance=proxy_a_distance(source, target, seed=seed).distance,
        mmd_squared=mmd(source, target, permutations=0, seed=seed, progress=False).squared,
        coral=coral_distance(source, target).distance,
    )
