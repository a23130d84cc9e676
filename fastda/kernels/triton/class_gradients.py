"""Kernels for the gradients of what queries make of any number of classes: weights of differences, and their products.

Which features are multiplied as they are, where RAW, says many_classes.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .many_classes import class_of, distance_tile, points_of
from .points import add_differences, kernel, load_rows, located, rounded_to_tf32, weights_of


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
    near_weights,  # (batch, Q, width): of near pairs, written where a tile has any, whose weights are 0
    near_tiles,  # (batch, query blocks, class blocks): whether it has
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
    NEAR: tl.constexpr,
    TF32: tl.constexpr,
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
    on, and its sums over the classes and over the queries (cosine: weighed with the similarities).

    Near pairs, much nearer to each other than to the centre, are kept apart: products of centred points would cancel.
    """
    program = tl.program_id(0)
    blocks, class_blocks = (num_queries + BLOCK - 1) // BLOCK, width // CLASSES
    block, class_block = program % blocks, program // blocks % class_blocks
    batch = (program // blocks // class_blocks).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < num_queries
    column = tl.arange(0, CLASSES)
    local = class_block * CLASSES + column
    first = first_class + class_block * CLASSES
    points = points_of(
        batch, queries, exact_queries, prototypes, centre, of_classes, queries_batch, queries_row, exact_batch,
        exact_row, prototypes_batch, prototypes_row, num_queries, num_classes, num_features, ALIGN,
    )  # fmt: skip
    place = batch * num_queries + rows
    of_query = tl.load(of_queries + place, in_rows, other=0.0)
    distance, there = distance_tile(
        points, of_query, rows, first, METRIC, RAW, CLOSE, ACCUMULATOR, OPERAND, PRECISION, CLASSES, BLOCK_K
    )
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
        of_logit -= tl.where(column[None, :] == (target - first)[:, None], 1.0 - SMOOTHING, 0.0)
        of_logit *= g[:, None]
    elif MODE == "neighbours":
        of_logit = tl.zeros((BLOCK, CLASSES), ACCUMULATOR)
        neighbour = place * num_neighbours
        for _ in range(0, num_neighbours):
            incoming = tl.load(grad + neighbour, in_rows, other=0.0).to(ACCUMULATOR)
            class_ = tl.load(targets + neighbour, in_rows, other=-1).to(tl.int32)
            of_logit -= tl.where(column[None, :] == (class_ - first)[:, None], incoming[:, None], 0.0)
            neighbour += 1
        t = tl.full((), 1.0, ACCUMULATOR)
    else:
        offsets = place[:, None] * num_classes + (first + column)[None, :]
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
    if TF32 and METRIC != "cosine":  # as the products round them, or x Σ w − Σ w y would not cancel far from 0
        weight = rounded_to_tf32(weight)
    offsets = place[:, None] * width + local[None, :]
    if NEAR:
        of_near = weight
        if MODE != "neighbours":  # of which all are taken as near: they are few
            of_class = tl.load(of_classes + batch * num_classes + first + column, there, other=0.0)
            squared = distance * distance if METRIC == "euclidean" else distance
            of_near = tl.where(squared < CLOSE * (of_query[:, None] + of_class[None, :]), weight, 0.0)
        weight -= of_near
        some = tl.max((of_near != 0.0).to(tl.int32))
        tl.store(near_tiles + (batch * blocks + block) * class_blocks + class_block, some)
        if some > 0:
            tl.store(near_weights + offsets, of_near, in_rows[:, None])
    tl.store(weights + offsets, weight, in_rows[:, None])
    weight = weight.to(ACCUMULATOR)
    if METRIC == "cosine":
        weight *= 1.0 - distance
    out = row_sums + (batch * class_blocks + class_block) * num_queries + rows
    tl.store(out, tl.sum(weight, 1), in_rows)
    out = class_sums + (batch * blocks + block) * width + local
    tl.store(out, tl.sum(weight, 0))


@triton.jit
def sum_of_parts(parts, stride, count, columns, mask, ACCUMULATOR: tl.constexpr):
    """Σ over `count` rows of a matrix, in their order."""
    total = tl.zeros((columns.shape[0],), ACCUMULATOR)
    for i in range(0, count):
        total += tl.load(parts + i * stride.to(tl.int64) + columns, mask, other=0.0)
    return total


@triton.jit
def weighed_sum(
    result,
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
    """Adds to `result` Σ_k w_rk y_k for some rows and columns, y less the centre (cosine: times its scale; where RAW
    neither centred).

    Of the `count` weights those from `present` on are 0 and have no y. CLEAN: a y whose scale is negative is an empty
    class, and is left out."""
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
def add_near(
    out, weights, row_step, step, tiles, tile_step, num_tiles, x, x_row, num_rows, y, y_row, count, num_features, block,
    first_column, ACCUMULATOR: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds Σ_k w_rk (x_r − y_k) of the near pairs to what is at `out`, from the tiles of BLOCK y that have any.

    After the products and in small parts, so that these take no registers from them."""
    PART: tl.constexpr = min(BLOCK, 32)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    in_rows = rows < num_rows
    for first in range(0, num_tiles, 64):
        index = first + tl.arange(0, 64)
        if tl.max(tl.load(tiles + index * tile_step, index < num_tiles, other=0), 0) > 0:
            tl.debug_barrier()  # other threads may have written what is read here
            for column in range(first_column, tl.minimum(first_column + WIDTH, num_features), PART):
                columns = column + tl.arange(0, PART)
                in_columns = columns < num_features
                place = out + rows[:, None].to(tl.int64) * num_features + columns[None, :]
                result = tl.load(place, in_rows[:, None] & in_columns[None, :], other=0.0).to(ACCUMULATOR)
                for tile in range(first, tl.minimum(first + 64, num_tiles)):
                    if tl.load(tiles + tile * tile_step) > 0:
                        for k in range(tile * BLOCK, tile * BLOCK + BLOCK, PART):
                            samples = k + tl.arange(0, PART)
                            offsets = rows[:, None].to(tl.int64) * row_step + samples[None, :].to(tl.int64) * step
                            w = tl.load(weights + offsets, in_rows[:, None] & (samples < count)[None, :], other=0.0)
                            result = add_differences(
                                result, w, x, x_row, rows, in_rows, y, y_row, k, columns, in_columns, ACCUMULATOR, PART
                            )
                tl.store(place, result.to(out.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


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
    near_weights,  # (batch, Q, width)
    near_tiles,  # (batch, parts_of_classes, parts_of_queries): BLOCK × BLOCK pairs each
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
    NEAR: tl.constexpr,
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
    near_weights += batch * num_queries * width
    near_tiles += batch * parts_of_queries * parts_of_classes
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
            result = tl.zeros((BLOCK, CLASS_WIDTH), ACCUMULATOR)
            result = weighed_sum(
                result, weights, 1, width, rows, rows < width, queries, queries_row, of_queries, centre, num_queries,
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
            if NEAR:
                out = grad_prototypes + (batch * num_classes + first_class) * num_features
                add_near(
                    out, near_weights, 1, width, near_tiles + local // column_blocks, parts_of_queries,
                    parts_of_classes, prototypes, prototypes_row, num_classes - first_class, queries, queries_row,
                    num_queries, num_features, local // column_blocks, local % column_blocks * CLASS_WIDTH,
                    ACCUMULATOR, BLOCK, CLASS_WIDTH,
                )  # fmt: skip
    if NEED_QUERIES:
        if local >= of_class:
            column_blocks = (num_features + WIDTH - 1) // WIDTH
            rows = (local - of_class) // column_blocks * BLOCK + tl.arange(0, BLOCK)
            in_rows = rows < num_queries
            columns = (local - of_class) % column_blocks * WIDTH + tl.arange(0, WIDTH)
            in_columns = columns < num_features
            out = (batch * num_queries + rows[:, None]) * num_features + columns[None, :]
            mask = in_rows[:, None] & in_columns[None, :]
            result = tl.zeros((BLOCK, WIDTH), ACCUMULATOR)
            if not FIRST and METRIC != "cosine":  # at once: after the products there would not be registers for it
                result -= tl.load(partial + out, mask, other=0.0)
            result = weighed_sum(
                result, weights, width, 1, rows, in_rows, prototypes, prototypes_row, of_classes, centre, width,
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
            if not FIRST and METRIC == "cosine":
                result += tl.load(partial + out, mask, other=0.0)
            if LAST:
                tl.store(grad_queries + out, result.to(grad_queries.dtype.element_ty), mask)
            else:
                tl.store(partial + out, result, mask)
            if NEAR:
                out = (grad_queries if LAST else partial) + batch * num_queries * num_features
                block = (local - of_class) // column_blocks
                add_near(
                    out, near_weights, width, 1, near_tiles + block * parts_of_queries, 1, parts_of_queries, queries,
                    queries_row, num_queries, prototypes, prototypes_row, width, num_features, block,
                    (local - of_class) % column_blocks * WIDTH, ACCUMULATOR, BLOCK, WIDTH,
                )  # fmt: skip
