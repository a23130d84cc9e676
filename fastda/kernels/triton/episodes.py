"""Kernels of class means and of the prototypical loss of a batch of episodes."""

from __future__ import annotations

import triton.language as tl

from .device import is_last, ordered_sum
from .points import add_differences, by_differences, centre_of, kernel, load_rows, located, weights_of


@kernel
def class_means_kernel(
    support,  # (batch, S, D)
    labels,  # (batch, S): of the samples, or sorted where SORTED
    order,  # (batch, S): the samples in the order of their labels, where SORTED
    starts,  # (batch, C + 1): where the samples of each class begin in it
    means,  # (batch, C, D)
    counts,  # (batch, C): −1 where a label of the batch element is out of range
    counters,  # (batch,): zeroed
    support_batch,
    support_row,
    num_samples,
    num_classes,
    num_features,
    ZERO: tl.constexpr,
    SORTED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The mean of one class, in some columns. Its samples are found by their labels, or by the sorted ones."""
    program = tl.program_id(0)
    column_blocks = tl.maximum((num_features + COLUMNS - 1) // COLUMNS, 1)
    block, c = program % column_blocks, program // column_blocks % num_classes
    batch = (program // column_blocks // num_classes).to(tl.int64)
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < num_features
    support, support_row = located(support, batch, support_batch, support_row, ALIGN)
    labels += batch * num_samples
    total = tl.zeros((COLUMNS,), ACCUMULATOR)
    count, wrong = tl.zeros((), tl.int64), tl.zeros((), tl.int32)
    if SORTED:
        starts += batch * (num_classes + 1) + c
        order += batch * num_samples
        begin, end = tl.load(starts), tl.load(starts + 1)
        if num_samples > 0:
            outside = (tl.load(labels) < 0) | (tl.load(labels + num_samples - 1) >= num_classes)
            wrong = outside.to(tl.int32)
        for first in range(0, (end - begin).to(tl.int32), ROWS):
            place = begin + first + tl.arange(0, ROWS)
            rows = tl.load(order + place, place < end, other=0)
            total += tl.sum(load_rows(support, support_row, rows, place < end, columns, in_columns, ACCUMULATOR), 0)
        count += end - begin
    else:
        for first in range(0, num_samples, ROWS):
            rows = first + tl.arange(0, ROWS)
            within = rows < num_samples
            label = tl.load(labels + rows, within, other=0)
            wrong += tl.sum((within & ((label < 0) | (label >= num_classes))).to(tl.int32), 0)
            chosen = within & (label == c)
            number = tl.sum(chosen.to(tl.int32), 0)
            if number > 0:
                total += tl.sum(load_rows(support, support_row, rows, chosen, columns, in_columns, ACCUMULATOR), 0)
            count += number
    mean = total / tl.maximum(count, 1).to(ACCUMULATOR)
    mean = tl.where(count == 0, 0.0 if ZERO else float("nan"), mean)
    mean = tl.where(wrong > 0, float("nan"), mean)
    place = batch * num_classes + c
    tl.store(means + place * num_features + columns, mean, in_columns)
    if block == 0:
        tl.store(counts + place, tl.where(wrong > 0, -1, count))
        if c == 0:
            tl.store(counters + batch, 0)


@kernel
def class_means_backward_kernel(
    grad_means,  # (batch, C, D)
    labels,  # (batch, S)
    counts,  # (batch, C)
    grad_support,  # (batch, S, D)
    num_samples,
    num_classes,
    num_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each sample's share of the gradient of its class."""
    program = tl.program_id(0)
    column_blocks, row_blocks = (num_features + COLUMNS - 1) // COLUMNS, (num_samples + ROWS - 1) // ROWS
    columns = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    rows = program // column_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    batch = (program // column_blocks // row_blocks).to(tl.int64)
    within, in_columns = rows < num_samples, columns < num_features
    label = tl.load(labels + batch * num_samples + rows, within, other=-1)
    valid = within & (label >= 0) & (label < num_classes)
    count = tl.load(counts + batch * num_classes + label, valid, other=0)
    valid &= count > 0
    grad = grad_means + batch * num_classes * num_features
    shares = load_rows(grad, num_features, label, valid, columns, in_columns, grad_means.dtype.element_ty)
    shares /= tl.maximum(count, 1).to(grad_means.dtype.element_ty)[:, None]
    out = grad_support + (batch * num_samples + rows[:, None]) * num_features + columns[None, :]
    tl.store(out, shares.to(grad_support.dtype.element_ty), within[:, None] & in_columns[None, :])


@kernel
def episode_kernel(
    queries,  # (batch, Q, D); for the cosine the directions
    prototypes,  # (batch, C, D); likewise
    counts,  # (batch, C)
    labels,  # (batch, Q)
    temperature,  # (batch,)
    losses,  # (batch, Q)
    loss,  # (batch,) where REDUCTION is not "none"
    weights,  # (batch, Q, C)
    slopes,  # (batch, Q)
    near,  # (batch, Q, C)
    counters,  # (batch,)
    queries_batch,
    queries_row,
    num_queries,
    num_classes,
    num_features,
    METRIC: tl.constexpr,
    REDUCTION: tl.constexpr,
    CLOSE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Distances of some queries to all classes, their losses, and what backward needs. The last program of an episode
    sums its losses."""
    program = tl.program_id(0)
    blocks = (num_queries + BLOCK - 1) // BLOCK
    batch = (program // blocks).to(tl.int64)
    rows = program % blocks * BLOCK + tl.arange(0, BLOCK)
    classes = tl.arange(0, CLASSES)
    in_rows, in_classes = rows < num_queries, classes < num_classes
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    prototypes += batch * num_classes * num_features

    products = tl.zeros((BLOCK, CLASSES), ACCUMULATOR)
    of_queries, of_classes = tl.zeros((BLOCK,), ACCUMULATOR), tl.zeros((CLASSES,), ACCUMULATOR)
    absent = tl.zeros((CLASSES,), tl.int32)
    for k in range(0, num_features, BLOCK_K):
        features = k + tl.arange(0, BLOCK_K)
        within = features < num_features
        q = load_rows(queries, queries_row, rows, in_rows, features, within, ACCUMULATOR)
        p = load_rows(prototypes, num_features, classes, in_classes, features, within, ACCUMULATOR)
        absent += tl.sum((p != p).to(tl.int32), 1)
        if METRIC != "cosine":
            centre = centre_of(p, in_classes)
            q -= centre[None, :]
            p -= centre[None, :]
            of_queries += tl.sum(q * q, 1)
            of_classes += tl.sum(p * p, 1)
        products = tl.dot(q, tl.trans(p), products, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    empty = (absent == num_features) & (num_features > 0)
    place = batch * num_queries + rows
    out, pairs = place[:, None] * num_classes + classes[None, :], in_rows[:, None] & in_classes[None, :]
    if METRIC == "cosine":
        tl.store(near + out, tl.zeros((BLOCK, CLASSES), tl.int1), pairs)
        distance = 1.0 - products
        distance = tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        distance = tl.minimum(distance, 2.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        scale = of_queries[:, None] + of_classes[None, :]
        distance = scale - 2.0 * products
        distance = tl.maximum(distance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        close = distance < CLOSE * scale
        tl.store(near + out, close, pairs)
        close = pairs & (close | (distance != distance))  # Inf − Inf is no distance
        distance = by_differences(
            tl.where(close, -1.0, distance), queries, queries_row, tl.minimum(rows, num_queries - 1), prototypes,
            num_features, 0, num_classes, num_features, ACCUMULATOR, CLASSES, BLOCK_K,
        )  # fmt: skip
        if METRIC == "euclidean":
            distance = tl.sqrt(distance)

    t = tl.load(temperature + batch)
    there = in_classes & (empty == 0)
    logits = tl.where(there[None, :], -distance / t, float("-inf"))
    largest = tl.max(logits, 1)
    exponentials = tl.exp(logits - largest[:, None])
    total = tl.sum(exponentials, 1)
    label = tl.load(labels + batch * num_queries + rows, in_rows, other=0)
    on_target = classes[None, :] == label[:, None]
    of_target = tl.sum(tl.where(on_target, logits, 0.0), 1)
    count = tl.load(counts + batch * num_classes + classes, in_classes, other=0)
    valid = (label >= 0) & (label < num_classes) & (tl.min(count, 0) >= 0)
    each = tl.where(valid, -((of_target - largest) - tl.log(total)), float("nan"))
    tl.store(losses + place, each, in_rows)

    of_logit = exponentials / total[:, None] - on_target.to(ACCUMULATOR)
    of_logit = tl.where(there[None, :] & valid[:, None], of_logit, 0.0)
    nearest = tl.where(tl.sum(there.to(tl.int32), 0) == num_classes, -largest * t, 0.0)
    slope = tl.where(there[None, :] & valid[:, None], of_logit * (distance - nearest[:, None]), 0.0)
    tl.store(slopes + place, tl.sum(slope, 1) / (t * t), in_rows)
    weight = tl.where(there[None, :] & valid[:, None], weights_of(of_logit, distance, t, METRIC), 0.0)
    tl.store(weights + out, weight, pairs)
    if REDUCTION != "none":
        if is_last(counters + batch, blocks):
            result = ordered_sum(losses + batch * num_queries, num_queries, 1)
            if REDUCTION == "mean":
                result /= num_queries.to(tl.float64)
            tl.store(loss + batch, result.to(ACCUMULATOR))


@kernel
def episode_gradient_kernel(
    grad,  # (batch,) or (batch, Q): of the losses
    queries,  # (batch, Q, D); for the cosine the directions
    prototypes,  # (batch, C, D); likewise
    weights,  # (batch, Q, C)
    near,  # (batch, Q, C): the pairs whose products would cancel
    grad_queries,  # (batch, Q, D)
    grad_prototypes,  # (batch, C, D)
    grad_batch,
    grad_row,
    queries_batch,
    queries_row,
    num_queries,
    num_classes,
    num_features,
    METRIC: tl.constexpr,
    MEAN: tl.constexpr,
    NEED_QUERIES: tl.constexpr,
    NEED_PROTOTYPES: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Some columns of the gradients of a block of queries, or of all prototypes of an episode."""
    program = tl.program_id(0)
    column_blocks = (num_features + COLUMNS - 1) // COLUMNS
    query_blocks = (num_queries + BLOCK - 1) // BLOCK if NEED_QUERIES else 0
    blocks = query_blocks + 1 if NEED_PROTOTYPES else query_blocks
    columns = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    block = program // column_blocks % blocks
    batch = (program // column_blocks // blocks).to(tl.int64)
    classes = tl.arange(0, CLASSES)
    in_columns, in_classes = columns < num_features, classes < num_classes
    queries, queries_row = located(queries, batch, queries_batch, queries_row, ALIGN)
    prototypes += batch * num_classes * num_features
    weights += batch * num_queries * num_classes
    near += batch * num_queries * num_classes
    grad += batch * grad_batch
    p = load_rows(prototypes, num_features, classes, in_classes, columns, in_columns, ACCUMULATOR)
    unknown = p != p  # of an empty class, whose weights are 0, or of one whose weights are NaN already
    if METRIC == "cosine":
        centre = tl.zeros((COLUMNS,), ACCUMULATOR)
    else:
        centre = centre_of(p, in_classes)
        p -= centre[None, :]
    p = tl.where(unknown, 0.0, p)
    share = 1.0 / num_queries.to(ACCUMULATOR) if MEAN else 1.0
    if NEED_QUERIES:
        if block < query_blocks:
            rows = block * BLOCK + tl.arange(0, BLOCK)
            in_rows = rows < num_queries
            g = tl.load(grad + rows * grad_row, in_rows, other=0.0).to(ACCUMULATOR) * share
            w = load_rows(weights, num_classes, rows, in_rows, classes, in_classes, ACCUMULATOR)
            if METRIC != "cosine":
                of_near = tl.where(load_rows(near, num_classes, rows, in_rows, classes, in_classes, tl.int1), w, 0.0)
                w -= of_near
            result = tl.dot(w, p, input_precision=PRECISION, out_dtype=ACCUMULATOR)
            if METRIC != "cosine":
                q = load_rows(queries, queries_row, rows, in_rows, columns, in_columns, ACCUMULATOR)
                result = (q - centre[None, :]) * tl.sum(w, 1)[:, None] - result + (q - q)
                result = add_differences(
                    result, of_near, queries, queries_row, rows, in_rows, prototypes, num_features, 0, columns,
                    in_columns, ACCUMULATOR, CLASSES,
                )  # fmt: skip
            result *= g[:, None]
            out = grad_queries + (batch * num_queries + rows[:, None]) * num_features + columns[None, :]
            tl.store(out, result.to(grad_queries.dtype.element_ty), in_rows[:, None] & in_columns[None, :])
    if NEED_PROTOTYPES:
        if block == query_blocks:
            result = tl.zeros((CLASSES, COLUMNS), ACCUMULATOR)
            total = tl.zeros((CLASSES,), ACCUMULATOR)
            some = tl.zeros((), tl.int32)
            for first in range(0, num_queries, BLOCK):
                rows = first + tl.arange(0, BLOCK)
                in_rows = rows < num_queries
                g = tl.load(grad + rows * grad_row, in_rows, other=0.0).to(ACCUMULATOR) * share
                offsets = rows[None, :].to(tl.int64) * num_classes + classes[:, None]
                w = tl.load(weights + offsets, in_classes[:, None] & in_rows[None, :], other=0.0) * g[None, :]
                if METRIC != "cosine":
                    of_near = tl.load(near + offsets, in_classes[:, None] & in_rows[None, :], other=0)
                    some = tl.maximum(some, tl.max((of_near & (w != 0.0)).to(tl.int32)))
                    w = tl.where(of_near, 0.0, w)
                q = load_rows(queries, queries_row, rows, in_rows, columns, in_columns, ACCUMULATOR)
                q = tl.where(in_rows[:, None], q - centre[None, :], 0.0)
                result = tl.dot(w, q, result, input_precision=PRECISION, out_dtype=ACCUMULATOR)
                total += tl.sum(w, 1)
            if METRIC != "cosine":
                result = p * total[:, None] - result + (p - p)  # NaN where p is infinite: so is Σ w (p − q)
                if some > 0:  # after the products, from which it would take registers
                    for first in range(0, num_queries, BLOCK):
                        rows = first + tl.arange(0, BLOCK)
                        in_rows = rows < num_queries
                        g = tl.load(grad + rows * grad_row, in_rows, other=0.0).to(ACCUMULATOR) * share
                        offsets = rows[None, :].to(tl.int64) * num_classes + classes[:, None]
                        pairs = in_classes[:, None] & in_rows[None, :]
                        w = tl.load(weights + offsets, pairs, other=0.0) * g[None, :]
                        result = add_differences(
                            result, tl.where(tl.load(near + offsets, pairs, other=0), w, 0.0), prototypes, num_features,
                            classes, in_classes, queries, queries_row, first, columns, in_columns, ACCUMULATOR, BLOCK,
                        )  # fmt: skip
            result = tl.where(unknown, 0.0 * total[:, None], result)
            out = grad_prototypes + (batch * num_classes + classes[:, None]) * num_features + columns[None, :]
            tl.store(out, result, in_classes[:, None] & in_columns[None, :])
