"""Kernels for queries against any number of classes: distances tile by tile, and what a loss makes of them.

Where RAW, features in half precision are multiplied as they are, but for the queries, which are a copy less a centre of
their own dtype: that is exact where it matters, since a feature has a centre only where it is far from 0 against its
spread. ‖q − p‖² = ‖q′‖² + 2 q′·c − 2 q′·p + ‖p − c‖² with q′ = q − c; squared distances below the rounding errors of
these products are 0. Else both are centred in the accumulation dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .points import by_differences, kernel, load_rows, located


@kernel
def statistics_kernel(
    x,  # (batch, rows, D)
    prototypes,  # (batch, C, D)
    centre,  # (batch, D): written where PROTOTYPES
    statistics,  # (batch, rows): written. See `distance_tile`; −1 for an empty class
    copy,  # (batch, rows, D): queries less the centre, written where RAW and not PROTOTYPES
    x_batch,
    x_row,
    prototypes_batch,
    prototypes_row,
    num_rows,
    num_classes,
    num_features,
    METRIC: tl.constexpr,
    PROTOTYPES: tl.constexpr,
    RAW: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The centre, from a few prototypes (near is enough), and lengths: of differences from it, or for the cosine the
    inverse ones, 0 of the zero vector."""
    blocks = (num_rows + ROWS - 1) // ROWS
    program = tl.program_id(0)
    batch = (program // blocks).to(tl.int64)
    rows = program % blocks * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    x += batch * x_batch
    prototypes += batch * prototypes_batch
    sampled = (tl.arange(0, 16).to(tl.int64) * num_classes) // 16
    place = batch * num_rows + rows
    total, product = tl.zeros((ROWS,), ACCUMULATOR), tl.zeros((ROWS,), ACCUMULATOR)
    absent = tl.zeros((ROWS,), tl.int32)
    divisor = tl.zeros((ROWS,), ACCUMULATOR)
    if METRIC == "cosine":
        for first in range(0, num_features, COLUMNS):
            columns = first + tl.arange(0, COLUMNS)
            values = load_rows(x, x_row, rows, in_rows, columns, columns < num_features, ACCUMULATOR)
            divisor = tl.maximum(divisor, tl.max(tl.abs(values), 1))
        divisor = tl.where(divisor == 0.0, 1.0, divisor)
    for first in range(0, num_features, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        within = columns < num_features
        values = load_rows(x, x_row, rows, in_rows, columns, within, ACCUMULATOR)
        if PROTOTYPES:
            absent += tl.sum((values != values).to(tl.int32), 1)
        if METRIC == "cosine":
            values /= divisor[:, None]
        else:
            few = load_rows(prototypes, prototypes_row, sampled, sampled >= 0, columns, within, ACCUMULATOR)
            finite = tl.abs(few) < float("inf")
            number = tl.maximum(tl.sum(finite.to(ACCUMULATOR), 0), 1.0)
            mean = tl.sum(tl.where(finite, few, 0.0), 0) / number
            if RAW:
                spread = tl.sum(tl.where(finite, tl.abs(few - mean[None, :]), 0.0), 0) / number
                mean = tl.where(tl.abs(mean) > 4.0 * spread, mean, 0.0).to(x.dtype.element_ty).to(ACCUMULATOR)
            if PROTOTYPES:
                if program % blocks == 0:
                    tl.store(centre + batch * num_features + columns, mean, within)
            values -= mean[None, :]
            if RAW and not PROTOTYPES:
                rounded = values.to(x.dtype.element_ty)
                values = rounded.to(ACCUMULATOR)
                offsets = place[:, None] * num_features + columns[None, :]
                tl.store(copy + offsets, rounded, in_rows[:, None] & within[None, :])
                product += tl.sum(tl.where(tl.abs(values) < float("inf"), values * mean[None, :], 0.0), 1)
        values = tl.where(within[None, :], values, 0.0)
        total += tl.sum(values * values, 1)
    if METRIC == "cosine":
        length = tl.sqrt(total)
        result = tl.where(length == 0.0, 0.0, 1.0 / tl.where(length == 0.0, 1.0, length) / divisor)
    else:
        result = total + 2.0 * product
    if PROTOTYPES:
        result = tl.where((absent == num_features) & (num_features > 0), -1.0, result)
    tl.store(statistics + place, result, in_rows)


@triton.jit
def points_of(
    batch, queries, exact_queries, prototypes, centre, of_classes, queries_batch, queries_row, exact_batch, exact_row,
    prototypes_batch, prototypes_row, num_queries, num_classes, num_features, ALIGN: tl.constexpr,
):  # fmt: skip
    """The points of a batch element, as `distance_tile` takes them. exact_queries: as they are where `queries` is the
    copy."""
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    exact_queries, exact_row = located(exact_queries, batch, exact_batch, exact_row, ALIGN)
    prototypes, prototypes_row = located(prototypes, batch, prototypes_batch, prototypes_row, ALIGN)
    features = queries, queries_row, exact_queries, exact_row, prototypes, prototypes_row
    known = centre + batch * num_features, of_classes + batch * num_classes
    return features, known, (num_queries, num_classes, num_features)


@triton.jit
def distance_tile(
    points,
    of_queries,  # (rows,): their statistics
    rows,
    first,
    METRIC: tl.constexpr,
    RAW: tl.constexpr,
    CLOSE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Distances of some queries to the CLASSES classes from `first` on, and which of these exist and are not empty.

    What there is of each column of a tile takes registers, many where a thread has a whole row of it: they are read
    again after the loop (the modifier, which names what is done anyway, keeps Triton from making one load of both), and
    columns are counted from `first`, so that the compiler knows all their offsets.
    """
    features, known, sizes = points
    centre, statistics = known
    num_queries, num_classes, num_features = sizes
    queries, queries_row, exact_queries, exact_row, prototypes, prototypes_row = features
    in_rows = rows < num_queries
    column = tl.arange(0, CLASSES)
    statistics += first
    of_classes = tl.load(statistics + column, column < num_classes - first, other=-1.0)
    present = (of_classes < 0.0) == 0  # NaN is there
    if METRIC != "cosine":  # what is infinitely far is so by its statistics: Inf − Inf is no distance
        in_rows = in_rows & (of_queries != float("inf"))
        present = present & (of_classes != float("inf"))
    products = tl.zeros((rows.shape[0], CLASSES), ACCUMULATOR)
    q = queries + rows[:, None].to(tl.int64) * queries_row
    p = prototypes + (first + column)[None, :].to(tl.int64) * prototypes_row
    for k in range(0, num_features, BLOCK_K):
        columns = k + tl.arange(0, BLOCK_K)
        within = columns < num_features
        a = tl.load(q + columns[None, :], in_rows[:, None] & within[None, :], other=0.0)
        b = tl.load(p + columns[:, None], present[None, :] & within[:, None], other=0.0)
        if RAW:
            a, b = a.to(OPERAND), b.to(OPERAND)
        else:
            a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
            if METRIC == "cosine":
                a *= of_queries[:, None]
                b *= of_classes[None, :]
            else:
                mean = tl.load(centre + columns, within, other=0.0)
                a -= mean[None, :]
                b -= mean[:, None]
        products = tl.dot(a, b, products, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    of_classes = tl.load(statistics + column, column < num_classes - first, other=-1.0, cache_modifier=".ca")
    there = (of_classes < 0.0) == 0
    if METRIC == "cosine":
        if RAW:
            products = products * of_queries[:, None] * of_classes[None, :]
        distance = tl.maximum(1.0 - products, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(distance, 2.0, propagate_nan=tl.PropagateNan.ALL), there
    else:
        scale = of_queries[:, None] + of_classes[None, :]
        distance = scale - 2.0 * products
        distance = tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if CLOSE > 0.0 and RAW:
            distance = tl.where(distance < CLOSE * tl.abs(scale), 0.0, distance)
        elif CLOSE > 0.0:
            # The mark stays in place of the distance: masks that live through the loop take registers.
            close = in_rows[:, None] & present[None, :] & (distance < CLOSE * scale)
            distance = by_differences(
                tl.where(close, -1.0, distance), exact_queries, exact_row, tl.minimum(rows, num_queries - 1),
                prototypes, prototypes_row, first, num_classes, num_features, ACCUMULATOR, CLASSES, BLOCK_K,
            )  # fmt: skip
        if METRIC == "euclidean":
            distance = tl.sqrt(distance)
        return distance, there


@triton.jit
def class_of(targets, mask, num_classes):
    """Targets in 32 bits; −1 where there is none in range."""
    target = tl.load(targets, mask, other=-1)
    return tl.where((target >= 0) & (target < num_classes), target, -1).to(tl.int32)


@kernel
def sweep_kernel(
    queries,
    exact_queries,
    prototypes,
    centre,
    of_queries,
    of_classes,
    temperature,  # (batch,)
    targets,  # (batch, Q)
    partials,  # (4, splits, batch, Q): largest logit, sum of exponentials, target's logit, sum of logits
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
    partials_size,
    METRIC: tl.constexpr,
    RAW: tl.constexpr,
    CLOSE: tl.constexpr,
    SMOOTHED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The softmax of some queries over a chunk of the classes, which pass by tile by tile."""
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
    target = class_of(targets + place, in_rows, num_classes)
    t = tl.load(temperature + batch)
    largest = tl.full((BLOCK,), float("-inf"), ACCUMULATOR)
    total, of_target = tl.zeros((BLOCK,), ACCUMULATOR), tl.zeros((BLOCK,), ACCUMULATOR)
    logits_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    column = tl.arange(0, CLASSES)
    begin = split * chunk
    for first in range(begin, tl.minimum(begin + chunk, num_classes), CLASSES):
        distance, there = distance_tile(
            points, of_query, rows, first, METRIC, RAW, CLOSE, ACCUMULATOR, OPERAND, PRECISION, CLASSES, BLOCK_K
        )
        logits = distance * (-1.0 / t)
        if SMOOTHED:
            logits_sum += tl.sum(tl.where(there[None, :], logits, 0.0), 1)
        logits = tl.where(there[None, :], logits, float("-inf"))
        of_target += tl.sum(tl.where(column[None, :] == (target - first)[:, None], logits, 0.0), 1)
        more = tl.maximum(largest, tl.max(logits, 1))
        shift = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        largest = more
    out = partials + split.to(tl.int64) * (partials_size // splits) + place
    tl.store(out, largest, in_rows)
    tl.store(out + partials_size, total, in_rows)
    tl.store(out + 2 * partials_size, of_target, in_rows)
    if SMOOTHED:
        tl.store(out + 3 * partials_size, logits_sum, in_rows)


@kernel
def join_kernel(
    partials,  # (4, splits, batch, Q)
    targets,  # (batch, Q)
    present,  # (batch,): classes that are not empty
    losses,  # (batch, Q)
    largest_logits,  # (batch, Q)
    log_sums,  # (batch, Q): of the exponentials of the logits less the largest
    num_rows,
    num_queries,
    num_classes,
    splits,
    ignore_index,
    SMOOTHING: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Softmax and loss of each query from those over the chunks of classes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    size = splits.to(tl.int64) * num_rows
    largest = tl.full((ROWS,), float("-inf"), ACCUMULATOR)
    total, of_target = tl.zeros((ROWS,), ACCUMULATOR), tl.zeros((ROWS,), ACCUMULATOR)
    logits_sum = tl.zeros((ROWS,), ACCUMULATOR)
    place = partials + rows
    for _ in range(0, splits):
        other = tl.load(place, in_rows, other=0.0)
        more = tl.maximum(largest, other)
        shift = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp(largest - shift) + tl.load(place + size, in_rows, other=0.0) * tl.exp(other - shift)
        of_target += tl.load(place + 2 * size, in_rows, other=0.0)
        if SMOOTHING != 0.0:
            logits_sum += tl.load(place + 3 * size, in_rows, other=0.0)
        largest = more
        place += num_rows
    log_sum = tl.where(tl.abs(largest) == float("inf"), float("nan"), tl.log(total))
    target = tl.load(targets + rows, in_rows, other=0)
    loss = -((of_target - largest) - log_sum)
    if SMOOTHING != 0.0:
        classes = tl.load(present + rows // num_queries, in_rows, other=1).to(ACCUMULATOR)
        loss = (1.0 - SMOOTHING) * loss - SMOOTHING * (logits_sum / classes - (largest + log_sum))
    valid = (target >= 0) & (target < num_classes)
    loss = tl.where(target == ignore_index, 0.0, tl.where(valid, loss, float("nan")))
    tl.store(losses + rows, loss, in_rows)
    tl.store(largest_logits + rows, largest, in_rows)
    tl.store(log_sums + rows, log_sum, in_rows)


@kernel
def distances_kernel(
    queries,
    exact_queries,
    prototypes,
    centre,
    of_queries,
    of_classes,
    temperature,
    grad,  # (batch, Q, C), where MODE is "totals"
    largest_logits,  # (batch, Q), likewise
    log_sums,
    out,  # (batch, Q, C); (batch, class blocks, Q) where MODE is "totals"
    queries_batch,
    queries_row,
    exact_batch,
    exact_row,
    prototypes_batch,
    prototypes_row,
    num_queries,
    num_classes,
    num_features,
    MODE: tl.constexpr,
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
    """Distances (NaN to an empty class), logits (−Inf), or the sums of p ∂L/∂p over a block of classes."""
    program = tl.program_id(0)
    blocks, class_blocks = (num_queries + BLOCK - 1) // BLOCK, (num_classes + CLASSES - 1) // CLASSES
    block, class_block = program % blocks, program // blocks % class_blocks
    batch = (program // blocks // class_blocks).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    classes = class_block * CLASSES + tl.arange(0, CLASSES)
    in_rows, in_classes = rows < num_queries, classes < num_classes
    points = points_of(
        batch, queries, exact_queries, prototypes, centre, of_classes, queries_batch, queries_row, exact_batch,
        exact_row, prototypes_batch, prototypes_row, num_queries, num_classes, num_features, ALIGN,
    )  # fmt: skip
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    distance, there = distance_tile(
        points, of_query, rows, class_block * CLASSES, METRIC, RAW, CLOSE, ACCUMULATOR, OPERAND, PRECISION, CLASSES,
        BLOCK_K,
    )  # fmt: skip
    offsets = place[:, None] * num_classes + classes[None, :]
    mask = in_rows[:, None] & in_classes[None, :]
    if MODE == "distance":
        tl.store(out + offsets, tl.where(there[None, :], distance, float("nan")), mask)
    else:
        logits = tl.where(there[None, :], distance * (-1.0 / tl.load(temperature + batch)), float("-inf"))
        if MODE == "logits":
            tl.store(out + offsets, logits, mask)
        else:
            largest = tl.load(largest_logits + place, in_rows, other=0.0)
            log_sum = tl.load(log_sums + place, in_rows, other=0.0)
            probability = tl.exp((logits - largest[:, None]) - log_sum[:, None])
            incoming = tl.load(grad + offsets, mask, other=0.0).to(ACCUMULATOR)
            total = tl.sum(tl.where(mask, incoming * probability, 0.0), 1)
            tl.store(out + (batch * class_blocks + class_block) * num_queries + rows, total, in_rows)


@kernel
def softmax_kernel(
    logits,  # (rows, C): replaced by probabilities
    largest_logits,  # (rows,)
    log_sums,
    num_rows,
    num_classes,
    LOG: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The softmax of each row, or its logarithm, in place."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = rows < num_rows
    logits += rows[:, None] * num_classes
    largest = tl.full((ROWS,), float("-inf"), ACCUMULATOR)
    total = tl.zeros((ROWS,), ACCUMULATOR)
    for first in range(0, num_classes, COLUMNS):
        classes = first + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (classes < num_classes)[None, :]
        values = tl.load(logits + classes[None, :], mask, other=float("-inf"))
        more = tl.maximum(largest, tl.max(values, 1))
        shift = tl.where(more == float("-inf"), 0.0, more)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(values - shift[:, None]), 1)
        largest = more
    log_sum = tl.where(tl.abs(largest) == float("inf"), float("nan"), tl.log(total))
    tl.store(largest_logits + rows, largest, in_rows)
    tl.store(log_sums + rows, log_sum, in_rows)
    for first in range(0, num_classes, COLUMNS):
        classes = first + tl.arange(0, COLUMNS)
        mask = in_rows[:, None] & (classes < num_classes)[None, :]
        values = tl.load(logits + classes[None, :], mask, other=0.0)
        result = (values - largest[:, None]) - log_sum[:, None]
        tl.store(logits + classes[None, :], result if LOG else tl.exp(result), mask)
