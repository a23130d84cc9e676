"""Queries against prototypes on Triton: each function takes and gives what the op of its name in torch.ops does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import tiles
from .class_gradients import pull_kernel, weights_kernel
from .coral import flatten
from .many_classes import distances_kernel, join_kernel, softmax_kernel, statistics_kernel, sweep_kernel
from .problem import TRITON_DTYPES, accumulator, ceil_div, launch, operand, precision
from .prototype_classes import alignment, check_labels, rows_of

CLOSE = 1 / 4
"""Share of ‖q‖² + ‖p‖² below which points are near: products would cancel, and differences take their place."""

NOISE = 2.0**-20
"""Share below which a squared distance of half-precision features is 0."""


@dataclass(frozen=True)
class Points:
    """Queries and prototypes as the kernels read them, (batch, rows, features), and what is known of each."""

    metric: str
    queries: Tensor
    prototypes: Tensor
    operands: Tensor  # the queries of products: a centred copy where `raw`
    centre: Tensor
    of_queries: Tensor
    of_classes: Tensor
    raw: bool  # products of half-precision features as such
    close: float

    @property
    def dtype(self) -> torch.dtype:
        return self.of_queries.dtype

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """batch, queries, classes, features"""
        return len(self.queries), self.queries.shape[1], self.prototypes.shape[1], self.queries.shape[2]

    @property
    def strides(self) -> tuple[int, ...]:
        return tuple(stride for x in (self.operands, self.queries, self.prototypes) for stride in x.stride()[:2])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.operands, self.queries, self.prototypes, self.centre, self.of_queries, self.of_classes

    @property
    def near(self) -> bool:
        """Whether gradients of near pairs are taken by difference."""
        return self.metric != "cosine" and not self.raw

    @property
    def tf32(self) -> bool:
        """Whether gradients multiply float16 features by weights in TF32: their own dtype has not the weights' range.
        On AMD float32 products take their place."""
        return self.raw and self.queries.dtype == torch.float16 and not torch.version.hip

    @property
    def blocks(self) -> tiles.Blocks:
        return tiles.class_tile(self.raw, self.queries.dtype, self.metric)

    def constants(self, blocks: tiles.Blocks) -> dict[str, object]:
        """Of the kernels that take distances."""
        return {
            "METRIC": self.metric,
            "RAW": self.raw,
            "CLOSE": self.close,
            "ACCUMULATOR": TRITON_DTYPES[self.dtype],
            "OPERAND": operand(self.queries.dtype, self.queries.device),
            "PRECISION": precision(),
            "BLOCK": blocks.rows,
            "CLASSES": blocks.columns,
            "BLOCK_K": blocks.depth,
            "ALIGN": alignment(*self.strides),
            **blocks.options,
        }


def check(queries: Tensor, prototypes: Tensor) -> None:
    """The public function names what is wrong; this keeps a direct call of the op from reading past the end."""
    if prototypes.shape[:-2] != queries.shape[:-2] or prototypes.shape[-1] != queries.shape[-1]:
        expected = f"the batch dimensions and features of queries, {tuple(queries.shape)}"
        got = f"shape {tuple(prototypes.shape)}"
        raise ValueError(f"prototypes: expected {expected}, got {got}; pass matching features")
    if prototypes.dtype != queries.dtype:
        raise TypeError(f"prototypes: expected {queries.dtype}, got {prototypes.dtype}; convert it")


def prepare(queries: Tensor, prototypes: Tensor, metric: str, logits: bool) -> Points:
    """The centre and lengths of all rows, in two launches. logits: squared distances of half-precision features are no
    nearer to 0 than they come out, since what counts is the absolute error."""
    check(queries, prototypes)
    q, p = rows_of(queries), rows_of(prototypes)
    batch, num_queries, num_features = q.shape
    num_classes, dtype = p.shape[1], accumulator(q.dtype)
    raw = q.dtype.itemsize == 2 and batch * num_queries * num_classes * num_features >= tiles.HALF_WORK
    copied = raw and metric != "cosine"
    operands = q.new_empty(q.shape) if copied else q
    centre = q.new_empty(batch, num_features, dtype=dtype)
    blocks, statistics = tiles.statistics(), []
    for x, of_prototypes in ((p, True), (q, False)):
        statistics.append(q.new_empty(x.shape[:2], dtype=dtype))
        launch(
            statistics_kernel,
            batch * ceil_div(x.shape[1], blocks.rows),
            q.device,
            x,
            p,
            centre,
            statistics[-1],
            operands,
            *x.stride()[:2],
            *p.stride()[:2],
            x.shape[1],
            num_classes,
            num_features,
            METRIC=metric,
            PROTOTYPES=of_prototypes,
            RAW=copied,
            ACCUMULATOR=TRITON_DTYPES[dtype],
            ROWS=blocks.rows,
            COLUMNS=blocks.columns,
            **blocks.options,
        )
    of_classes, of_queries = statistics
    close = NOISE if raw else CLOSE
    if metric == "cosine" or raw and logits and metric == "sqeuclidean":
        close = 0.0
    return Points(metric, q, p, operands, centre, of_queries, of_classes, raw, close)


def prototype_cross_entropy(
    queries: Tensor,
    prototypes: Tensor,
    temperature: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    metric: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_labels("targets", targets, queries.shape[:-1])
    points = prepare(queries, prototypes, metric, logits=True)
    batch, num_queries, num_classes, num_features = points.sizes
    blocks, targets = tiles.swept(points.blocks, queries.device), flatten(targets, 1).contiguous()
    query_blocks, class_tiles = ceil_div(num_queries, blocks.rows), max(1, ceil_div(num_classes, blocks.columns))
    splits = tiles.class_splits(batch * query_blocks, class_tiles, queries.device)
    chunk = ceil_div(class_tiles, splits) * blocks.columns
    partials = points.of_queries.new_empty(4 if label_smoothing else 3, splits, batch, num_queries)
    launch(
        sweep_kernel,
        batch * query_blocks * splits,
        queries.device,
        *points.tensors,
        temperature.contiguous(),
        targets,
        partials,
        *points.strides,
        num_queries,
        num_classes,
        num_features,
        chunk,
        splits,
        splits * batch * num_queries,
        SMOOTHED=label_smoothing != 0,
        **points.constants(blocks),
    )
    losses, largest, log_sum = (points.of_queries.new_empty(batch, num_queries) for _ in range(3))
    present = num_classes - (points.of_classes < 0).sum(-1)
    join = tiles.Blocks(128, 1, 0, 4, 1)
    launch(
        join_kernel,
        ceil_div(batch * num_queries, join.rows),
        queries.device,
        partials,
        targets,
        present,
        losses,
        largest,
        log_sum,
        batch * num_queries,
        num_queries,
        num_classes,
        splits,
        ignore_index,
        SMOOTHING=label_smoothing,
        ACCUMULATOR=TRITON_DTYPES[points.dtype],
        ROWS=join.rows,
        **join.options,
    )
    kept = (targets != ignore_index).sum(-1)
    loss = losses
    if reduction != "none":
        loss = losses.sum(-1) / kept if reduction == "mean" else losses.sum(-1)
    shape = queries.shape[:-1]
    return (
        loss.view(shape if reduction == "none" else shape[:-1]),
        largest.view(shape),
        log_sum.view(shape),
        present.view(shape[:-1]),
        kept.view(shape[:-1]),
    )


def prototype_cross_entropy_backward(
    grad_loss: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    temperature: Tensor,
    targets: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    present: Tensor,
    kept: Tensor,
    ignore_index: int,
    label_smoothing: float,
    metric: str,
    reduction: str,
    need_queries: bool,
    need_prototypes: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_labels("targets", targets, queries.shape[:-1])
    points = prepare(queries, prototypes, metric, logits=True)
    each = reduction == "none"
    grad = flatten(grad_loss, 1 if each else 0)
    return gradients(
        points,
        grad,
        Softmax(temperature, targets, largest, log_sum, present, kept, largest),
        (queries, prototypes, temperature),
        (need_queries, need_prototypes, need_temperature),
        "cross entropy",
        (grad.stride(0), grad.stride(1) if each else 0),
        ignore_index,
        reduction == "mean",
        label_smoothing,
    )


class Softmax(NamedTuple):
    """What a gradient reads of a forward pass, by query or by batch element; what it does not need may be anything."""

    temperature: Tensor
    targets: Tensor
    largest: Tensor
    log_sum: Tensor
    present: Tensor
    kept: Tensor
    totals: Tensor


def gradients(
    points: Points,
    grad: Tensor,
    known: Softmax,
    inputs: tuple[Tensor, Tensor, Tensor],
    needs: tuple[bool, bool, bool],
    mode: str,
    grad_strides: tuple[int, int] = (0, 0),
    ignore_index: int = 0,
    mean: bool = False,
    label_smoothing: float = 0.0,
    num_neighbours: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of some classes at a time, the distances formed again, then the products of the gradients with them."""
    batch, num_queries, num_classes, num_features = points.sizes
    need_queries, need_prototypes, need_temperature = needs
    queries, prototypes, temperature = inputs
    blocks, like = tiles.weights(points.blocks, mode), points.of_queries
    width = tiles.weights_width(batch * num_queries, num_classes, blocks.columns, points.raw)
    query_blocks, class_blocks = ceil_div(num_queries, blocks.rows), width // blocks.columns
    weights_dtype = queries.dtype if points.raw and queries.dtype == torch.bfloat16 else points.dtype
    weights = like.new_empty(batch, num_queries, width, dtype=weights_dtype)
    row_sums, class_sums = like.new_empty(batch, class_blocks, num_queries), like.new_empty(batch, query_blocks, width)
    near_weights, near_tiles = like, like
    if points.near:
        near_weights = like.new_empty(weights.shape)
        near_tiles = like.new_empty(batch, query_blocks, class_blocks, dtype=torch.int32)
    slopes = like.new_empty(batch, class_blocks, num_queries) if need_temperature else like
    grad_queries = queries.new_empty(queries.shape if need_queries else (0,))
    grad_prototypes = prototypes.new_empty(prototypes.shape if need_prototypes else (0,))
    chunks = range(0, max(num_classes, 1), width)
    partial = like.new_empty(batch, num_queries, num_features) if need_queries and len(chunks) > 1 else like
    known = [x.contiguous() for x in known]
    for first_class in chunks:
        launch(
            weights_kernel,
            batch * query_blocks * class_blocks,
            queries.device,
            grad,
            *points.tensors,
            *known,
            weights,
            row_sums,
            class_sums,
            near_weights,
            near_tiles,
            slopes,
            *grad_strides,
            *points.strides,
            num_queries,
            num_classes,
            num_features,
            first_class,
            width,
            ignore_index,
            num_neighbours,
            MODE=mode,
            MEAN=mean,
            SMOOTHING=label_smoothing,
            SLOPES=need_temperature,
            NEAR=points.near,
            TF32=points.tf32,
            **points.constants(blocks),
        )
        if need_queries or need_prototypes:
            pull(
                points,
                (weights, row_sums, class_sums, near_weights, near_tiles),
                (partial, grad_queries, grad_prototypes),
                first_class,
                (need_queries, need_prototypes),
            )
    of_temperature = temperature.new_empty(0)
    if need_temperature:
        of_temperature = slopes.sum((1, 2)).view(temperature.shape).to(temperature.dtype)
    return grad_queries, grad_prototypes, of_temperature


def distances(points: Points, temperature: Tensor, out: Tensor, mode: str, *softmax: Tensor) -> None:
    """Write distances, logits or sums; softmax: incoming gradient, largest logits and logarithms of sums."""
    batch, num_queries, num_classes, num_features = points.sizes
    blocks = tiles.weights(points.blocks, mode)
    launch(
        distances_kernel,
        batch * ceil_div(num_queries, blocks.rows) * ceil_div(num_classes, blocks.columns),
        out.device,
        *points.tensors,
        temperature,
        *(softmax or (out, out, out)),
        out,
        *points.strides,
        num_queries,
        num_classes,
        num_features,
        MODE=mode,
        **points.constants(blocks),
    )


def pairwise_distance(queries: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    points = prepare(queries, prototypes, metric, logits=False)
    result = points.of_queries.new_empty(*queries.shape[:-1], prototypes.shape[-2])
    distances(points, result, result, "distance")
    return result


def pairwise_distance_backward(
    grad_distances: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    metric: str,
    need_queries: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    points = prepare(queries, prototypes, metric, logits=False)
    grad, like = grad_distances.contiguous(), points.of_queries
    known = Softmax(like, like, like, like, like, like, like)
    inputs, needs = (queries, prototypes, like), (need_queries, need_prototypes, False)
    return gradients(points, grad, known, inputs, needs, "distance")[:2]


def prototype_softmax(
    queries: Tensor, prototypes: Tensor, temperature: Tensor, metric: str, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    points = prepare(queries, prototypes, metric, logits=True)
    shape, num_classes = queries.shape[:-1], prototypes.shape[-2]
    result = points.of_queries.new_empty(*shape, num_classes)
    largest, log_sum = (points.of_queries.new_empty(shape) for _ in range(2))
    distances(points, temperature.contiguous(), result, "logits")
    blocks = tiles.softmax()
    launch(
        softmax_kernel,
        ceil_div(largest.numel(), blocks.rows),
        result.device,
        result,
        largest,
        log_sum,
        largest.numel(),
        num_classes,
        LOG=log,
        ACCUMULATOR=TRITON_DTYPES[points.dtype],
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        **blocks.options,
    )
    return result, largest, log_sum


def prototype_softmax_backward(
    grad_probabilities: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    temperature: Tensor,
    largest: Tensor,
    log_sum: Tensor,
    metric: str,
    log: bool,
    need_queries: bool,
    need_prototypes: bool,
    need_temperature: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    points = prepare(queries, prototypes, metric, logits=True)
    batch, num_queries, num_classes, _ = points.sizes
    grad, temperature = grad_probabilities.contiguous(), temperature.contiguous()
    largest, log_sum = largest.contiguous(), log_sum.contiguous()
    if log:
        totals = grad.sum(-1)
    else:
        blocks = ceil_div(num_classes, points.blocks.columns)
        parts = points.of_queries.new_empty(batch, blocks, num_queries)
        distances(points, temperature, parts, "totals", grad, largest, log_sum)
        totals = parts.sum(1)
    present = num_classes - (points.of_classes < 0).sum(-1)
    known = Softmax(temperature, largest, largest, log_sum, present, largest, totals)
    inputs, needs = (queries, prototypes, temperature), (need_queries, need_prototypes, need_temperature)
    return gradients(points, grad, known, inputs, needs, "log softmax" if log else "softmax")


def pull(
    points: Points,
    weighed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    first_class: int,
    needs: tuple[bool, bool],
) -> None:
    """Gradients from the weights of the classes from `first_class` on; those of the queries add up."""
    batch, num_queries, num_classes, num_features = points.sizes
    weights, row_sums, class_sums, *_ = weighed
    width, features = weights.shape[-1], points.queries.dtype
    blocks, class_width = tiles.pull(points.raw, features, points.metric)
    raw_float16 = points.raw and features == torch.float16
    of_prototypes = ceil_div(width, blocks.rows) * ceil_div(num_features, class_width)
    of_queries = ceil_div(num_queries, blocks.rows) * ceil_div(num_features, blocks.columns)
    launch(
        pull_kernel,
        batch * (needs[0] * of_queries + needs[1] * of_prototypes),
        weights.device,
        *points.tensors[1:],
        *weighed,
        *grads,
        *points.strides[2:],
        num_queries,
        num_classes,
        num_features,
        first_class,
        width,
        row_sums.shape[1],
        class_sums.shape[1],
        METRIC=points.metric,
        NEED_QUERIES=needs[0],
        NEED_PROTOTYPES=needs[1],
        FIRST=first_class == 0,
        LAST=first_class + width >= num_classes,
        NEAR=points.near,
        RAW=points.raw,
        ACCUMULATOR=TRITON_DTYPES[points.dtype],
        OPERAND=tl.float32 if raw_float16 else operand(features, weights.device),
        PRECISION="tf32" if points.tf32 else precision(),
        BLOCK=blocks.rows,
        WIDTH=blocks.columns,
        CLASS_WIDTH=class_width,
        BLOCK_K=blocks.depth,
        ALIGN=alignment(*points.strides),
        **blocks.options,
    )
