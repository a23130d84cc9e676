"""CORAL's ops on Triton: each function takes and gives what the op of torch.ops.fastda of its name does."""

from __future__ import annotations

import math

from torch import Tensor

from .backward import backward
from .device import in_parts
from .forward import forward
from .problem import Domains, layers_of, plan_backward, plan_forward


def flatten(x: Tensor, kept: int) -> Tensor:
    """(batch, kept dimensions...): a view where the strides allow it."""
    return x.reshape(math.prod(x.shape[: x.dim() - kept]), *x.shape[x.dim() - kept :])


def check_samples(counts, correction: int) -> None:
    for count in counts:
        if count <= correction:
            raise ValueError(f"samples: expected more than correction, {correction}, got {count}; pass more samples")


def check(source: Tensor, target: Tensor, correction: int) -> None:
    """The public function names what is wrong; this keeps a direct call of the op from reading past the end."""
    if source.dim() < 2 or source.shape[:-2] != target.shape[:-2] or source.shape[-1:] != target.shape[-1:]:
        expected = f"the batch dimensions and features of source, {tuple(source.shape)}"
        raise ValueError(f"target: expected {expected}, got shape {tuple(target.shape)}; pass matching features")
    if source.dtype != target.dtype or source.device != target.device:
        got = f"{target.dtype} on {target.device}"
        raise TypeError(f"target: expected {source.dtype} on {source.device}, got {got}; convert it")
    check_samples((source.shape[-2], target.shape[-2]), correction)


def coral_loss(source: Tensor, target: Tensor, correction: int, scale: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check(source, target, correction)
    batch = source.shape[:-2]
    layers = layers_of((source.shape[-2],), (target.shape[-2],), (source.shape[-1],))
    plan = plan_forward(layers, math.prod(batch), source.dtype, source.device, False)
    domains = Domains(flatten(source, 2), flatten(target, 2), False)
    losses, mean_distances, means, products = forward(domains, plan, correction, scale)
    side = layers[0].side
    return (
        losses.view(batch),
        mean_distances.view(batch),
        means.view(*batch, 2, source.shape[-1]),
        products.view(*batch, side, side),
    )


def coral_loss_backward(
    grad_loss: Tensor,
    grad_mean_distance: Tensor,
    source: Tensor,
    target: Tensor,
    means: Tensor,
    products: Tensor,
    correction: int,
    scale: str,
    need_source: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    check(source, target, correction)
    needs = need_source, need_target
    grads = tuple(
        x.new_empty(x.shape if need else (0,)) for x, need in ((source, need_source), (target, need_target))
    )
    layers = layers_of((source.shape[-2],), (target.shape[-2],), (source.shape[-1],))
    plan = plan_backward(layers, math.prod(source.shape[:-2]), source.dtype, False, needs)
    incoming = tuple(flatten(grad, 0).unsqueeze(-1) for grad in (grad_loss, grad_mean_distance))
    backward(
        incoming,
        Domains(flatten(source, 2), flatten(target, 2), False),
        flatten(means, 2).contiguous(),
        flatten(products, 2).contiguous(),
        plan,
        correction,
        scale,
        tuple(flatten(grad, 2) if need else grad for grad, need in zip(grads, needs)),
        needs,
    )
    return grads


def coral_layers(
    sources: Tensor,
    targets: Tensor,
    num_source: list[int],
    num_target: list[int],
    num_features: list[int],
    weights: list[float],
    correction: int,
    scale: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layers = check_layers(sources, targets, num_source, num_target, num_features, weights, correction)
    batch = sources.shape[:-1]
    plan = plan_forward(layers, math.prod(batch), sources.dtype, sources.device, True)
    results = forward(flat(sources, targets), plan, correction, scale, in_parts(weights))
    return tuple(result.view(*batch, result.shape[-1]) for result in results)


def coral_layers_backward(
    grad_losses: Tensor,
    grad_mean_distances: Tensor,
    sources: Tensor,
    targets: Tensor,
    means: Tensor,
    products: Tensor,
    num_source: list[int],
    num_target: list[int],
    num_features: list[int],
    weights: list[float],
    correction: int,
    scale: str,
    need_sources: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor]:
    layers = check_layers(sources, targets, num_source, num_target, num_features, weights, correction)
    needs = need_sources, need_targets
    grads = tuple(x.new_empty(x.shape if need else (0,)) for x, need in zip((sources, targets), needs))
    backward(
        (flatten(grad_losses, 1), flatten(grad_mean_distances, 1)),
        flat(sources, targets),
        flatten(means, 1).contiguous(),
        flatten(products, 1).contiguous(),
        plan_backward(layers, math.prod(sources.shape[:-1]), sources.dtype, True, needs),
        correction,
        scale,
        tuple(flatten(grad, 1) if need else grad for grad, need in zip(grads, needs)),
        needs,
        weights=in_parts(weights),
    )
    return grads


def flat(sources: Tensor, targets: Tensor) -> Domains:
    rows = [x if x.stride(-1) == 1 else x.contiguous() for x in (flatten(sources, 1), flatten(targets, 1))]
    return Domains(*rows, True)


def check_layers(sources, targets, num_source, num_target, num_features, weights, correction):
    check_samples((*num_source, *num_target), correction)
    for name, x, counts in (("sources", sources, num_source), ("targets", targets, num_target)):
        total = sum(n * d for n, d in zip(counts, num_features))
        if not len(counts) == len(num_features) == len(weights) > 0 or x.shape[-1] != total:
            raise ValueError(
                f"{name}: expected {total} a batch element for layers of {list(counts)} samples of "
                f"{list(num_features)} features, got shape {tuple(x.shape)}; flatten and join the layers"
            )
    if sources.shape[:-1] != targets.shape[:-1]:
        expected = f"the batch dimensions of sources, {tuple(sources.shape)}"
        raise ValueError(f"targets: expected {expected}, got shape {tuple(targets.shape)}; pass matching features")
    return layers_of(num_source, num_target, num_features)
