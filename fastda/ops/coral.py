"""CORAL on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backend import serve
from ..reference.checks import enough_samples
from ..reference.coral import check_coral, sum_layers
from ..reference.precision import accumulate
from ..reference.reduction import reduce
from .fused import fused
from .specification import specified_by


def _coral_fake(source: Tensor, target: Tensor, correction: int, scale: str):
    *batch, num_source, num_features = source.shape
    num_samples = num_source + target.shape[-2]
    side = torch.sym_min(num_samples, num_features)  # no branch on the shapes, which may be symbols
    like = accumulate(source)
    return (
        like.new_empty(batch),
        like.new_empty(batch),
        like.new_empty(*batch, num_samples, num_features),
        like.new_empty(*batch, side, side),
        like.new_empty(*batch, num_features),
    )


def _coral_backward_fake(grad_loss, grad_mean_distance, source, target, *rest):
    *_, need_source, need_target = rest
    return (
        source.new_empty(source.shape if need_source else (0,)),
        target.new_empty(target.shape if need_target else (0,)),
    )


def _coral_formula(source, target, correction, scale):
    loss = reference.coral_loss(source, target, correction=correction, scale=scale, reduction="none")
    means = accumulate(source).mean(-2) - accumulate(target).mean(-2)
    return loss, means.square().sum(-1) / max(source.shape[-1], 1)


# centred: both domains, one above the other. products: the Gram matrix of all samples, or the difference of the covariances
# where that is smaller.
_coral_loss = fused(
    "coral_loss(Tensor source, Tensor target, int correction, str scale)"
    " -> (Tensor loss, Tensor mean_distance, Tensor centred, Tensor products, Tensor mean_difference)",
    _coral_fake,
    "coral_loss_backward(Tensor grad_loss, Tensor grad_mean_distance, Tensor source, Tensor target, Tensor centred,"
    " Tensor products, Tensor mean_difference, int correction, str scale, bool need_source, bool need_target)"
    " -> (Tensor grad_source, Tensor grad_target)",
    _coral_backward_fake,
    _coral_formula,
)


@specified_by(reference.coral_loss)
def coral_loss(
    source: Tensor,
    target: Tensor,
    *,
    correction: int = 1,
    scale: str = "paper",
    mean_weight: float = 0.0,
    reduction: str = "mean",
    process_group=None,
) -> Tensor:
    source, target = check_coral(source, target, correction, scale, mean_weight, reduction)
    if serve("coral_loss", source) == "reference" or process_group is not None:
        return reference.coral_loss(
            source,
            target,
            correction=correction,
            scale=scale,
            mean_weight=mean_weight,
            reduction=reduction,
            process_group=process_group,
        )
    enough_samples("source", source.shape[-2], correction)
    enough_samples("target", target.shape[-2], correction)
    losses, mean_distance, *_ = _coral_loss(source, target, correction, scale)
    if mean_weight != 0:
        losses = losses + mean_weight * mean_distance
    return reduce(losses, reduction)


@specified_by(reference.deep_coral_loss)
def deep_coral_loss(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float | Tensor] | None = None,
    correction: int = 1,
    scale: str = "paper",
    mean_weight: float = 0.0,
    process_group=None,
) -> Tensor:
    return sum_layers(
        coral_loss,
        sources,
        targets,
        weights,
        correction=correction,
        scale=scale,
        mean_weight=mean_weight,
        process_group=process_group,
    )
