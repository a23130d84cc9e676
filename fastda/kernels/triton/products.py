"""Centred products of samples with samples or of features with features: partial sums, then their total."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import (
    centre,
    column_means,
    find_layer,
    goes_gram,
    is_last,
    kernel,
    locate,
    num_chunks,
    num_tiles,
    ordered_sum,
    scale_divisor,
    triangle,
    weight_of,
)


@kernel
def means_kernel(
    source,  # (batch, Ns, D)
    target,  # (batch, Nt, D)
    means,  # (batch, 2, D) float64
    sums,  # (splits, batch, 2, D) float64, where SPLITS > 1
    counters,  # 2 for each batch and layer; then, where SPLITS > 1, one for each block of columns, zeroed before
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    total,
    pairs,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SPLITS: tl.constexpr,
    DOMAINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Means of a block of columns of one domain. It also zeroes the counters of the kernels that follow."""
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, first_source, first_target, first_mean, _, _, _ = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, 16, "difference"
    )
    if local == 0:
        counter = counters + (batch * LAYERS + layer) * 2
        tl.store(counter + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    split, block = local % SPLITS, local // SPLITS
    of_target = block % DOMAINS == 1
    columns = block // DOMAINS * COLUMNS + tl.arange(0, COLUMNS)
    within = columns < d
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch,
        first_source, first_target, d, FLAT, ALIGN,
    )  # fmt: skip
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    x = tl.where(of_target, target, source)
    row_stride = tl.where(of_target, target_row, source_row)
    column_stride = tl.where(of_target, target_column, source_column)
    count = tl.where(of_target, t, s)
    out = batch * means_batch + first_mean + tl.where(of_target, d, 0) + columns
    if SPLITS == 1:
        tl.store(means + out, column_means(x, row_stride, column_stride, count, columns, within, ROWS), within)
    else:
        share = (count + SPLITS - 1) // SPLITS
        begin = tl.minimum(split * share, count)
        rows = tl.minimum(begin + share, count) - begin
        x += begin.to(tl.int64) * row_stride
        partial = column_means(x, row_stride, column_stride, rows, columns, within, ROWS) * rows.to(tl.float64)
        partial = tl.where(rows > 0, partial, 0.0)
        everything = (tl.zeros((), tl.int64) + pairs) * means_batch
        tl.store(sums + split * everything + out, partial, within)
        if is_last(counters + pairs * LAYERS * 2 + program // SPLITS, SPLITS):
            sum_ = tl.zeros((COLUMNS,), tl.float64)
            for i in range(SPLITS):
                sum_ += tl.load(sums + i * everything + out, within, other=0.0, cache_modifier=".cg")
            tl.store(means + out, sum_ / count.to(tl.float64), within)


@kernel
def centre_kernel(
    source,
    target,
    means,
    centred,  # (batch, Ns + Nt, D)
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    num_source,
    num_target,
    num_features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    HALVE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Centred features of both domains, one above the other, rounded to the dtype of `centred`.

    HALVE: divided by 2, since the difference of two float16 numbers may be beyond float16.
    """
    num_features = tl.multiple_of(num_features, ALIGN)
    of_source = (num_source + ROWS - 1) // ROWS
    widths = (num_features + COLUMNS - 1) // COLUMNS
    per_batch = (of_source + (num_target + ROWS - 1) // ROWS) * widths
    program = tl.program_id(0)
    batch = (program // per_batch).to(tl.int64)
    block = program % per_batch // widths
    of_target = block >= of_source
    count = tl.where(of_target, num_target, num_source)
    rows = (tl.where(of_target, block - of_source, block) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = program % widths * COLUMNS + tl.arange(0, COLUMNS)
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch, 0, 0, num_features, False, ALIGN
    )
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    x = tl.where(of_target, target, source)
    row_stride = tl.where(of_target, target_row, source_row)
    column_stride = tl.where(of_target, target_column, source_column)
    mask = (rows < count)[:, None] & (columns < num_features)[None, :]
    values = tl.load(x + rows[:, None] * row_stride + columns[None, :].to(tl.int64) * column_stride, mask, other=0.0)
    mean = means + batch * tl.multiple_of(means_batch.to(tl.int64), ALIGN) + tl.where(of_target, num_features, 0)
    mean = tl.load(mean + columns, columns < num_features, other=0.0)
    values = centre(values, mean[None, :], mask, tl.float32)
    if HALVE:
        values *= 0.5
    out = batch * (num_source + num_target) + tl.where(of_target, num_source, 0)
    out = centred + (out + rows[:, None]) * num_features + columns[None, :]
    tl.store(out, values.to(centred.dtype.element_ty), mask)


@triton.jit
def gram_tile(
    row,
    column,
    begin,
    end,
    source,
    target,
    source_row,
    target_row,
    source_column,
    target_column,
    means,
    s,
    t,
    d,
    write_means,
    FUSED_MEANS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of two blocks of samples, over the features from `begin` to `end`."""
    of_source = (s + BLOCK - 1) // BLOCK
    target_a, target_b = row >= of_source, column >= of_source
    a, b = tl.where(target_a, target, source), tl.where(target_b, target, source)
    row_a = tl.where(target_a, target_row, source_row)
    row_b = tl.where(target_b, target_row, source_row)
    column_a = tl.where(target_a, target_column, source_column)
    column_b = tl.where(target_b, target_column, source_column)
    rows_a = tl.where(target_a, row - of_source, row) * BLOCK + tl.arange(0, BLOCK)
    rows_b = tl.where(target_b, column - of_source, column) * BLOCK + tl.arange(0, BLOCK)
    within_a, within_b = rows_a < tl.where(target_a, t, s), rows_b < tl.where(target_b, t, s)
    a += rows_a[:, None] * row_a
    b += rows_b[None, :] * row_b
    result = tl.zeros((BLOCK, BLOCK), ACCUMULATOR)
    for k in range(begin, end, BLOCK_K):
        features = k + tl.arange(0, BLOCK_K)
        within = features < end
        if FUSED_MEANS:
            source_mean = column_means(source, source_row, source_column, s, features, within, BLOCK)
            target_mean = column_means(target, target_row, target_column, t, features, within, BLOCK)
            if write_means:
                tl.store(means + features, source_mean, within)
                tl.store(means + d + features, target_mean, within)
            mean_a = tl.where(target_a, target_mean, source_mean)
            mean_b = tl.where(target_b, target_mean, source_mean)
        else:
            mean_a = tl.load(means + tl.where(target_a, d, 0) + features, within, other=0.0)
            mean_b = tl.load(means + tl.where(target_b, d, 0) + features, within, other=0.0)
        mask_a, mask_b = within_a[:, None] & within[None, :], within[:, None] & within_b[None, :]
        x = tl.load(a + features[None, :].to(tl.int64) * column_a, mask_a, other=0.0)
        y = tl.load(b + features[:, None].to(tl.int64) * column_b, mask_b, other=0.0)
        x = centre(x, mean_a[None, :], mask_a, ACCUMULATOR)
        y = centre(y, mean_b[:, None], mask_b, ACCUMULATOR)
        result = tl.dot(x, y, result, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return result


@triton.jit
def scatter_tile(
    row,
    column,
    begin,
    end,
    x,
    row_stride,
    column_stride,
    mean,
    count,
    d,
    write_means,
    FUSED_MEANS: tl.constexpr,
    CENTRED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of two blocks of features of one domain, over the samples from `begin` to `end`.

    CENTRED: x is centred already, and its products are taken in OPERAND.
    """
    features_a, features_b = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    within_a, within_b = features_a < d, features_b < d
    if not CENTRED:
        if FUSED_MEANS:
            mean_a = column_means(x, row_stride, column_stride, count, features_a, within_a, BLOCK_K)
            mean_b = column_means(x, row_stride, column_stride, count, features_b, within_b, BLOCK_K)
            if write_means:
                tl.store(mean + features_a, mean_a, within_a)
        else:
            mean_a = tl.load(mean + features_a, within_a, other=0.0)
            mean_b = tl.load(mean + features_b, within_b, other=0.0)
    a = x + features_a[:, None].to(tl.int64) * column_stride
    b = x + features_b[None, :].to(tl.int64) * column_stride
    result = tl.zeros((BLOCK, BLOCK), ACCUMULATOR)
    for k in range(begin, end, BLOCK_K):
        rows = k + tl.arange(0, BLOCK_K)
        within = rows < end
        mask_a, mask_b = within_a[:, None] & within[None, :], within[:, None] & within_b[None, :]
        y = tl.load(a + rows[None, :].to(tl.int64) * row_stride, mask_a, other=0.0)
        z = tl.load(b + rows[:, None].to(tl.int64) * row_stride, mask_b, other=0.0)
        if CENTRED:
            y, z = y.to(OPERAND), z.to(OPERAND)
        else:
            y = centre(y, mean_a[:, None], mask_a, ACCUMULATOR)
            z = centre(z, mean_b[None, :], mask_b, ACCUMULATOR)
        result = tl.dot(y, z, result, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return result


@kernel
def products_kernel(
    source,  # (batch, Ns, D), or its layers one after the other where FLAT
    target,  # (batch, Nt, D)
    means,  # (batch, 2, D) float64: read, or written where FUSED_MEANS
    partials,  # (batch, tiles, chunks, BLOCK, BLOCK)
    counters,  # 2 for each batch and layer: zeroed where FUSED_MEANS
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    partials_batch,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    total,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROUTE: tl.constexpr,
    FUSED_MEANS: tl.constexpr,
    CENTRED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One tile of the products, over one chunk of what they are summed over."""
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, first_source, first_target, first_mean, _, _, first_partial = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, BLOCK, ROUTE
    )
    if FUSED_MEANS:
        if local == 0:
            counter = counters + (batch * LAYERS + layer) * 2
            tl.store(counter + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    d = tl.multiple_of(d, ALIGN)
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch,
        first_source, first_target, d, FLAT, ALIGN,
    )  # fmt: skip
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    mean = means + batch * tl.multiple_of(means_batch.to(tl.int64), ALIGN) + first_mean
    gram = goes_gram(s, t, d, ROUTE)
    chunks = num_chunks(s, t, d, gram, c)
    tiles = num_tiles(s, t, d, gram, BLOCK)
    part, tile = local // tiles, local % tiles  # programs that run together share what they read
    row, column = triangle(tile)
    index = tl.arange(0, BLOCK)
    place = first_partial + tile * chunks + part
    out = batch * tl.multiple_of(partials_batch.to(tl.int64), 16) + place * (BLOCK * BLOCK)
    out = partials + out + index[:, None] * BLOCK + index[None, :]
    if ROUTE != "difference":
        if gram:
            begin = part * c
            result = gram_tile(
                row,
                column,
                begin,
                tl.minimum(begin + c, d),
                source,
                target,
                source_row,
                target_row,
                source_column,
                target_column,
                mean,
                s,
                t,
                d,
                tile == 0,
                FUSED_MEANS,
                ACCUMULATOR,
                PRECISION,
                BLOCK,
                BLOCK_K,
            )
            tl.store(out, result)
    if ROUTE != "gram":
        if not gram:
            of_source = (s + c - 1) // c
            of_target = part >= of_source
            count = tl.where(of_target, t, s)
            begin = tl.where(of_target, part - of_source, part) * c
            result = scatter_tile(
                row,
                column,
                begin,
                tl.minimum(begin + c, count),
                tl.where(of_target, target, source),
                tl.where(of_target, target_row, source_row),
                tl.where(of_target, target_column, source_column),
                mean + tl.where(of_target, d, 0),
                count,
                d,
                row == column,
                FUSED_MEANS,
                CENTRED,
                ACCUMULATOR,
                OPERAND,
                PRECISION,
                BLOCK,
                BLOCK_K,
            )
            tl.store(out, result)


@kernel
def total_kernel(
    partials,
    means,
    products,  # (batch, side, side)
    terms,  # (batch, tiles, slices, 2) float64
    counters,
    losses,  # (batch, layers)
    mean_distances,  # (batch, layers)
    cancelled,  # (batch, layers) int32
    means_batch,
    partials_batch,
    products_batch,
    tiles_batch,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    weights,
    total,
    correction,
    LAYERS: tl.constexpr,
    ROUTE: tl.constexpr,
    COVARIANCE: tl.constexpr,
    SCALE: tl.constexpr,
    EXACT: tl.constexpr,
    HALVED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Sums the chunks of some rows of a tile and stores them twice, for the matrix is symmetric. The last program of a
    pair of domains sums the squares to the loss, and notes where the terms of the Gram matrix cancelled."""
    SLICES: tl.constexpr = BLOCK // SLICE
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, _, _, first_mean, first_product, first_tile, first_partial = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, BLOCK, ROUTE
    )
    gram = goes_gram(s, t, d, ROUTE)
    tile, part = local // SLICES, local % SLICES
    row, column = triangle(tile)
    chunks = num_chunks(s, t, d, gram, c)
    source_chunks = tl.where(gram, chunks, (s + c - 1) // c)
    first, index = part * SLICE + tl.arange(0, SLICE), tl.arange(0, BLOCK)
    place = first_partial + tile.to(tl.int64) * chunks
    x = batch * tl.multiple_of(partials_batch.to(tl.int64), 16) + place * (BLOCK * BLOCK)
    x = partials + x + first[:, None] * BLOCK + index[None, :]
    of_source = tl.zeros((SLICE, BLOCK), partials.dtype.element_ty)
    of_target = tl.zeros((SLICE, BLOCK), partials.dtype.element_ty)
    for _ in range(0, source_chunks):
        of_source += tl.load(x)
        x += BLOCK * BLOCK
    for _ in range(source_chunks, chunks):
        of_target += tl.load(x)
        x += BLOCK * BLOCK

    source_weight = 1.0 / (s - correction).to(tl.float64)
    if COVARIANCE:
        target_weight = source_weight
    else:
        target_weight = 1.0 / (t - correction).to(tl.float64)
    ratio = source_weight / target_weight
    ratio, target_weight = tl.where(gram, 1.0, ratio), tl.where(gram, 1.0, target_weight)
    if HALVED:
        target_weight *= 4.0
    # With equal weights the difference of equal sums is 0, contracted to one operation or not.
    result = of_source * ratio.to(partials.dtype.element_ty) - of_target
    result *= target_weight.to(partials.dtype.element_ty)

    source_blocks = tl.where(gram, (s + BLOCK - 1) // BLOCK, 0)
    target_a, target_b = gram & (row >= source_blocks), gram & (column >= source_blocks)
    rows = tl.where(target_a, row - source_blocks, row) * BLOCK + first
    columns = tl.where(target_b, column - source_blocks, column) * BLOCK + index
    within_a = rows < tl.where(gram, tl.where(target_a, t, s), d)
    within_b = columns < tl.where(gram, tl.where(target_b, t, s), d)
    mask = within_a[:, None] & within_b[None, :]
    result = tl.where(mask, result, 0.0)
    rows, columns = rows + tl.where(target_a, s, 0), columns + tl.where(target_b, s, 0)
    side = tl.where(gram, s + t, d).to(tl.int64)
    products += batch * products_batch + first_product
    stored = result.to(products.dtype.element_ty)
    tl.store(products + rows[:, None] * side + columns[None, :], stored, mask)
    if row != column:
        mirror = within_b[:, None] & within_a[None, :]
        tl.store(products + columns[:, None] * side + rows[None, :], tl.trans(stored), mirror)

    if not COVARIANCE:
        exact = result.to(tl.float64)
        squares = tl.sum(tl.sum(exact * exact, 1), 0)
        squares = tl.where(row == column, squares, 2.0 * squares)
        if ROUTE != "difference":
            weight_a = 1.0 / (tl.where(target_a, t, s) - correction).to(tl.float64)
            weight_b = 1.0 / (tl.where(target_b, t, s) - correction).to(tl.float64)
            squares = tl.where(gram, squares * weight_a * weight_b, squares)
        between = target_a != target_b
        count = num_tiles(s, t, d, gram, BLOCK) * SLICES
        terms += (batch * tiles_batch + first_tile) * (2 * SLICES)
        tl.store(terms + 2 * local, tl.where(between, 0.0, squares))
        tl.store(terms + 2 * local + 1, tl.where(between, squares, 0.0))
        pair = batch * LAYERS + layer
        if is_last(counters + 2 * pair, count):
            within_domains = ordered_sum(terms, count, 2)
            norm = within_domains - ordered_sum(terms + 1, count, 2)
            if EXACT:
                # What is left below the rounding errors of float64 is noise.
                norm = tl.where(norm < 1e-14 * within_domains, 0.0, norm)
            else:
                tl.store(cancelled + pair, (gram & (norm < 1e-2 * within_domains)).to(tl.int32))
            norm = tl.where(norm < 0.0, 0.0, norm)
            weight = weight_of(layer, weights, LAYERS)
            tl.store(losses + pair, (norm / scale_divisor(d, SCALE) * weight).to(losses.dtype.element_ty))
            means += batch * means_batch + first_mean
            squares_of_means = tl.zeros((512,), tl.float64)
            for i in range(0, d, 512):
                feature = i + tl.arange(0, 512)
                source_mean = tl.load(means + feature, feature < d, other=0.0)
                target_mean = tl.load(means + d + feature, feature < d, other=0.0)
                squares_of_means += (source_mean - target_mean) * (source_mean - target_mean)
            distance = tl.sum(squares_of_means, 0) / d.to(tl.float64) * weight
            tl.store(mean_distances + pair, distance.to(losses.dtype.element_ty))


@kernel
def careful_loss_kernel(
    source,
    target,
    means,
    terms,  # (batch · layers, programs) float64
    counters,
    losses,
    cancelled,
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    weights,
    total,
    correction,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The loss where the terms of the Gram matrix cancelled: from the difference of the covariances, in float64, which
    does not cancel. Elsewhere nothing is done."""
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, first_source, first_target, first_mean, _, _, _ = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, BLOCK, "difference"
    )
    pair = batch * LAYERS + layer
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch,
        first_source, first_target, d, FLAT, ALIGN,
    )  # fmt: skip
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    if tl.load(cancelled + pair) != 0:
        mean = means + batch * tl.multiple_of(means_batch.to(tl.int64), ALIGN) + first_mean
        source_weight = 1.0 / (s - correction).to(tl.float64)
        target_weight = 1.0 / (t - correction).to(tl.float64)
        workers = total // LAYERS
        squares = tl.zeros((), tl.float64)
        for step in range(0, tl.cdiv(num_tiles(s, t, d, d < 0, BLOCK) - local, workers)):
            row, column = triangle(local + step * workers)
            of_source = scatter_tile(
                row,
                column,
                0,
                s,
                source,
                source_row,
                source_column,
                mean,
                s,
                d,
                False,
                False,
                False,
                tl.float64,
                tl.float64,
                "ieee",
                BLOCK,
                BLOCK_K,
            )
            of_target = scatter_tile(
                row,
                column,
                0,
                t,
                target,
                target_row,
                target_column,
                mean + d,
                t,
                d,
                False,
                False,
                False,
                tl.float64,
                tl.float64,
                "ieee",
                BLOCK,
                BLOCK_K,
            )
            difference = (of_source * (source_weight / target_weight) - of_target) * target_weight
            square = tl.sum(tl.sum(difference * difference, 1), 0)
            squares += tl.where(row == column, square, 2.0 * square)
        terms += pair * workers
        tl.store(terms + local, squares)
        if is_last(counters + 2 * pair + 1, workers):
            norm = ordered_sum(terms, workers, 1) * weight_of(layer, weights, LAYERS)
            tl.store(losses + pair, (norm / scale_divisor(d, SCALE)).to(losses.dtype.element_ty))
