"""Kernels for queries against any number of classes: distances tile by tile, what a loss makes of them, and gradients.

Where RAW, features in half precision are multiplied as they are, but for the queries, which are a copy less a centre of
their own dtype: that is exact where it matters, since a feature has a centre only where it is far from 0 against its
spread. ‖q − p‖² = ‖q′‖² + 2 q′·c − 2 q′·p + ‖p − c‖² with q′ = q − c; squared distances below the rounding errors of
these products are 0. Else both are centred in the accumulation dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .points import differences_squared, kernel, load_rows, located, weights_of


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
                product += tl.sum(values * mean[None, :], 1)
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
def distance_tile(
    queries,  # of this batch element; the copy where RAW
    exact_queries,  # of this batch element
    prototypes,
    centre,
    of_queries,
    of_classes,
    queries_row,
    exact_row,
    prototypes_row,
    rows,
    in_rows,
    classes,
    there,
    num_queries,
    num_classes,
    num_features,
    METRIC: tl.constexpr,
    RAW: tl.constexpr,
    CLOSE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Distances of some queries to some classes. of_queries, of_classes: their statistics."""
    if METRIC != "cosine":  # what is infinitely far is so by its statistics: Inf − Inf is no distance
        in_rows = in_rows & (of_queries != float("inf"))
        there = there & (of_classes != float("inf"))
    products = tl.zeros((rows.shape[0], classes.shape[0]), ACCUMULATOR)
    q = queries + rows[:, None].to(tl.int64) * queries_row
    p = prototypes + classes[None, :].to(tl.int64) * prototypes_row
    for k in range(0, num_features, BLOCK_K):
        features = k + tl.arange(0, BLOCK_K)
        within = features < num_features
        a = tl.load(q + features[None, :], in_rows[:, None] & within[None, :], other=0.0)
        b = tl.load(p + features[:, None], there[None, :] & within[:, None], other=0.0)
        if RAW:
            a, b = a.to(OPERAND), b.to(OPERAND)
        else:
            a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
            if METRIC == "cosine":
                a *= of_queries[:, None]
                b *= of_classes[None, :]
            else:
                mean = tl.load(centre + features, within, other=0.0)
                a -= mean[None, :]
                b -= mean[:, None]
        products = tl.dot(a, b, products, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    if METRIC == "cosine":
        if RAW:
            products = products * of_queries[:, None] * of_classes[None, :]
        distance = tl.maximum(1.0 - products, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(distance, 2.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        scale = of_queries[:, None] + of_classes[None, :]
        distance = scale - 2.0 * products
        distance = tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if CLOSE > 0.0 and RAW:
            distance = tl.where(distance < CLOSE * tl.abs(scale), 0.0, distance)
        elif CLOSE > 0.0:
            # The mark stays in place of the distance: masks that live through the loop take registers.
            close = in_rows[:, None] & there[None, :] & (distance < CLOSE * scale)
            distance = tl.where(close, -1.0, distance)
            if tl.min(distance) < 0.0:
                exact = differences_squared(
                    exact_queries, exact_row, tl.minimum(rows, num_queries - 1), prototypes, prototypes_row,
                    tl.minimum(classes, num_classes - 1), num_features, ACCUMULATOR,
                )  # fmt: skip
                distance = tl.where(distance < 0.0, exact, distance)
        if METRIC == "euclidean":
            distance = tl.sqrt(distance)
        return distance


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
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    exact_queries, exact_row = located(exact_queries, batch, exact_batch, exact_row, ALIGN)
    prototypes, prototypes_row = located(prototypes, batch, prototypes_batch, prototypes_row, ALIGN)
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    target = class_of(targets + place, in_rows, num_classes)
    t = tl.load(temperature + batch)
    largest = tl.full((BLOCK,), float("-inf"), ACCUMULATOR)
    total, of_target = tl.zeros((BLOCK,), ACCUMULATOR), tl.zeros((BLOCK,), ACCUMULATOR)
    logits_sum = tl.zeros((BLOCK,), ACCUMULATOR)
    begin = split * chunk
    for first in range(begin, tl.minimum(begin + chunk, num_classes), CLASSES):
        classes = first + tl.arange(0, CLASSES)
        of_class = tl.load(of_classes + batch * num_classes + classes, classes < num_classes, other=-1.0)
        there = (of_class < 0.0) == 0  # NaN is there
        distance = distance_tile(
            queries, exact_queries, prototypes, centre + batch * num_features, of_query, of_class, queries_row,
            exact_row, prototypes_row, rows, in_rows, classes, there, num_queries, num_classes, num_features, METRIC,
            RAW, CLOSE, ACCUMULATOR, OPERAND, PRECISION, BLOCK_K,
        )  # fmt: skip
        logits = distance * (-1.0 / t)
        if SMOOTHED:
            logits_sum += tl.sum(tl.where(there[None, :], logits, 0.0), 1)
        logits = tl.where(there[None, :], logits, float("-inf"))
        of_target += tl.sum(tl.where(classes[None, :] == target[:, None], logits, 0.0), 1)
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
def weights_kernel(
    grad,  # (batch,) or (batch, Q) of a "cross entropy"; (batch, Q, k) of "neighbours"; else (batch, Q, C)
    queries,
    exact_queries,
    prototypes,
    centre,
    of_queries,
    of_classes,
    temperature,
    targets,  # (batch, Q); (batch, Q, k), the classes, where MODE is "neighbours"
    largest_logits,
    log_sums,
    present,
    kept,
    totals,  # (batch, Q), where MODE is a softmax: Σ of ∂L/∂log p, or of p ∂L/∂p
    weights,  # (batch, Q, width), a multiple of CLASSES
    row_sums,  # (batch, class blocks, Q)
    class_sums,  # (batch, query blocks, width)
    slopes,  # (batch, class blocks, Q): added to
    grad_batch,
    grad_row,
    queries_batch,
    queries_row,
    exact_batch,
    exact_row,
    prototypes_batch,
    prototypes_row,
    num_queries,
    num_classes,
    num_features,
    first_class,
    width,
    ignore_index,
    num_neighbours,
    MODE: tl.constexpr,
    METRIC: tl.constexpr,
    MEAN: tl.constexpr,
    SMOOTHING: tl.constexpr,
    SLOPES: tl.constexpr,
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
    """What differences of queries and prototypes are multiplied by in the gradients, for the classes from `first_class`
    on, and its sums over the classes and over the queries (cosine: weighed with the similarities)."""
    program = tl.program_id(0)
    blocks, class_blocks = (num_queries + BLOCK - 1) // BLOCK, width // CLASSES
    block, class_block = program % blocks, program // blocks % class_blocks
    batch = (program // blocks // class_blocks).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < num_queries
    local = class_block * CLASSES + tl.arange(0, CLASSES)
    classes = first_class + local
    in_classes = classes < num_classes
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    exact_queries, exact_row = located(exact_queries, batch, exact_batch, exact_row, ALIGN)
    prototypes, prototypes_row = located(prototypes, batch, prototypes_batch, prototypes_row, ALIGN)
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    of_class = tl.load(of_classes + batch * num_classes + classes, in_classes, other=-1.0)
    there = (of_class < 0.0) == 0
    distance = distance_tile(
        queries, exact_queries, prototypes, centre + batch * num_features, of_query, of_class, queries_row, exact_row,
        prototypes_row, rows, in_rows, classes, there, num_queries, num_classes, num_features, METRIC, RAW, CLOSE,
        ACCUMULATOR, OPERAND, PRECISION, BLOCK_K,
    )  # fmt: skip
    t = tl.load(temperature + batch)
    counted = in_rows
    number = tl.load(present + batch)
    largest = tl.zeros((BLOCK,), ACCUMULATOR)
    if MODE != "distance" and MODE != "neighbours":
        largest = tl.load(largest_logits + place, in_rows, other=0.0)
        log_sum = tl.load(log_sums + place, in_rows, other=0.0)
        probability = tl.exp((distance * (-1.0 / t) - largest[:, None]) - log_sum[:, None])
    if MODE == "cross entropy":
        target = class_of(targets + place, in_rows, num_classes)
        counted = (target >= 0) & (target != ignore_index)
        g = tl.load(grad + batch * grad_batch + rows * grad_row, counted, other=0.0).to(ACCUMULATOR)
        if MEAN:
            g /= tl.load(kept + batch).to(ACCUMULATOR)
        of_logit = probability
        if SMOOTHING != 0.0:
            of_logit -= SMOOTHING / number.to(ACCUMULATOR)
        of_logit -= tl.where(classes[None, :] == target[:, None], 1.0 - SMOOTHING, 0.0)
        of_logit *= g[:, None]
    elif MODE == "neighbours":
        of_logit = tl.zeros((BLOCK, CLASSES), ACCUMULATOR)
        neighbour = place * num_neighbours
        for _ in range(0, num_neighbours):
            incoming = tl.load(grad + neighbour, in_rows, other=0.0).to(ACCUMULATOR)
            class_ = tl.load(targets + neighbour, in_rows, other=-1)
            of_logit -= tl.where(classes[None, :] == class_[:, None], incoming[:, None], 0.0)
            neighbour += 1
        t = tl.full((), 1.0, ACCUMULATOR)
    else:
        offsets = place[:, None] * num_classes + classes[None, :]
        incoming = tl.load(grad + offsets, in_rows[:, None] & there[None, :], other=0.0).to(ACCUMULATOR)
        if MODE == "distance":
            of_logit = -incoming
            t = tl.full((), 1.0, ACCUMULATOR)
        else:
            total = tl.load(totals + place, in_rows, other=0.0)
            if MODE == "log softmax":
                of_logit = incoming - probability * total[:, None]
            else:
                of_logit = probability * (incoming - total[:, None])
    used = counted[:, None] & there[None, :]
    of_logit, distance = tl.where(used, of_logit, 0.0), tl.where(used, distance, 0.0)
    if SLOPES:
        nearest = tl.where(counted & (number == num_classes), -largest * t, 0.0)
        slope = tl.sum(of_logit * (distance - nearest[:, None]), 1) / (t * t)
        out = slopes + (batch * class_blocks + class_block) * num_queries + rows
        if first_class > 0:
            slope += tl.load(out, in_rows, other=0.0)
        tl.store(out, slope, in_rows)
    weight = weights_of(of_logit, distance, t, METRIC).to(weights.dtype.element_ty)
    out = weights + place[:, None] * width + local[None, :]
    tl.store(out, weight, in_rows[:, None])
    weight = weight.to(ACCUMULATOR)
    if METRIC == "cosine":
        weight *= 1.0 - distance
    out = row_sums + (batch * class_blocks + class_block) * num_queries + rows
    tl.store(out, tl.sum(weight, 1), in_rows)
    out = class_sums + (batch * blocks + block) * width + local
    tl.store(out, tl.sum(weight, 0))


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
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    exact_queries, exact_row = located(exact_queries, batch, exact_batch, exact_row, ALIGN)
    prototypes, prototypes_row = located(prototypes, batch, prototypes_batch, prototypes_row, ALIGN)
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    of_class = tl.load(of_classes + batch * num_classes + classes, in_classes, other=-1.0)
    there = (of_class < 0.0) == 0
    distance = distance_tile(
        queries, exact_queries, prototypes, centre + batch * num_features, of_query, of_class, queries_row, exact_row,
        prototypes_row, rows, in_rows, classes, there, num_queries, num_classes, num_features, METRIC, RAW, CLOSE,
        ACCUMULATOR, OPERAND, PRECISION, BLOCK_K,
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


@triton.jit
def sum_of_parts(parts, stride, count, columns, mask, ACCUMULATOR: tl.constexpr):
    """Σ over `count` rows of a matrix, in their order."""
    total = tl.zeros((columns.shape[0],), ACCUMULATOR)
    for i in range(0, count):
        total += tl.load(parts + i * stride.to(tl.int64) + columns, mask, other=0.0)
    return total


@triton.jit
def weighed_sum(
    weights,
    row_stride,
    step,
    rows,
    in_rows,
    y,
    y_row,
    scales,
    centre,
    count,
    present,
    columns,
    in_columns,
    CLEAN: tl.constexpr,
    METRIC: tl.constexpr,
    RAW: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_k w_rk y_k for some rows and columns, y less the centre (cosine: times its scale; where RAW neither centred).

    Of the `count` weights those from `present` on are 0 and have no y. CLEAN: a y whose scale is negative is an empty
    class, and is left out."""
    result = tl.zeros((rows.shape[0], columns.shape[0]), ACCUMULATOR)
    w = weights + rows[:, None].to(tl.int64) * row_stride
    if METRIC != "cosine" and not RAW:
        mean = tl.load(centre + columns, in_columns, other=0.0)
    for k in range(0, count, BLOCK_K):
        index = k + tl.arange(0, BLOCK_K)
        within = index < count
        a = tl.load(w + index[None, :].to(tl.int64) * step, in_rows[:, None] & within[None, :], other=0.0)
        within = index < present
        if CLEAN or METRIC == "cosine":
            scale = tl.load(scales + index, within, other=-1.0)
            if CLEAN:
                within = within & ((scale < 0.0) == 0)
        offsets = index[:, None].to(tl.int64) * y_row + columns[None, :]
        b = tl.load(y + offsets, within[:, None] & in_columns[None, :], other=0.0)
        if METRIC == "cosine":
            a = a.to(ACCUMULATOR) * scale[None, :]  # where there is no y, a is 0
        if RAW:
            a, b = a.to(OPERAND), b.to(OPERAND)
        else:
            a, b = a.to(ACCUMULATOR), b.to(ACCUMULATOR)
            if METRIC != "cosine":
                b = tl.where(within[:, None], b - mean[None, :], 0.0)
        result = tl.dot(a, b, result, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return result


@triton.jit
def finished(
    result, x, x_row, rows, in_rows, columns, in_columns, total, scale, centre,
    METRIC: tl.constexpr, RAW: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """The gradient of rows x from Σ w y and Σ w."""
    own = load_rows(x, x_row, rows, in_rows, columns, in_columns, ACCUMULATOR)
    if METRIC == "cosine":
        return (result - total[:, None] * (own * scale[:, None])) * scale[:, None]
    else:
        if not RAW:
            own -= tl.load(centre + columns, in_columns, other=0.0)[None, :]
        return own * total[:, None] - result + (own - own)  # NaN where x is infinite: so is Σ w (x − y)


@kernel
def pull_kernel(
    queries,
    prototypes,
    centre,
    of_queries,
    of_classes,
    weights,  # (batch, Q, width)
    row_sums,
    class_sums,
    partial,  # (batch, Q, D): the queries' gradient over the chunks of classes so far
    grad_queries,  # (batch, Q, D): written with the last chunk
    grad_prototypes,  # (batch, C, D)
    queries_batch,
    queries_row,
    prototypes_batch,
    prototypes_row,
    num_queries,
    num_classes,
    num_features,
    first_class,
    width,
    parts_of_queries,
    parts_of_classes,
    METRIC: tl.constexpr,
    NEED_QUERIES: tl.constexpr,
    NEED_PROTOTYPES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    RAW: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASS_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """A tile of the gradient of the prototypes (these programs come first: they run longest) or of the queries."""
    program = tl.program_id(0)
    of_class, of_query = 0, 0
    if NEED_PROTOTYPES:
        of_class = (width + BLOCK - 1) // BLOCK * ((num_features + CLASS_WIDTH - 1) // CLASS_WIDTH)
    if NEED_QUERIES:
        of_query = (num_queries + BLOCK - 1) // BLOCK * ((num_features + WIDTH - 1) // WIDTH)
    each = of_class + of_query
    local = program % each
    batch = (program // each).to(tl.int64)
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    prototypes, prototypes_row = located(prototypes, batch, prototypes_batch, prototypes_row, ALIGN)
    weights += batch * num_queries * width
    centre += batch * num_features
    of_queries += batch * num_queries
    of_classes += batch * num_classes + first_class
    prototypes += first_class.to(tl.int64) * prototypes_row
    if NEED_PROTOTYPES:
        if local < of_class:
            column_blocks = (num_features + CLASS_WIDTH - 1) // CLASS_WIDTH
            rows = local // column_blocks * BLOCK + tl.arange(0, BLOCK)
            in_rows = rows < num_classes - first_class  # the weights of others are 0
            columns = local % column_blocks * CLASS_WIDTH + tl.arange(0, CLASS_WIDTH)
            in_columns = columns < num_features
            result = weighed_sum(
                weights, 1, width, rows, rows < width, queries, queries_row, of_queries, centre, num_queries,
                num_queries, columns, in_columns, False, METRIC, RAW, ACCUMULATOR, OPERAND, PRECISION, BLOCK_K,
            )  # fmt: skip
            parts = class_sums + batch * parts_of_classes * width
            total = sum_of_parts(parts, width, parts_of_classes, rows, in_rows, ACCUMULATOR)
            scale = tl.load(of_classes + rows, in_rows, other=-1.0)
            result = finished(
                result, prototypes, prototypes_row, rows, in_rows, columns, in_columns, total, scale, centre, METRIC,
                RAW, ACCUMULATOR,
            )  # fmt: skip
            result = tl.where((scale < 0.0)[:, None], 0.0, result)
            out = (batch * num_classes + first_class + rows[:, None]) * num_features + columns[None, :]
            mask = in_rows[:, None] & in_columns[None, :]
            tl.store(grad_prototypes + out, result.to(grad_prototypes.dtype.element_ty), mask)
    if NEED_QUERIES:
        if local >= of_class:
            column_blocks = (num_features + WIDTH - 1) // WIDTH
            rows = (local - of_class) // column_blocks * BLOCK + tl.arange(0, BLOCK)
            in_rows = rows < num_queries
            columns = (local - of_class) % column_blocks * WIDTH + tl.arange(0, WIDTH)
            in_columns = columns < num_features
            result = weighed_sum(
                weights, width, 1, rows, in_rows, prototypes, prototypes_row, of_classes, centre, width,
                tl.minimum(width, num_classes - first_class), columns, in_columns, True, METRIC, RAW, ACCUMULATOR,
                OPERAND, PRECISION, BLOCK_K,
            )  # fmt: skip
            parts = row_sums + batch * parts_of_queries * num_queries
            total = sum_of_parts(parts, num_queries, parts_of_queries, rows, in_rows, ACCUMULATOR)
            scale = tl.load(of_queries + rows, in_rows, other=0.0)
            result = finished(
                result, queries, queries_row, rows, in_rows, columns, in_columns, total, scale, centre, METRIC, RAW,
                ACCUMULATOR,
            )  # fmt: skip
            out = (batch * num_queries + rows[:, None]) * num_features + columns[None, :]
            mask = in_rows[:, None] & in_columns[None, :]
            if not FIRST:
                result += tl.load(partial + out, mask, other=0.0)
            if LAST:
                tl.store(grad_queries + out, result.to(grad_queries.dtype.element_ty), mask)
            else:
                tl.store(partial + out, result, mask)
