"""Class means and episodes on Triton: each function takes and gives what torch.ops.fastda's of its name does."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import tiles
from .coral import flatten
from .episodes import (
    class_means_backward_kernel,
    class_means_kernel,
    episode_gradient_kernel,
    episode_kernel,
)
from .points import directions_kernel, through_directions_kernel
from .problem import TRITON_DTYPES, accumulator, ceil_div, launch, precision

CLOSE = 1 / 4
"""Share of ‖q‖² + ‖p‖² below which points are near: products would cancel, and differences take their place."""


def rows_of(x: Tensor) -> Tensor:
    """(batch, rows, features), the features next to each other."""
    x = flatten(x, 2)
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def alignment(*sizes: int) -> int:
    """16 if all widths and strides are multiples of it, else 1: kernels are compiled for no other distinction."""
    return 1 if any(size % 16 for size in sizes) else 16


def check_labels(name: str, labels: Tensor, shape: torch.Size) -> None:
    """The public function names what is wrong; this keeps a direct call of the op from reading past the end."""
    if labels.shape != shape or labels.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected int64 of shape {tuple(shape)}, got {labels.dtype} of shape {tuple(labels.shape)}; "
            f"pass one a row"
        )


def check_episode(support: Tensor, queries: Tensor, support_labels: Tensor, query_labels: Tensor) -> None:
    check_labels("support_labels", support_labels, support.shape[:-1])
    check_labels("query_labels", query_labels, queries.shape[:-1])
    if support.shape[:-2] != queries.shape[:-2] or support.shape[-1] != queries.shape[-1]:
        expected = f"the batch dimensions and features of support, {tuple(support.shape)}"
        raise ValueError(f"queries: expected {expected}, got shape {tuple(queries.shape)}; pass matching features")


def find_means(support: Tensor, labels: Tensor, num_classes: int, empty: str) -> tuple[Tensor, Tensor, Tensor]:
    """Means (batch, C, D) and counts (batch, C), and a counter for each batch element, set to 0."""
    x, labels = rows_of(support), flatten(labels, 1).contiguous()
    batch, num_samples, num_features = x.shape
    means = x.new_empty(batch, num_classes, num_features, dtype=accumulator(x.dtype))
    counts, counters = labels.new_empty(batch, num_classes), labels.new_empty(batch, dtype=torch.int32)
    sort = num_samples * num_classes > tiles.SCANNED_LABELS
    order = starts = labels
    if sort:
        labels, order = labels.sort(stable=True, dim=-1)
        classes = torch.arange(num_classes + 1, device=labels.device).expand(batch, -1).contiguous()
        starts = torch.searchsorted(labels, classes)
    blocks = tiles.class_means()
    launch(
        class_means_kernel,
        batch * num_classes * max(1, ceil_div(num_features, blocks.columns)),
        x.device,
        x,
        labels,
        order,
        starts,
        means,
        counts,
        counters,
        *x.stride()[:2],
        num_samples,
        num_classes,
        num_features,
        ZERO=empty == "zero",
        SORTED=sort,
        ACCUMULATOR=TRITON_DTYPES[means.dtype],
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        ALIGN=alignment(*x.stride()[:2]),
        **blocks.options,
    )
    return means, counts, counters


def share_means(grad_means: Tensor, support: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """The gradient of the support from that of the means, (batch, C, D)."""
    result = support.new_empty(support.shape)
    num_samples, num_features = support.shape[-2:]
    num_classes, blocks = counts.shape[-1], tiles.class_means()
    batch = math.prod(support.shape[:-2])
    launch(
        class_means_backward_kernel,
        batch * ceil_div(num_samples, blocks.rows) * ceil_div(num_features, blocks.columns),
        support.device,
        grad_means,
        labels.contiguous(),
        counts.contiguous(),
        result,
        num_samples,
        num_classes,
        num_features,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        **blocks.options,
    )
    return result


def class_means(support: Tensor, labels: Tensor, num_classes: int, empty: str) -> tuple[Tensor, Tensor]:
    check_labels("labels", labels, support.shape[:-1])
    means, counts, _ = find_means(support, labels, num_classes, empty)
    batch = support.shape[:-2]
    return means.view(*batch, num_classes, support.shape[-1]), counts.view(*batch, num_classes)


def class_means_backward(
    grad_means: Tensor,
    support: Tensor,
    labels: Tensor,
    counts: Tensor,
    num_classes: int,
    empty: str,
    need_support: bool,
) -> Tensor:
    check_labels("labels", labels, support.shape[:-1])
    if not need_support:
        return support.new_empty(0)
    return share_means(grad_means.contiguous(), support, labels, counts)


def directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """x/‖x‖ and ‖x‖ of each row of (batch, rows, features)."""
    dtype, blocks = accumulator(x.dtype), tiles.directions()
    batch, num_rows, num_features = x.shape
    result = x.new_empty(x.shape, dtype=dtype), x.new_empty(batch, num_rows, dtype=dtype)
    launch(
        directions_kernel,
        batch * ceil_div(num_rows, blocks.rows),
        x.device,
        x,
        *result,
        *x.stride()[:2],
        num_rows,
        num_features,
        ACCUMULATOR=TRITON_DTYPES[dtype],
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        **blocks.options,
    )
    return result


def through_directions(grads: Tensor, found: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """The gradient of x from that of its directions, which `found` holds with the lengths."""
    blocks, num_features = tiles.directions(), grads.shape[-1]
    result = grads.new_empty(grads.shape, dtype=dtype)
    num_rows = found[1].numel()
    launch(
        through_directions_kernel,
        ceil_div(num_rows, blocks.rows) if num_features else 0,
        grads.device,
        grads,
        *found,
        result,
        num_rows,
        num_features,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        **blocks.options,
    )
    return result


def prototypical_loss(
    support: Tensor,
    queries: Tensor,
    temperature: Tensor,
    support_labels: Tensor,
    query_labels: Tensor,
    num_classes: int,
    metric: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_episode(support, queries, support_labels, query_labels)
    batch, (num_queries, num_features) = queries.shape[:-2], queries.shape[-2:]
    prototypes, counts, counters = find_means(support, support_labels, num_classes, "nan")
    q, p = rows_of(queries), prototypes
    if metric == "cosine":
        q, p = directions(q)[0], directions(p)[0]
    losses = prototypes.new_empty(len(q), num_queries)
    slopes, weights = losses.new_empty(losses.shape), losses.new_empty(len(q), num_queries, num_classes)
    near = torch.empty_like(weights, dtype=torch.bool)
    loss = losses
    if reduction != "none":
        # An episode without queries has no program that would write.
        nothing = math.nan if reduction == "mean" else 0.0
        loss = losses.new_empty(len(q)) if num_queries else losses.new_full((len(q),), nothing)
    blocks = tiles.episode(num_classes, losses.dtype)
    launch(
        episode_kernel,
        len(q) * ceil_div(num_queries, blocks.rows),
        q.device,
        q,
        p,
        counts,
        query_labels.contiguous(),
        temperature.contiguous(),
        losses,
        loss,
        weights,
        slopes,
        near,
        counters,
        *q.stride()[:2],
        num_queries,
        num_classes,
        num_features,
        METRIC=metric,
        REDUCTION=reduction,
        CLOSE=CLOSE,
        ACCUMULATOR=TRITON_DTYPES[losses.dtype],
        PRECISION=precision(),
        BLOCK=blocks.rows,
        CLASSES=blocks.columns,
        BLOCK_K=blocks.depth,
        ALIGN=alignment(*q.stride()[:2]),
        **blocks.options,
    )
    return (
        loss.view((*batch, *loss.shape[1:])),
        prototypes.view(*batch, num_classes, num_features),
        counts.view(*batch, num_classes),
        weights.view(*batch, num_queries, num_classes),
        slopes.view(*batch, num_queries),
        near.view(*batch, num_queries, num_classes),
    )


def prototypical_loss_backward(
    grad_loss: Tensor,
    support: Tensor,
    queries: Tensor,
    temperature: Tensor,
    support_labels: Tensor,
    query_labels: Tensor,
    prototypes: Tensor,
    counts: Tensor,
    weights: Tensor,
    slopes: Tensor,
    near: Tensor,
    num_classes: int,
    metric: str,
    reduction: str,
    need_support: bool,
    need_queries: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_episode(support, queries, support_labels, query_labels)
    num_queries, num_features = queries.shape[-2:]
    each = reduction == "none"
    grad = flatten(grad_loss, 1 if each else 0)
    of_support, of_queries, of_temperature = support.new_empty(0), queries.new_empty(0), temperature.new_empty(0)
    if need_temperature:
        incoming = grad if each else grad.unsqueeze(-1) / (num_queries if reduction == "mean" else 1)
        of_temperature = (incoming * flatten(slopes, 1)).sum(-1).view(temperature.shape).to(temperature.dtype)
    if not need_support and not need_queries:
        return of_support, of_queries, of_temperature
    q, p = rows_of(queries), flatten(prototypes, 2).contiguous()
    dtype = out_dtype = p.dtype
    if metric == "cosine":
        directions_of_queries, directions_of_prototypes = directions(q), directions(p)
        q, p = directions_of_queries[0], directions_of_prototypes[0]
    else:
        out_dtype = queries.dtype
    grad_queries = q.new_empty(q.shape if need_queries else (0,), dtype=out_dtype)
    grad_prototypes = p.new_empty(p.shape if need_support else (0,))
    blocks = tiles.episode_gradient(num_classes, dtype)
    roles = need_queries * ceil_div(num_queries, blocks.rows) + need_support
    launch(
        episode_gradient_kernel,
        len(q) * roles * ceil_div(num_features, blocks.depth),
        q.device,
        grad,
        q,
        p,
        flatten(weights, 2).contiguous(),
        flatten(near, 2).contiguous(),
        grad_queries,
        grad_prototypes,
        grad.stride(0),
        grad.stride(1) if each else 0,
        *q.stride()[:2],
        num_queries,
        num_classes,
        num_features,
        METRIC=metric,
        MEAN=reduction == "mean",
        NEED_QUERIES=need_queries,
        NEED_PROTOTYPES=need_support,
        ACCUMULATOR=TRITON_DTYPES[dtype],
        PRECISION=precision(),
        BLOCK=blocks.rows,
        CLASSES=blocks.columns,
        COLUMNS=blocks.depth,
        ALIGN=alignment(*q.stride()[:2]),
        **blocks.options,
    )
    if need_queries:
        if metric == "cosine":
            grad_queries = through_directions(grad_queries, directions_of_queries, queries.dtype)
        of_queries = grad_queries.view(queries.shape)
    if need_support:
        if metric == "cosine":
            grad_prototypes = through_directions(grad_prototypes, directions_of_prototypes, dtype)
        of_support = share_means(grad_prototypes, support, support_labels, counts)
    return of_support, of_queries, of_temperature
