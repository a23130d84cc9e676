"""The nearest prototypes of each query on Triton: kernels, and functions that take and give what the ops do.

Distances are compared by their bits as integers, which order them as they are not negative: those of NaN come after
infinity, then those of an empty class, then nothing at all.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .many_classes import distance_tile, points_of
from .points import kernel
from .problem import TRITON_DTYPES, ceil_div, launch
from .prototype_classes import check_labels
from .prototypes import Points, Softmax, distances, gradients, prepare

INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


@triton.jit
def keys_of(distance, exists, there, LAST: tl.constexpr, KEY: tl.constexpr):
    """What to order by, and bits of the distance (NaN to an empty class)."""
    bits = tl.where(distance == 0.0, 0.0, distance).to(KEY, bitcast=True)  # −0 would come first
    bits = tl.where(distance == distance, bits, LAST - 2)
    return tl.where(exists, tl.where(there, bits, LAST - 1), LAST)


@kernel
def nearest_kernel(
    queries,
    exact_queries,
    prototypes,
    centre,
    of_queries,
    of_classes,
    keys,  # (batch, Q, splits, SLOTS): of the nearest of each chunk, in no order
    found,  # (batch, Q, splits, SLOTS) int32: their classes
    queries_batch,
    queries_row,
    exact_batch,
    exact_row,
    prototypes_batch,
    prototypes_row,
    num_queries,
    num_classes,
    num_features,
    chunk,
    splits,
    SLOTS: tl.constexpr,
    LAST: tl.constexpr,
    METRIC: tl.constexpr,
    RAW: tl.constexpr,
    CLOSE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The nearest of a chunk of the classes, which pass by tile by tile, to some queries."""
    program = tl.program_id(0)
    blocks = (num_queries + BLOCK - 1) // BLOCK
    block, split = program % blocks, program // blocks % splits  # programs that run together share their classes
    batch = (program // blocks // splits).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < num_queries
    points = points_of(
        batch, queries, exact_queries, prototypes, centre, of_classes, queries_batch, queries_row, exact_batch,
        exact_row, prototypes_batch, prototypes_row, num_queries, num_classes, num_features, ALIGN,
    )  # fmt: skip
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    slots = tl.arange(0, SLOTS)
    best = tl.full((BLOCK, SLOTS), LAST, keys.dtype.element_ty)
    best = tl.where(in_rows[:, None], best, -1)  # nothing is nearer to no query
    which = tl.zeros((BLOCK, SLOTS), tl.int32) + (0x7FFFFFFF - slots)[None, :]  # no two alike
    worst, worst_class = tl.max(best, 1), tl.max(which, 1)
    column = tl.arange(0, CLASSES)
    begin = split * chunk
    for first in range(begin, tl.minimum(begin + chunk, num_classes), CLASSES):
        distance, there = distance_tile(
            points, of_query, rows, first, METRIC, RAW, CLOSE, ACCUMULATOR, OPERAND, PRECISION, CLASSES, BLOCK_K
        )
        exists = column < num_classes - first
        key = keys_of(distance, exists[None, :], there[None, :], LAST, keys.dtype.element_ty)
        least = tl.min(key, 1)
        while tl.max((least < worst).to(tl.int32), 0) > 0:  # among equals those seen before are lower classes
            nearest = tl.min(tl.where(key == least[:, None], column[None, :], CLASSES), 1)
            slot = (best == worst[:, None]) & (which == worst_class[:, None]) & (least < worst)[:, None]
            best = tl.where(slot, least[:, None], best)
            which = tl.where(slot, first + nearest[:, None], which)
            key = tl.where(column[None, :] == nearest[:, None], LAST, key)
            worst, least = tl.max(best, 1), tl.min(key, 1)
            worst_class = tl.max(tl.where(best == worst[:, None], which, -1), 1)
    out = (place * splits + split)[:, None] * SLOTS + slots[None, :]
    tl.store(keys + out, best, in_rows[:, None])
    tl.store(found + out, which, in_rows[:, None])


@kernel
def select_kernel(
    keys,  # (rows, candidates)
    found,  # (rows, candidates) int32
    distances,  # (rows, k)
    indices,  # (rows, k) int64
    num_rows,
    num_candidates,
    k,
    LAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The k nearest of the candidates, one after the other: each the first after the one before."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    KEY: tl.constexpr = keys.dtype.element_ty
    chosen, chosen_class = tl.full((ROWS,), -1, KEY), tl.full((ROWS,), -1, tl.int32)
    for rank in range(0, k):
        best, which = tl.full((ROWS,), LAST, KEY), tl.full((ROWS,), 0x7FFFFFFF, tl.int32)
        for first in range(0, num_candidates, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            mask = in_rows[:, None] & (columns < num_candidates)[None, :]
            offsets = rows[:, None] * num_candidates + columns[None, :]
            key, candidate = tl.load(keys + offsets, mask, other=LAST), tl.load(found + offsets, mask, other=0x7FFFFFFF)
            after = (key == chosen[:, None]) & (candidate > chosen_class[:, None]) | (key > chosen[:, None])
            key = tl.where(after, key, LAST)
            least = tl.min(key, 1)
            nearest = tl.min(tl.where(key == least[:, None], candidate, 0x7FFFFFFF), 1)
            which = tl.where((least < best) | (least == best) & (nearest < which), nearest, which)
            best = tl.minimum(best, least)
        chosen, chosen_class = best, which
        tl.store(distances + rows * k + rank, chosen.to(distances.dtype.element_ty, bitcast=True), in_rows)
        tl.store(indices + rows * k + rank, chosen_class.to(tl.int64), in_rows)


def check_k(k: int, num_classes: int) -> None:
    """The public function names what is wrong; this keeps a direct call of the op within bounds."""
    if not 1 <= k <= num_classes:
        raise ValueError(f"k: expected 1 ... {num_classes} (the number of prototypes), got {k}")


def nearest_prototype(queries: Tensor, prototypes: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    check_k(k, prototypes.shape[-2])
    points = prepare(queries, prototypes, metric, logits=False)
    nearest = points.of_queries.new_empty(*queries.shape[:-1], k)
    indices = nearest.new_empty(nearest.shape, dtype=torch.int64)
    (search if k <= tiles.MOST_SLOTS else sort)(points, nearest, indices)
    return nearest, indices


def search(points: Points, nearest: Tensor, indices: Tensor) -> None:
    """The nearest of each chunk of classes, in slots of which there is a power of two, then of all."""
    batch, num_queries, num_classes, num_features = points.sizes
    k, device, key = nearest.shape[-1], nearest.device, INTEGERS[points.dtype]
    slots, last = 1 << (k - 1).bit_length(), torch.iinfo(key).max
    blocks = tiles.nearest(points.blocks, slots)
    query_blocks, class_tiles = ceil_div(num_queries, blocks.rows), ceil_div(num_classes, blocks.columns)
    splits = tiles.class_splits(batch * query_blocks, class_tiles, device)
    chunk = ceil_div(class_tiles, splits) * blocks.columns
    keys = nearest.new_empty(batch, num_queries, splits, slots, dtype=key)
    found = nearest.new_empty(keys.shape, dtype=torch.int32)
    launch(
        nearest_kernel,
        batch * query_blocks * splits,
        device,
        *points.tensors,
        keys,
        found,
        *points.strides,
        num_queries,
        num_classes,
        num_features,
        chunk,
        splits,
        SLOTS=slots,
        LAST=last,
        **points.constants(blocks),
    )
    select = tiles.select(splits * slots)
    launch(
        select_kernel,
        ceil_div(batch * num_queries, select.rows),
        device,
        keys,
        found,
        nearest,
        indices,
        batch * num_queries,
        splits * slots,
        k,
        LAST=last,
        ROWS=select.rows,
        COLUMNS=select.columns,
        **select.options,
    )


def sort(points: Points, nearest: Tensor, indices: Tensor) -> None:
    """For more neighbours than there are slots: distances to some classes at a time, sorted with the nearest so far."""
    batch, num_queries, num_classes, _ = points.sizes
    k, key = nearest.shape[-1], INTEGERS[points.dtype]
    last = torch.iinfo(key).max
    width = max(k, tiles.weights_width(batch * num_queries, num_classes, points.blocks.columns, points.raw))
    best = torch.empty(batch, num_queries, 0, dtype=key, device=nearest.device)
    which = best.long()
    for first in range(0, num_classes, width):
        part = slice(first, first + width)
        of_classes = points.of_classes[:, part].contiguous()
        some = dataclasses.replace(points, prototypes=points.prototypes[:, part], of_classes=of_classes)
        found = nearest.new_empty(batch, num_queries, of_classes.shape[1])
        distances(some, found, found, "distance")
        keys = torch.where(found.isnan(), last - 2, torch.where(found == 0, 0.0, found).view(key))
        keys = torch.where((of_classes < 0).unsqueeze(1), last - 1, keys)
        classes = torch.arange(first, first + found.shape[-1], device=found.device).expand(found.shape)
        best, order = torch.cat((best, keys), -1).sort(dim=-1, stable=True)
        best, order = best[..., :k], order[..., :k]
        which = torch.cat((which, classes), -1).gather(-1, order)
    nearest.copy_(best.contiguous().view(nearest.dtype).view(nearest.shape))
    indices.copy_(which.view(nearest.shape))


def nearest_prototype_backward(
    grad_distances: Tensor,
    queries: Tensor,
    prototypes: Tensor,
    indices: Tensor,
    k: int,
    metric: str,
    need_queries: bool,
    need_prototypes: bool,
) -> tuple[Tensor, Tensor]:
    check_k(k, prototypes.shape[-2])
    check_labels("indices", indices, torch.Size((*queries.shape[:-1], k)))
    points = prepare(queries, prototypes, metric, logits=False)
    like = points.of_queries
    known = Softmax(like, indices, like, like, like, like, like)
    inputs, needs = (queries, prototypes, like), (need_queries, need_prototypes, False)
    return gradients(points, grad_distances.contiguous(), known, inputs, needs, "neighbours", num_neighbours=k)[:2]
