"""What a person passes in, checked: features, labels, probabilities."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..data_files.labels import UNKNOWN
from ..reference import checks

LEAST_SAMPLES = 20  # a domain: below, no test could tell anything


def as_features(name: str, value, like: tuple[str, Tensor] | None = None, least: int = 2) -> Tensor:
    """(N, D) in float64, finite; with as many features as another sample."""
    value = _as_tensor(name, value)
    if value.dim() != 2 or value.shape[1] == 0:
        raise ValueError(
            f"{name}: expected samples × features, got shape {tuple(value.shape)}; flatten each sample, or take the "
            "features of a network's layer"
        )
    if like is not None and value.shape[1] != like[1].shape[1]:
        raise ValueError(
            f"{name}: expected as many features as {like[0]}, {like[1].shape[1]}, got {value.shape[1]}; "
            "take both from the same columns or layer"
        )
    if len(value) < least:
        raise ValueError(f"{name}: expected at least {least} samples, got {len(value)}; collect more")
    finite = value.isfinite()
    if not finite.all():
        row, column = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"{name}: expected finite numbers, got {int((~finite).sum())} NaN or Inf, the first at sample {row}, "
            f"feature {column}; drop those samples or fill them in"
        )
    return value


def as_pair(source, target, least: int = 2) -> tuple[Tensor, Tensor]:
    """Both samples, with the same features, on one device."""
    source = as_features("source", source, least=least)
    target = as_features("target", target, ("source", source), least=least)
    return source, target.to(source.device)


def _as_tensor(name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(np.ascontiguousarray(value))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name}: expected a tensor or array of numbers, got {checks.describe(value)}; convert it to numbers"
            ) from error
    if value.is_complex() or value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor of real numbers, got {checks.describe(value)}; convert it")
    return value.detach().double()


def standardised(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with mean 0 and deviation 1 over the two together; constant features become 0.

    The scale does not depend on which sample is in which domain, so that permutation tests stay exact.
    """
    pooled = torch.cat([source, target])
    mean, deviation = pooled.mean(0), pooled.std(0, correction=0)
    constant = deviation <= 1e-12 * pooled.abs().amax(0)
    deviation = torch.where(constant, torch.inf, deviation)
    return (source - mean) / deviation, (target - mean) / deviation


def as_label_list(name: str, value, count: int) -> list:
    """Labels as plain Python values, one for each sample; None where unknown (negative, NaN, empty or None)."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=object)
    if array.shape != (count,):
        raise ValueError(
            f"{name}: expected {count} labels, one for each sample, got shape {array.shape}; pass a flat list of labels"
        )
    labels = []
    for label in array.tolist():
        if label is None or label == "" or (isinstance(label, float) and math.isnan(label)):
            labels.append(None)
        elif isinstance(label, str):
            labels.append(label)
        elif isinstance(label, (bool, int, float)) and float(label).is_integer():
            labels.append(int(label) if label >= 0 else None)
        else:
            raise TypeError(
                f"{name}: expected class labels, integers or strings, got {checks.describe(label)}; "
                "continuous values are no classes: bin them first"
            )
    kinds = {type(label) for label in labels if label is not None}
    if len(kinds) > 1:
        raise TypeError(f"{name}: expected integers or strings, got both; convert all of them with str(...)")
    return labels


def as_indices(labels: list, classes: Sequence) -> np.ndarray:
    """Positions of the labels in `classes`, UNKNOWN for None."""
    position = {label: index for index, label in enumerate(classes)}
    return np.array([UNKNOWN if label is None else position[label] for label in labels], dtype=np.int64)


def as_probabilities(name: str, value, count: int, num_classes: int | None = None) -> np.ndarray:
    """(N, C) class probabilities, float64."""
    value = _as_tensor(name, value).cpu().numpy()
    if value.ndim != 2 or len(value) != count or (num_classes is not None and value.shape[1] != num_classes):
        wanted = f"({count}, {'classes' if num_classes is None else num_classes})"
        raise ValueError(
            f"{name}: expected shape {wanted}, a probability of each class for each sample, got {value.shape}; "
            "pass what predict_proba or softmax gives, and name its columns by classes=..."
        )
    total = value.sum(1)
    if not (np.isfinite(value).all() and (value >= -1e-6).all() and (np.abs(total - 1) < 1e-2).all()):
        raise ValueError(
            f"{name}: expected probabilities that sum to 1 for each sample, got values from {value.min():.3g} to "
            f"{value.max():.3g}; apply a softmax to logits first"
        )
    value = value.clip(0)
    return value / value.sum(1, keepdims=True)


def require_scipy(who: str, module: str):
    """A module of scipy, or a sentence that says how to get it."""
    try:
        return importlib.import_module(f"scipy.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} needs scipy, which is not installed: pip install 'fastda-kernels[shift]'", name="scipy"
        ) from error
