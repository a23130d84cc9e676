"""What the kernels of covariance and CORAL share on the device: where a program works, how it centres, how it finishes.

One launch serves a batch of pairs of domains at one or several layers. The layers' sizes come as tuples of `packed`
integers, one a layer, and are unpacked by a shift; a program finds its layer and the offsets of the layer's data by
summing the sizes before it.

Each layer goes one of two routes. "gram": products of samples with samples, the sum running over features.
"difference": products of features with features, the sum running over samples. ROUTE is the one all layers share, or
"both". Blocks of samples never mix domains, so that equal domains are summed alike and their difference is exactly 0.
"""

from __future__ import annotations

import functools
import math
import struct

import triton
import triton.language as tl


def packed(size: int) -> int:
    """Triton specialises kernels on integers in tuples that are 1 or multiples of 16. This is never either."""
    return 16 * size + 3


kernel = functools.partial(
    triton.jit,
    do_not_specialize=(
        "num_source", "num_target", "num_features", "total", "pairs", "correction",
        "source_batch", "target_batch", "source_row", "target_row", "source_column", "target_column",
        "means_batch", "partials_batch", "products_batch", "tiles_batch", "cancelled_batch",
        "grad_batch", "grad_layer", "grad_mean_batch", "grad_mean_layer", "out_source_batch", "out_target_batch",
    ),
)  # fmt: skip
"""A kernel that is compiled anew for no size and no stride: ALIGN and CONTIGUOUS say what helps to know of them."""


@triton.jit
def locate(
    source,
    target,
    source_batch,
    target_batch,
    source_row,
    target_row,
    batch,
    first_source,
    first_target,
    d,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where the two domains of a layer begin, and the strides of their rows."""
    source += batch * tl.multiple_of(source_batch.to(tl.int64), ALIGN) + first_source
    target += batch * tl.multiple_of(target_batch.to(tl.int64), ALIGN) + first_target
    if FLAT:
        row = tl.multiple_of(d.to(tl.int64), ALIGN)
        return source, target, row, row
    else:
        source_row = tl.multiple_of(source_row.to(tl.int64), ALIGN)
        return source, target, source_row, tl.multiple_of(target_row.to(tl.int64), ALIGN)


@triton.jit
def goes_gram(num_source, num_target, num_features, ROUTE: tl.constexpr):
    if ROUTE == "gram":
        return num_features >= 0
    elif ROUTE == "difference":
        return num_features < 0
    else:
        return num_source + num_target < num_features


@triton.jit
def num_tiles(num_source, num_target, num_features, gram, BLOCK: tl.constexpr):
    """Tiles of the lower triangle of the products."""
    of_samples = (num_source + BLOCK - 1) // BLOCK + (num_target + BLOCK - 1) // BLOCK
    blocks = tl.where(gram, of_samples, (num_features + BLOCK - 1) // BLOCK)
    return blocks * (blocks + 1) // 2


@triton.jit
def num_chunks(num_source, num_target, num_features, gram, chunk):
    """Parts into which the sum of a product is split; those of the source come first."""
    of_samples = (num_source + chunk - 1) // chunk + (num_target + chunk - 1) // chunk
    return tl.where(gram, (num_features + chunk - 1) // chunk, of_samples)


@triton.jit
def find_layer(
    program,
    num_source,
    num_target,
    num_features,
    chunk,
    programs,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUTE: tl.constexpr,
):
    """The layer of a program, its place among the layer's programs, the layer's sizes, and where its data begin:
    source, target, means, products (in elements), tiles, partial products (both counted in tiles)."""
    layer, first, end = tl.zeros((), tl.int64), tl.zeros((), tl.int32), tl.zeros((), tl.int32)
    s, t, d, c = (num_source[0] >> 4), (num_target[0] >> 4), (num_features[0] >> 4), (chunk[0] >> 4)
    source, target = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    means, products = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    tiles, partials = tl.zeros((), tl.int64), tl.zeros((), tl.int64)
    all_source, all_target, all_means, all_products = source, target, means, products
    all_tiles, all_partials = tiles, partials
    for i in tl.static_range(1, LAYERS):
        before_s, before_t = (num_source[i - 1] >> 4), (num_target[i - 1] >> 4)
        before_d, before_c = (num_features[i - 1] >> 4), (chunk[i - 1] >> 4)
        gram = goes_gram(before_s, before_t, before_d, ROUTE)
        side = tl.where(gram, before_s + before_t, before_d).to(tl.int64)
        count = num_tiles(before_s, before_t, before_d, gram, BLOCK).to(tl.int64)
        all_source += before_s.to(tl.int64) * before_d
        all_target += before_t.to(tl.int64) * before_d
        all_means += 2 * before_d
        all_products += side * side
        all_tiles += count
        all_partials += count * num_chunks(before_s, before_t, before_d, gram, before_c)
        end += (programs[i - 1] >> 4)
        here = program >= end
        layer, first = tl.where(here, i, layer), tl.where(here, end, first)
        s, t = tl.where(here, (num_source[i] >> 4), s), tl.where(here, (num_target[i] >> 4), t)
        d, c = tl.where(here, (num_features[i] >> 4), d), tl.where(here, (chunk[i] >> 4), c)
        source, target = tl.where(here, all_source, source), tl.where(here, all_target, target)
        means, products = tl.where(here, all_means, means), tl.where(here, all_products, products)
        tiles, partials = tl.where(here, all_tiles, tiles), tl.where(here, all_partials, partials)
    return layer, program - first, s, t, d, c, source, target, means, products, tiles, partials


def in_parts(weights) -> tuple[float, ...]:
    """Three numbers for each: Triton passes floats in float32, and together three have all digits of float64."""
    parts = []
    for weight in map(float, weights):
        for _ in range(3):
            part = struct.unpack("f", struct.pack("f", weight))[0]
            parts.append(part)
            weight = weight - part if math.isfinite(part) else 0.0
    return tuple(parts)


@triton.jit
def joined(weights, LAYER: tl.constexpr):
    """The number that `in_parts` took apart, in float64."""
    rest = tl.zeros((), tl.float64) + weights[3 * LAYER + 2] + weights[3 * LAYER + 1]
    return rest + weights[3 * LAYER]


@triton.jit
def weight_of(layer, weights, LAYERS: tl.constexpr):
    weight = joined(weights, 0)
    for i in tl.static_range(1, LAYERS):
        weight = tl.where(layer == i, joined(weights, i), weight)
    return weight


@triton.jit
def triangle(tile):
    """Row and column of the tile in the lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def centre(x, mean, mask, DTYPE: tl.constexpr):
    """x − mean in DTYPE, 0 outside the mask. The mean is float64: its float32 digits go first, then the rest."""
    if DTYPE == tl.float64:
        centred = x.to(tl.float64) - mean
    else:
        high = mean.to(tl.float32)
        low = (mean - high.to(tl.float64)).to(tl.float32)
        centred = (x.to(tl.float32) - high) - low
    return tl.where(mask, centred, 0.0)


@triton.jit
def column_means(x, row_stride, column_stride, count, columns, within, BLOCK: tl.constexpr):
    """Means of some columns over all `count` rows, in float64."""
    total = tl.zeros_like(columns).to(tl.float64)
    for first in range(0, count, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        offsets = rows[:, None].to(tl.int64) * row_stride + columns[None, :].to(tl.int64) * column_stride
        values = tl.load(x + offsets, (rows < count)[:, None] & within[None, :], other=0.0)
        total += tl.sum(values.to(tl.float64), 0)
    return total / count.to(tl.float64)


@triton.jit
def is_last(counter, arrivals):
    """True in the last of `arrivals` programs, which then sees all that the others stored before."""
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == arrivals - 1


@triton.jit
def ordered_sum(values, count, stride):
    """Sum of what other programs stored, in an order that never changes."""
    total = tl.zeros((128,), tl.float64)
    for first in range(0, count, 128):
        index = first + tl.arange(0, 128)
        total += tl.load(values + index.to(tl.int64) * stride, index < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def scale_divisor(num_features, SCALE: tl.constexpr):
    """What the squared norm is divided by: 4d², d² or 1."""
    d = tl.maximum(num_features, 1).to(tl.float64)
    if SCALE == "paper":
        return 4.0 * d * d
    elif SCALE == "mean":
        return d * d
    else:
        return d / d
