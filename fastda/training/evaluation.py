"""Evaluation: accuracy, confidence, and both by class."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..methods.method import Method
from ..methods.networks import call
from ..nn.modes import evaluating
from ..nn.outputs import as_tensor
from ..reference import checks
from . import random_states
from .data import UNKNOWN, to_device, unpack
from .distributed import as_device
from .loaders import check_loader, generators_of

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a data set. Shares from 0 to 1.

    Attributes:
        accuracy: share of labelled samples whose most probable class is right; NaN without labels.
        confidence: mean probability of the most probable class.
        class_accuracy: accuracy of the samples of each class; NaN for a class without samples.
        class_confidence: confidence, by predicted class; NaN for a class that was never predicted.
        loss: mean cross-entropy of the labelled samples, in nats.
        num_samples, num_labelled: of the data set.
        logits, labels: (N, C) and (N,), float32 on the CPU, for what else there is to compute; labels −100 where
            unknown.
    """

    accuracy: float
    confidence: float
    class_accuracy: list[float]
    class_confidence: list[float]
    loss: float
    num_samples: int
    num_labelled: int
    logits: Tensor = field(repr=False, compare=False)
    labels: Tensor = field(repr=False, compare=False)


def predict(
    model: nn.Module, loader, *, device: torch.device | str | None = None, precision: str = "float32"
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of all batches of a loader, on the CPU; labels are −100 where there are none.

    In evaluation mode and without gradients; the modes of the model's modules and the states of the random generators
    are left as they were.

    Args:
        model: from inputs to logits: a :class:`fastda.methods.Method` or any module.
        loader: batches of (inputs, labels), (inputs,), inputs, or dictionaries.
        device: where to compute; where the model is by default.
        precision: "float32", or "bfloat16" or "float16" for autocast.

    Raises:
        ValueError: a loader without batches, an unknown `precision`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}; wrap it in one")
    checks.option("precision", precision, tuple(PRECISIONS))
    check_loader("loader", loader)
    device = as_device(device or next((p.device for p in model.parameters()), "cpu"))
    logits, labels = [], []
    unchanged = random_states.unchanged(generators_of(loader))
    with evaluating(model), torch.no_grad(), unchanged, autocast(device, precision):
        for batch in loader:
            inputs, known = unpack("loader", batch)
            inputs = to_device(inputs, device)
            method = isinstance(getattr(model, "_orig_mod", model), Method)  # compiled, or as it is
            output = model(inputs) if method else call(model, inputs)
            logits.append(as_tensor("model", output).float().cpu())
            labels.append(torch.full(logits[-1].shape[:1], UNKNOWN) if known is None else known.cpu())
    if not logits:
        raise ValueError("loader: expected at least one batch, got none; give it data, or drop_last=False")
    return torch.cat(logits), torch.cat(labels)


def evaluate(
    model: nn.Module, loader, *, device: torch.device | str | None = None, precision: str = "float32"
) -> Evaluation:
    """Accuracy and confidence of a classifier, overall and by class.

    Args:
        model, loader, device, precision: as in :func:`predict`. Samples with negative labels count for the confidence
            alone.

    Raises:
        What :func:`predict` raises.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fastda.training import evaluate
        >>> data = TensorDataset(torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> result = evaluate(torch.nn.Identity(), DataLoader(data, batch_size=2))
        >>> round(result.accuracy, 3), result.class_accuracy
        (0.667, [1.0, 0.5])
    """
    return summarise(*predict(model, loader, device=device, precision=precision))


def summarise(logits: Tensor, labels: Tensor) -> Evaluation:
    """What the logits and labels of a data set say."""
    if logits.dim() != 2:
        raise ValueError(
            f"model: expected logits of shape (samples, classes), got {checks.describe(logits)}; flatten them"
        )
    labels = checks.labels("labels", labels, tuple(logits.shape[:1]), "logits", logits)
    confidence, predicted = logits.double().softmax(1).max(1)
    known = labels >= 0
    if known.any() and labels.max() >= logits.shape[1]:
        raise IndexError(
            f"labels: expected classes below {logits.shape[1]}, the number of logits, got {labels.max().item()}; give "
            "the model as many outputs, or unknown samples a negative label"
        )
    right = (predicted == labels)[known].double()
    classes = range(logits.shape[1])
    return Evaluation(
        accuracy=_mean(right),
        confidence=_mean(confidence),
        class_accuracy=[_mean(right[labels[known] == c]) for c in classes],
        class_confidence=[_mean(confidence[predicted == c]) for c in classes],
        loss=F.cross_entropy(logits[known].double(), labels[known]).item() if known.any() else math.nan,
        num_samples=len(labels),
        num_labelled=int(known.sum()),
        logits=logits,
        labels=labels,
    )


def autocast(device: torch.device, precision: str):
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan
