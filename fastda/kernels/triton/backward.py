"""From incoming gradients to those of the features: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tiles
from .gradients import careful_gram_kernel, gradient_kernel
from .problem import (
    TRITON_DTYPES,
    Domains,
    Sizes,
    accumulator,
    centred_copy,
    ceil_div,
    launch,
    operand,
    precision,
)


def backward(
    incoming: tuple[Tensor, Tensor],
    domains: Domains,
    means: Tensor,
    products: Tensor,
    sizes: Sizes,
    correction: int,
    scale: str,
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, bool],
    *,
    covariance: bool = False,
) -> None:
    """Write the gradients that are needed into `grads`.

    incoming: of losses and mean distances, each (batch, layers). grads: contiguous; the same tensor twice for flat layers.
    """
    like, device = domains.source, domains.source.device
    dtype = accumulator(like.dtype)
    flat, count = domains.flat, sizes.count
    dense = sizes.batch * sum(layer.num_samples * layer.num_features**2 for layer in sizes.layers)
    large = not flat and sizes.route == "difference" and like.dtype.itemsize == 2 and dense >= tiles.HALF_WORK
    half = large and like.dtype == torch.bfloat16
    blocks = tiles.gradient(sizes.num_samples, dtype, half)
    row_blocks = [
        needs[0] * ceil_div(layer.num_source, blocks.rows) + needs[1] * ceil_div(layer.num_target, blocks.rows)
        for layer in sizes.layers
    ]

    careful = any(layer.gram for layer in sizes.layers) and dtype == torch.float32
    exact, cancelled = products, means
    if careful:
        exact, cancelled = careful_gram(domains, means, products, sizes, correction, needs, row_blocks, blocks.rows)

    read, matrix, symmetrise = domains, products, covariance
    if half:
        # Rounded to bfloat16, which has the range of float32; float16 has not, and is multiplied as tf32.
        read = centred_copy(domains, means, sizes)
        matrix = products.view(sizes.batch, *2 * (sizes.layers[0].num_features,))
        matrix = (matrix + matrix.mT if covariance else matrix).to(torch.bfloat16)
        symmetrise = False
    counts, total = sizes.programs(
        [rows * ceil_div(layer.num_features, blocks.columns) for rows, layer in zip(row_blocks, sizes.layers)]
    )
    of_loss, of_distance = incoming
    launch(
        gradient_kernel,
        sizes.batch * total,
        device,
        of_loss,
        of_distance,
        read.source,
        read.target,
        means,
        matrix,
        exact,
        cancelled,
        *grads,
        *of_loss.stride()[:2],
        *of_distance.stride()[:2],
        *read.strides,
        sizes.means,
        sizes.products,
        sum(flag_blocks(sizes, blocks.rows)),
        *(grad.stride(0) if grad.dim() > 1 else 0 for grad in grads),
        *sizes.packed,
        sizes.no_chunks,
        counts,
        total,
        correction,
        LAYERS=count,
        FLAT=flat,
        ROUTE=sizes.route,
        COVARIANCE=covariance,
        SCALE=scale,
        NEED_SOURCE=needs[0],
        NEED_TARGET=needs[1],
        CAREFUL=careful,
        CENTRED=half,
        SYMMETRISE=symmetrise,
        DTYPE=TRITON_DTYPES[dtype],
        OPERAND=operand(like.dtype, device),
        PRECISION="tf32" if large and not torch.version.hip else precision(),
        BLOCK=blocks.rows,
        WIDTH=blocks.columns,
        BLOCK_K=blocks.depth,
        ALIGN=sizes.align,
        **blocks.options,
    )


def flag_blocks(sizes: Sizes, block: int) -> list[int]:
    """Blocks of samples of each layer."""
    return [ceil_div(layer.num_source, block) + ceil_div(layer.num_target, block) for layer in sizes.layers]


def careful_gram(domains, means, products, sizes, correction, needs, row_blocks, block) -> tuple[Tensor, Tensor]:
    blocks = tiles.careful(block)
    flags = flag_blocks(sizes, block)
    exact = products.new_empty(products.shape, dtype=torch.float64)
    cancelled = products.new_empty(sizes.batch, sum(flags), dtype=torch.int32)
    counts, total = sizes.programs(
        [rows * others if layer.gram else 0 for rows, others, layer in zip(row_blocks, flags, sizes.layers)]
    )
    launch(
        careful_gram_kernel,
        sizes.batch * total,
        products.device,
        domains.source,
        domains.target,
        means,
        products,
        exact,
        cancelled,
        *domains.strides,
        sizes.means,
        sizes.products,
        sum(flags),
        *sizes.packed,
        sizes.no_chunks,
        counts,
        total,
        correction,
        LAYERS=sizes.count,
        FLAT=domains.flat,
        ROUTE=sizes.route,
        NEED_SOURCE=needs[0],
        NEED_TARGET=needs[1],
        BLOCK=block,
        BLOCK_K=blocks.depth,
        **blocks.options,
    )
    return exact, cancelled
