"""Gradients of covariance and CORAL: products of samples with the covariances, or with the Gram matrix."""

from __future__ import annotations

import triton
import triton.language as tl

from .device import centre, find_layer, goes_gram, kernel, locate, scale_divisor, weight_of


@triton.jit
def domain_of(block, s, t, BLOCK: tl.constexpr, NEED_SOURCE: tl.constexpr):
    """The domain of a block of samples (True: target) and the block's place in it."""
    of_source = (s + BLOCK - 1) // BLOCK if NEED_SOURCE else 0
    of_target = block >= of_source
    return of_target, tl.where(of_target, block - of_source, block)


@kernel
def careful_gram_kernel(
    source,
    target,
    means,
    products,  # (batch, n, n) float32
    exact,  # (batch, n, n) float64
    cancelled,  # (batch, row blocks) int32
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    products_batch,
    cancelled_batch,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    total,
    correction,
    LAYERS: tl.constexpr,
    FLAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    ROUTE: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The Gram matrix again, in float64, for those samples whose similarities to the two domains cancel."""
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, first_source, first_target, first_mean, first_product, _, _ = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, BLOCK, ROUTE
    )
    of_source = (s + BLOCK - 1) // BLOCK
    blocks = of_source + (t + BLOCK - 1) // BLOCK
    other, block = local % blocks, local // blocks
    target_a, place = domain_of(block, s, t, BLOCK, NEED_SOURCE)
    target_b = other >= of_source
    rows_a = place * BLOCK + tl.arange(0, BLOCK)
    rows_b = tl.where(target_b, other - of_source, other) * BLOCK + tl.arange(0, BLOCK)
    within_a, within_b = rows_a < tl.where(target_a, t, s), rows_b < tl.where(target_b, t, s)
    side = (s + t).to(tl.int64)
    out_a, out_b = rows_a + tl.where(target_a, s, 0), rows_b + tl.where(target_b, s, 0)

    source_weight = 1.0 / (s - correction).to(tl.float64)
    target_weight = 1.0 / (t - correction).to(tl.float64)
    gram = products + batch * products_batch + first_product
    to_source, to_target = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for k in range(0, s + t, BLOCK_K):
        index = k + tl.arange(0, BLOCK_K)
        mask = within_a[:, None] & (index < s + t)[None, :]
        values = tl.load(gram + out_a[:, None] * side + index[None, :], mask, other=0.0).to(tl.float64)
        squares = values * values
        to_source += tl.sum(tl.where((index < s)[None, :], squares, 0.0), 1)
        to_target += tl.sum(tl.where((index < s)[None, :], 0.0, squares), 1)
    to_source, to_target = to_source * source_weight, to_target * target_weight
    cancels = within_a & (tl.abs(to_source - to_target) < 1e-2 * (to_source + to_target))
    flag = tl.max(cancels.to(tl.int32), 0)
    # Layers before this one have fewer blocks than samples: their number of samples keeps the flags apart.
    place_of_flag = batch * cancelled_batch + layer_flags(
        layer, num_source, num_target, LAYERS, BLOCK, NEED_SOURCE, NEED_TARGET
    )
    if other == 0:
        tl.store(cancelled + place_of_flag + block, flag)
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch,
        first_source, first_target, d, FLAT, ALIGN,
    )  # fmt: skip
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    if flag != 0:
        mean = means + batch * tl.multiple_of(means_batch.to(tl.int64), ALIGN) + first_mean
        a, b = tl.where(target_a, target, source), tl.where(target_b, target, source)
        row_a = tl.where(target_a, target_row, source_row)
        row_b = tl.where(target_b, target_row, source_row)
        column_a = tl.where(target_a, target_column, source_column)
        column_b = tl.where(target_b, target_column, source_column)
        result = tl.zeros((BLOCK, BLOCK), tl.float64)
        for k in range(0, d, BLOCK_K):
            feature = k + tl.arange(0, BLOCK_K)
            within = feature < d
            mean_a = tl.load(mean + tl.where(target_a, d, 0) + feature, within, other=0.0)
            mean_b = tl.load(mean + tl.where(target_b, d, 0) + feature, within, other=0.0)
            mask_a, mask_b = within_a[:, None] & within[None, :], within[:, None] & within_b[None, :]
            x = a + rows_a[:, None] * row_a + feature[None, :].to(tl.int64) * column_a
            y = b + rows_b[None, :] * row_b + feature[:, None].to(tl.int64) * column_b
            x = centre(tl.load(x, mask_a, other=0.0), mean_a[None, :], mask_a, tl.float64)
            y = centre(tl.load(y, mask_b, other=0.0), mean_b[:, None], mask_b, tl.float64)
            result = tl.dot(x, y, result, out_dtype=tl.float64)
        exact += batch * products_batch + first_product
        tl.store(exact + out_a[:, None] * side + out_b[None, :], result, within_a[:, None] & within_b[None, :])


@triton.jit
def layer_flags(
    layer,
    num_source,
    num_target,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    NEED_TARGET: tl.constexpr,
):
    """Where the flags of a layer begin: the blocks of samples of the layers before it."""
    first = 0
    for i in tl.static_range(1, LAYERS):
        s, t = num_source[i - 1] >> 4, num_target[i - 1] >> 4
        blocks = (s + BLOCK - 1) // BLOCK + (t + BLOCK - 1) // BLOCK
        first += tl.where(layer >= i, blocks, 0).to(tl.int32)
    return first


@triton.jit
def product_with_samples(
    coefficients,
    rows,
    within_rows,
    side,
    first,
    x,
    row_stride,
    column_stride,
    mean,
    count,
    features,
    within,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of the Gram matrix times the centred samples of one domain, whose columns begin at `first`."""
    result = tl.zeros((BLOCK, WIDTH), DTYPE)
    mean = tl.load(mean + features, within, other=0.0)
    for k in range(0, count, BLOCK_K):
        sample = k + tl.arange(0, BLOCK_K)
        valid = sample < count
        a = coefficients + rows[:, None] * side + first + sample[None, :]
        a = tl.load(a, within_rows[:, None] & valid[None, :], other=0.0).to(DTYPE)
        mask = valid[:, None] & within[None, :]
        b = x + sample[:, None].to(tl.int64) * row_stride + features[None, :].to(tl.int64) * column_stride
        b = centre(tl.load(b, mask, other=0.0), mean[None, :], mask, DTYPE)
        result = tl.dot(a, b, result, input_precision=PRECISION, out_dtype=DTYPE)
    return result


@triton.jit
def product_with_matrix(
    x,
    row_stride,
    column_stride,
    mean,
    rows,
    within_rows,
    matrix,
    columns,
    within_columns,
    d,
    SYMMETRISE: tl.constexpr,
    CENTRED: tl.constexpr,
    DTYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Centred samples times some columns of a D×D matrix, or of its sum with its transpose.

    CENTRED: x is centred already, and its products are taken in OPERAND.
    """
    result = tl.zeros((BLOCK, WIDTH), DTYPE)
    for k in range(0, d, BLOCK_K):
        index = k + tl.arange(0, BLOCK_K)
        within = index < d
        mask_a, mask_b = within_rows[:, None] & within[None, :], within[:, None] & within_columns[None, :]
        a = x + rows[:, None].to(tl.int64) * row_stride + index[None, :].to(tl.int64) * column_stride
        a = tl.load(a, mask_a, other=0.0)
        b = tl.load(matrix + index[:, None].to(tl.int64) * d + columns[None, :], mask_b, other=0.0)
        if SYMMETRISE:
            b += tl.load(matrix + columns[None, :].to(tl.int64) * d + index[:, None], mask_b, other=0.0)
        if CENTRED:
            a, b = a.to(OPERAND), b.to(OPERAND)
        else:
            a = centre(a, tl.load(mean + index, within, other=0.0)[None, :], mask_a, DTYPE)
            b = b.to(DTYPE)
        result = tl.dot(a, b, result, input_precision=PRECISION, out_dtype=DTYPE)
    return result


@triton.jit
def store_gradient(
    out, result, rows, within_rows, columns, within_columns, means, pull, d, COVARIANCE: tl.constexpr
):
    """Adds `pull` times the difference of the means, the gradient of their distance, and stores."""
    if not COVARIANCE:
        apart = tl.load(means + columns, within_columns, other=0.0)
        apart -= tl.load(means + d + columns, within_columns, other=0.0)
        apart = tl.where(pull == 0.0, 0.0, pull * apart)
        result += apart.to(result.dtype)[None, :]
    out += rows[:, None].to(tl.int64) * d + columns[None, :]
    tl.store(out, result.to(out.dtype.element_ty), within_rows[:, None] & within_columns[None, :])


@kernel
def gradient_kernel(
    grad_losses,  # (batch, layers); not read where COVARIANCE
    grad_mean_distances,  # (batch, layers); not read where COVARIANCE
    source,
    target,
    means,
    products,  # (batch, side, side): Gram matrix, difference of covariances, or the incoming gradient of a covariance
    exact,  # the Gram matrix in float64, where `cancelled` says so
    cancelled,  # (batch, row blocks) int32
    grad_source,  # as source, contiguous
    grad_target,
    grad_batch,  # strides of grad_losses and grad_mean_distances, each (batch, layer)
    grad_layer,
    grad_mean_batch,
    grad_mean_layer,
    source_batch,
    target_batch,
    source_row,
    target_row,
    source_column,
    target_column,
    means_batch,
    products_batch,
    cancelled_batch,
    out_source_batch,
    out_target_batch,
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
    ROUTE: tl.constexpr,
    COVARIANCE: tl.constexpr,
    SCALE: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    CAREFUL: tl.constexpr,
    CENTRED: tl.constexpr,
    SYMMETRISE: tl.constexpr,
    DTYPE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The gradient of some features of some samples of one domain."""
    program = tl.program_id(0)
    batch = (program // total).to(tl.int64)
    layer, local, s, t, d, c, first_source, first_target, first_mean, first_product, _, _ = find_layer(
        program % total, num_source, num_target, num_features, chunk, programs, LAYERS, BLOCK, ROUTE
    )
    d = tl.multiple_of(d, ALIGN)
    widths = (d + WIDTH - 1) // WIDTH
    # Neighbouring programs share the samples that they read, or where samples are many the matrix.
    block, column = local // widths, local % widths
    of_target, place = domain_of(block, s, t, BLOCK, NEED_SOURCE)
    rows = place * BLOCK + tl.arange(0, BLOCK)
    count = tl.where(of_target, t, s)
    within_rows = rows < count
    columns = column * WIDTH + tl.arange(0, WIDTH)
    within_columns = columns < d
    source, target, source_row, target_row = locate(
        source, target, source_batch, target_batch, source_row, target_row, batch,
        first_source, first_target, d, FLAT, ALIGN,
    )  # fmt: skip
    if CONTIGUOUS:
        source_column, target_column = 1, 1
    grad_source += batch * tl.multiple_of(out_source_batch.to(tl.int64), ALIGN) + first_source
    grad_target += batch * tl.multiple_of(out_target_batch.to(tl.int64), ALIGN) + first_target
    mean = means + batch * tl.multiple_of(means_batch.to(tl.int64), ALIGN) + first_mean
    if ROUTE == "difference":
        products_batch = tl.multiple_of(products_batch.to(tl.int64), ALIGN)
    products += batch * products_batch + first_product
    x = tl.where(of_target, target, source)
    row_stride = tl.where(of_target, target_row, source_row)
    column_stride = tl.where(of_target, target_column, source_column)
    out = tl.where(of_target, grad_target, grad_source)

    source_weight = 1.0 / (s - correction).to(tl.float64)
    if COVARIANCE:
        coefficient = source_weight
        pull = source_weight  # not used
    else:
        target_weight = 1.0 / (t - correction).to(tl.float64)
        ratio = source_weight / target_weight
        incoming = tl.load(grad_losses + batch * grad_batch + layer * grad_layer).to(tl.float64)
        of_layer = weight_of(layer, weights, LAYERS)
        signed = tl.where(of_target, -target_weight, source_weight)
        coefficient = 4.0 / scale_divisor(d, SCALE) * of_layer * incoming * signed
        pull = tl.load(grad_mean_distances + batch * grad_mean_batch + layer * grad_mean_layer)
        signed_count = tl.where(of_target, -count, count).to(tl.float64)
        pull = 2.0 * of_layer * pull.to(tl.float64) / (signed_count * d.to(tl.float64))

    gram = goes_gram(s, t, d, ROUTE)
    if ROUTE != "difference":
        if gram:
            gram_rows = rows + tl.where(of_target, s, 0)
            side = (s + t).to(tl.int64)
            first_flag = layer_flags(layer, num_source, num_target, LAYERS, BLOCK, NEED_SOURCE, NEED_TARGET)
            careful = 0
            if CAREFUL:
                careful = tl.load(cancelled + batch * cancelled_batch + first_flag + block)
            if careful == 0:
                of_s = product_with_samples(
                    products, gram_rows, within_rows, side, 0, source, source_row, source_column, mean, s,
                    columns, within_columns, DTYPE, PRECISION, BLOCK, WIDTH, BLOCK_K,
                )  # fmt: skip
                of_t = product_with_samples(
                    products, gram_rows, within_rows, side, s, target, target_row, target_column, mean + d, t,
                    columns, within_columns, DTYPE, PRECISION, BLOCK, WIDTH, BLOCK_K,
                )  # fmt: skip
                result = (of_s * ratio.to(DTYPE) - of_t) * (coefficient * target_weight).to(DTYPE)
                store_gradient(out, result, rows, within_rows, columns, within_columns, mean, pull, d, COVARIANCE)
            if CAREFUL:
                if careful != 0:
                    exact += batch * products_batch + first_product
                    exact_s = product_with_samples(
                        exact, gram_rows, within_rows, side, 0, source, source_row, source_column, mean, s,
                        columns, within_columns, tl.float64, "ieee", BLOCK, WIDTH, 16,
                    )  # fmt: skip
                    exact_t = product_with_samples(
                        exact, gram_rows, within_rows, side, s, target, target_row, target_column, mean + d, t,
                        columns, within_columns, tl.float64, "ieee", BLOCK, WIDTH, 16,
                    )  # fmt: skip
                    result = ((exact_s * ratio - exact_t) * (coefficient * target_weight)).to(DTYPE)
                    store_gradient(out, result, rows, within_rows, columns, within_columns, mean, pull, d, COVARIANCE)
    if ROUTE != "gram":
        if not gram:
            result = product_with_matrix(
                x, row_stride, column_stride, mean + tl.where(of_target, d, 0), rows, within_rows, products,
                columns, within_columns, d, SYMMETRISE, CENTRED, DTYPE, OPERAND, PRECISION, BLOCK, WIDTH, BLOCK_K,
            )  # fmt: skip
            result *= coefficient.to(DTYPE)
            store_gradient(out, result, rows, within_rows, columns, within_columns, mean, pull, d, COVARIANCE)
