"""CORAL on the fused kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..backend import serve
from ..reference.checks import enough_samples
from ..reference.coral import check_coral, each_layer, sum_layers
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
        like.new_empty(*batch, 2, num_features, dtype=torch.float64),
        like.new_empty(*batch, side, side),
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


# means: of source and target, in float64, so that centring loses nothing. products: the Gram matrix of all centred
# samples, or the difference of the covariances where that is smaller.
_coral_loss = fused(
    "coral_loss(Tensor source, Tensor target, int correction, str scale)"
    " -> (Tensor loss, Tensor mean_distance, Tensor means, Tensor products)",
    _coral_fake,
    "coral_loss_backward(Tensor grad_loss, Tensor grad_mean_distance, Tensor source, Tensor target, Tensor means,"
    " Tensor products, int correction, str scale, bool need_source, bool need_target)"
    " -> (Tensor grad_source, Tensor grad_target)",
    _coral_backward_fake,
    _coral_formula,
)


def _layers_fake(sources, targets, num_source, num_target, num_features, weights, correction, scale):
    *batch, _ = sources.shape
    like = accumulate(sources)
    sides = [torch.sym_min(ns + nt, d) for ns, nt, d in zip(num_source, num_target, num_features)]
    return (
        like.new_empty(*batch, len(num_features)),
        like.new_empty(*batch, len(num_features)),
        like.new_empty(*batch, 2 * sum(num_features), dtype=torch.float64),
        like.new_empty(*batch, sum(side * side for side in sides)),
    )


def _layers_formula(sources, targets, num_source, num_target, num_features, weights, correction, scale):
    def each_of(flat, counts):
        parts = flat.split([n * d for n, d in zip(counts, num_features)], -1)
        return [part.unflatten(-1, (n, d)) for part, n, d in zip(parts, counts, num_features)]

    losses, mean_distances = [], []
    for weight, source, target in zip(weights, each_of(sources, num_source), each_of(targets, num_target)):
        loss, mean_distance = _coral_formula(source, target, correction, scale)
        losses.append(weight * loss)
        mean_distances.append(weight * mean_distance)
    return torch.stack(losses, -1), torch.stack(mean_distances, -1)


# All layers of a network, flat, one after the other: the samples of the source, and those of the target. What is saved
# is laid out the same way.
_coral_layers = fused(
    "coral_layers(Tensor sources, Tensor targets, SymInt[] num_source, SymInt[] num_target, SymInt[] num_features,"
    " float[] weights, int correction, str scale)"
    " -> (Tensor losses, Tensor mean_distances, Tensor means, Tensor products)",
    _layers_fake,
    "coral_layers_backward(Tensor grad_losses, Tensor grad_mean_distances, Tensor sources, Tensor targets,"
    " Tensor means, Tensor products, SymInt[] num_source, SymInt[] num_target, SymInt[] num_features, float[] weights,"
    " int correction, str scale, bool need_sources, bool need_targets) -> (Tensor grad_sources, Tensor grad_targets)",
    _coral_backward_fake,
    _layers_formula,
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


def _in_one(layers: list[Tensor]) -> Tensor:
    """The layers one behind the other; a single one is not copied."""
    return layers[0] if len(layers) == 1 else torch.cat(layers, -1)


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
    options = dict(correction=correction, scale=scale, mean_weight=mean_weight)

    def check(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        pair = check_coral(source, target, **options, reduction="mean")
        enough_samples("source", source.shape[-2], correction)
        enough_samples("target", target.shape[-2], correction)
        return pair

    def alone(source: Tensor, target: Tensor) -> Tensor:
        return coral_loss(source, target, **options, process_group=process_group)

    together = process_group is None
    if together:
        pairs = each_layer(check, sources, targets, weights)
        first = pairs[0][0]
        together = all(
            (x.dtype, x.device) == (first.dtype, first.device)
            and x.shape[:-2] == first.shape[:-2]
            and x.shape[-1] > 0  # torch.cat drops what is empty from the graph
            for x, _ in pairs
        )
    if not together or serve("deep_coral_loss", first) == "reference":
        return sum_layers(each_layer(alone, sources, targets, weights), weights)

    shapes = ((source.shape[-2], target.shape[-2], source.shape[-1]) for source, target in pairs)
    # Numbers go into the op; compiled code would be compiled anew for each of their values, so there they stay outside.
    weights = None if weights is None else list(weights)
    inside = not torch.compiler.is_compiling() and not any(isinstance(weight, Tensor) for weight in weights or ())
    factors = [1.0] * len(pairs) if weights is None or not inside else [float(weight) for weight in weights]
    flat_sources, flat_targets = (_in_one([x.flatten(-2) for x in domain]) for domain in zip(*pairs))
    counts = map(list, zip(*shapes))
    losses, mean_distances, *_ = _coral_layers(flat_sources, flat_targets, *counts, factors, correction, scale)
    if mean_weight != 0:
        losses = losses + mean_weight * mean_distances
    if inside:
        return reduce(losses.sum(-1), "mean")
    return sum_layers([reduce(loss, "mean") for loss in losses.unbind(-1)], weights)
