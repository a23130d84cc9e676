"""From features to means, products and losses: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tiles
from . import products as kernels
from .device import in_parts
from .problem import TRITON_DTYPES, Domains, ForwardPlan, centred_copy, ceil_div, launch, operand, precision


ONE = in_parts([1.0])


def means_and_counters(domains: Domains, plan: ForwardPlan) -> tuple[Tensor, Tensor]:
    """Means of each domain, and counters that the first launch sets to 0."""
    sizes, like = plan.sizes, domains.source
    means = like.new_empty(sizes.batch, sizes.means, dtype=torch.float64)
    counters = like.new_empty(sizes.batch * sizes.count * 2, dtype=torch.int32)
    if plan.fused_means:
        return means, counters
    domain_count = 1 if plan.covariance else 2
    programs = [domain_count * ceil_div(layer.num_features, 64) for layer in sizes.layers]
    blocks, splits = tiles.means(sizes.num_samples, sizes.batch * sum(programs), like.device)
    sums = means
    if splits > 1:
        counters = counters.new_zeros(counters.numel() + sizes.batch * sum(programs))
        sums = means.new_empty(splits, *means.shape)
    counts, total = sizes.programs([count * splits for count in programs])
    launch(
        kernels.means_kernel,
        sizes.batch * total,
        like.device,
        domains.source,
        domains.target,
        means,
        sums,
        counters,
        *domains.strides,
        sizes.means,
        *sizes.packed,
        sizes.no_chunks,
        counts,
        total,
        sizes.batch,
        LAYERS=sizes.count,
        FLAT=domains.flat,
        CONTIGUOUS=domains.contiguous,
        SPLITS=splits,
        DOMAINS=domain_count,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        ALIGN=domains.alignment(sizes),
        **blocks.options,
    )
    return means, counters


def forward(
    domains: Domains, plan: ForwardPlan, correction: int, scale: str = "sum", weights: tuple[float, ...] = ONE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and mean distances, each (batch, layers), means (batch, Σ 2·D) and products (batch, Σ side²)."""
    sizes, blocks, like = plan.sizes, plan.blocks, domains.source
    device, result_dtype = like.device, torch.float64 if like.dtype == torch.float64 else torch.float32
    means, counters = means_and_counters(domains, plan)
    # A layer without features, or a batch without elements, has no program that would write.
    empty = any(layer.num_features == 0 for layer in sizes.layers)
    losses, mean_distances = (
        (like.new_zeros if empty else like.new_empty)(sizes.batch, sizes.count, dtype=result_dtype) for _ in range(2)
    )
    products = like.new_empty(sizes.batch, sizes.products, dtype=result_dtype)
    partials = like.new_empty(sizes.batch, plan.num_partials, dtype=plan.accumulator)
    read = centred_copy(domains, means, sizes) if plan.half else domains
    counts, total = plan.programs
    launch(
        kernels.products_kernel,
        sizes.batch * total,
        device,
        read.source,
        read.target,
        means,
        partials,
        counters,
        *read.strides,
        sizes.means,
        plan.num_partials,
        *sizes.packed,
        plan.chunks,
        counts,
        total,
        LAYERS=sizes.count,
        FLAT=read.flat,
        CONTIGUOUS=read.contiguous,
        ROUTE=sizes.route,
        FUSED_MEANS=plan.fused_means,
        CENTRED=plan.half,
        ACCUMULATOR=TRITON_DTYPES[plan.accumulator],
        OPERAND=operand(like.dtype, device),
        PRECISION=precision(),
        BLOCK=blocks.rows,
        BLOCK_K=blocks.depth,
        ALIGN=read.alignment(sizes),
        **blocks.options,
    )
    counts, total = plan.total_programs
    terms = like.new_empty(sizes.batch, total, 2, dtype=torch.float64)
    cancelled = like.new_empty(sizes.batch, sizes.count, dtype=torch.int32)
    if empty:
        cancelled.zero_()
    tiles_in_batch = total // (blocks.rows // plan.rows_of_total)
    launch(
        kernels.total_kernel,
        sizes.batch * total,
        device,
        partials,
        means,
        products,
        terms,
        counters,
        losses,
        mean_distances,
        cancelled,
        sizes.means,
        plan.num_partials,
        sizes.products,
        tiles_in_batch,
        *sizes.packed,
        plan.chunks,
        counts,
        weights,
        total,
        correction,
        LAYERS=sizes.count,
        ROUTE=sizes.route,
        COVARIANCE=plan.covariance,
        SCALE=scale,
        EXACT=plan.exact,
        HALVED=plan.half and like.dtype == torch.float16,
        BLOCK=blocks.rows,
        SLICE=plan.rows_of_total,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=True,
    )
    if plan.careful_programs[1]:
        careful_loss(domains, plan, means, counters, losses, cancelled, correction, scale, weights)
    return losses, mean_distances, means, products


def careful_loss(domains, plan, means, counters, losses, cancelled, correction, scale, weights) -> None:
    sizes, blocks = plan.sizes, tiles.careful()
    counts, total = plan.careful_programs
    terms = losses.new_empty(sizes.batch, total, dtype=torch.float64)
    launch(
        kernels.careful_loss_kernel,
        sizes.batch * total,
        losses.device,
        domains.source,
        domains.target,
        means,
        terms,
        counters,
        losses,
        cancelled,
        *domains.strides,
        sizes.means,
        *sizes.packed,
        sizes.no_chunks,
        counts,
        weights,
        total,
        correction,
        LAYERS=sizes.count,
        FLAT=domains.flat,
        CONTIGUOUS=domains.contiguous,
        SCALE=scale,
        BLOCK=blocks.rows,
        BLOCK_K=blocks.depth,
        ALIGN=domains.alignment(sizes),
        **blocks.options,
    )
