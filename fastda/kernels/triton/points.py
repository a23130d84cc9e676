"""What the prototype kernels share on the device: loads, distances of a tile, directions of vectors."""

from __future__ import annotations

import functools

import triton
import triton.language as tl

kernel = functools.partial(
    triton.jit,
    do_not_specialize=(
        "num_samples", "num_queries", "num_classes", "num_rows",
        "support_batch", "support_row", "queries_batch", "queries_row", "exact_batch", "exact_row", "prototypes_batch",
        "prototypes_row", "grad_batch", "grad_row", "x_batch", "x_row", "chunk", "splits", "partials_size",
        "first_class", "ignore_index", "parts_of_queries", "parts_of_classes", "k",
        "num_candidates", "num_neighbours",
    ),
)  # fmt: skip
"""A kernel that is compiled anew for no size and no stride, but for numbers of features that are multiples of 16 or
not, which decides how wide it reads; ALIGN says the same of the strides."""


@triton.jit
def located(x, batch, batch_stride, row_stride, ALIGN: tl.constexpr):
    """Where the rows of a batch element begin, and how far apart they are."""
    x += batch * tl.multiple_of(batch_stride.to(tl.int64), ALIGN)
    return x, tl.multiple_of(row_stride.to(tl.int64), ALIGN)


@triton.jit
def load_rows(x, row_stride, rows, in_rows, columns, in_columns, DTYPE: tl.constexpr):
    """x[rows, columns] in DTYPE, 0 where there is none. Columns are next to each other."""
    offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    return tl.load(x + offsets, in_rows[:, None] & in_columns[None, :], other=0.0).to(DTYPE)


@triton.jit
def centre_of(p, in_rows):
    """The mean of each column over the rows that are finite there: (columns,). Distances do not change with it."""
    finite = in_rows[:, None] & (tl.abs(p) < float("inf"))
    return tl.sum(tl.where(finite, p, 0.0), 0) / tl.maximum(tl.sum(finite.to(p.dtype), 0), 1.0)


@triton.jit
def by_differences(
    distance, q, q_row, rows, p, p_row, first, num_classes, num_features,
    DTYPE: tl.constexpr, CLASSES: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Squared distances to CLASSES classes from `first` on, those that are −1 replaced by Σ(q − p)², exact where the
    expansion cancels: one pair of each query at a time, since they are few. All of `rows` exist."""
    column = tl.arange(0, CLASSES)
    while tl.min(distance) < 0.0:
        chosen = tl.min(tl.where(distance < 0.0, column[None, :], CLASSES), 1)
        classes = tl.minimum(first + chosen, num_classes - 1)
        squares = tl.zeros((rows.shape[0], BLOCK_K), DTYPE)
        for k in range(0, num_features, BLOCK_K):
            features = k + tl.arange(0, BLOCK_K)
            within = features < num_features
            difference = load_rows(q, q_row, rows, rows >= 0, features, within, DTYPE)
            difference -= load_rows(p, p_row, classes, classes >= 0, features, within, DTYPE)
            squares += difference * difference
        distance = tl.where(column[None, :] == chosen[:, None], tl.sum(squares, 1)[:, None], distance)
    return distance


@triton.jit
def add_differences(
    result, weights, x, x_row, rows, in_rows, y, y_row, first, columns, in_columns,
    DTYPE: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Adds Σ_k w_rk (x_r − y_k) to `result` for SAMPLES y from `first` on: one of each row at a time, since few of the
    weights are not 0."""
    sample = tl.arange(0, SAMPLES)
    chosen = tl.min(tl.where(weights != 0.0, sample[None, :], SAMPLES), 1)
    if tl.min(chosen, 0) < SAMPLES:
        own = load_rows(x, x_row, rows, in_rows, columns, in_columns, DTYPE)
        while tl.min(chosen, 0) < SAMPLES:
            there = chosen < SAMPLES
            weight = tl.sum(tl.where(sample[None, :] == chosen[:, None], weights, 0.0), 1)
            other = load_rows(y, y_row, first + chosen, there, columns, in_columns, DTYPE)
            result += tl.where(there[:, None], weight[:, None] * (own - other), 0.0)
            others = (weights != 0.0) & (sample[None, :] > chosen[:, None])
            chosen = tl.min(tl.where(others, sample[None, :], SAMPLES), 1)
    return result


@triton.jit
def weights_of(of_logit, distance, temperature, METRIC: tl.constexpr):
    """What a query's difference q − p (cosine: the prototype's direction) is multiplied by in the gradient."""
    if METRIC == "sqeuclidean":
        return of_logit * (-2.0 / temperature)
    elif METRIC == "cosine":
        return of_logit * (1.0 / temperature)
    else:
        return tl.where(distance == 0.0, 0.0, of_logit * (-1.0 / temperature) / distance)


@triton.jit
def rounded_to_tf32(x):
    """float32 with the 10 bits of mantissa that products in TF32 read, to nearest."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a carry would make a number of some NaN


@kernel
def directions_kernel(
    x,  # (batch, rows, D)
    directions,  # (batch, rows, D): written
    lengths,  # (batch, rows): written
    x_batch,
    x_row,
    num_rows,
    num_features,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x/‖x‖ and ‖x‖; 0 for the zero vector. Divided by the largest component first, which neither overflows nor
    underflows when squared."""
    blocks = (num_rows + ROWS - 1) // ROWS
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    x += batch * x_batch
    largest = tl.zeros((ROWS,), ACCUMULATOR)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        values = load_rows(x, x_row, rows, in_rows, columns, columns < num_features, ACCUMULATOR)
        largest = tl.maximum(largest, tl.max(tl.abs(values), 1))
    divisor = tl.where(largest == 0.0, 1.0, largest)
    squares = tl.zeros((ROWS,), ACCUMULATOR)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        values = load_rows(x, x_row, rows, in_rows, columns, columns < num_features, ACCUMULATOR) / divisor[:, None]
        squares += tl.sum(values * values, 1)
    length = tl.sqrt(squares)
    place = batch * num_rows + rows
    tl.store(lengths + place, length * divisor, in_rows)
    length = tl.where(length == 0.0, 1.0, length)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        in_columns = columns < num_features
        values = load_rows(x, x_row, rows, in_rows, columns, in_columns, ACCUMULATOR)
        result = values / divisor[:, None] / length[:, None]
        out = directions + place[:, None] * num_features + columns[None, :]
        tl.store(out, result, in_rows[:, None] & in_columns[None, :])


@kernel
def through_directions_kernel(
    grads,  # (rows, D): of directions
    directions,  # (rows, D)
    lengths,  # (rows,)
    out,  # (rows, D)
    num_rows,
    num_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The gradient through x/‖x‖: (g − (g·y) y)/‖x‖, 0 at the zero vector and for an empty class (all of y is NaN)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    along = tl.zeros((ROWS,), lengths.dtype.element_ty)
    absent = tl.zeros((ROWS,), tl.int32)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (columns < num_features)[None, :]
        offsets = rows[:, None] * num_features + columns[None, :]
        y = tl.load(directions + offsets, mask, other=0.0)
        along += tl.sum(tl.load(grads + offsets, mask, other=0.0) * y, 1)
        absent += tl.sum((y != y).to(tl.int32), 1)
    length = tl.load(lengths + rows, in_rows, other=0.0)
    nothing = (length == 0.0) | (absent == num_features)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (columns < num_features)[None, :]
        offsets = rows[:, None] * num_features + columns[None, :]
        y, grad = tl.load(directions + offsets, mask, other=0.0), tl.load(grads + offsets, mask, other=0.0)
        result = (grad - along[:, None] * y) / tl.where(nothing, 1.0, length)[:, None]
        tl.store(out + offsets, tl.where(nothing[:, None], 0.0, result).to(out.dtype.element_ty), mask)
