"""From incoming gradients to those of the features: the launches."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import tiles
from .device import in_parts
from .gradients import careful_gram_kernel, gradient_kernel
from .problem import TRITON_DTYPES, BackwardPlan, Domains, accumulator, centred_copy, launch, operand, precision

ONE = in_parts([1.0])


def backward(
    incoming: tuple[Tensor, Tensor],
    domains: Domains,
    means: Tensor,
    products: Tensor,
    plan: BackwardPlan,
    correction: int,
    scale: str,
    grads: tuple[Tensor, Tensor],
    needs: tuple[bool, bool],
    *,
    weights: tuple[float, ...] = ONE,
    covariance: bool = False,
) -> None:
    """Write the gradients that are needed into `grads`.

    incoming: of losses and mean distances, each (batch, layers).
    grads: contiguous.
    """
    sizes, blocks, like = plan.sizes, plan.blocks, domains.source
    dtype = accumulator(like.dtype)
    exact, cancelled = products, means
    careful = plan.careful_programs[1] > 0
    if careful:
        exact, cancelled = careful_gram(domains, means, products, plan, correction, needs)

    read, matrix, symmetrise = domains, products, covariance
    if plan.half:
        # Rounded to bfloat16, which has the range of float32; float16 has not, and is multiplied as tf32.
        read = centred_copy(domains, means, sizes)
        matrix = products.view(sizes.batch, *2 * (sizes.layers[0].num_features,))
        matrix = (matrix + matrix.mT if covariance else matrix).to(torch.bfloat16)
        symmetrise = False
    counts, total = plan.programs
    of_loss, of_distance = incoming
    launch(
        gradient_kernel,
        sizes.batch * total,
        like.device,
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
        plan.num_flags,
        *(grad.stride(0) if grad.dim() > 1 else 0 for grad in grads),
        *sizes.packed,
        sizes.no_chunks,
        counts,
        weights,
        total,
        correction,
        LAYERS=sizes.count,
        FLAT=read.flat,
        CONTIGUOUS=read.contiguous,
        ROUTE=sizes.route,
        COVARIANCE=covariance,
        SCALE=scale,
        NEED_SOURCE=needs[0],
        NEED_TARGET=needs[1],
        CAREFUL=careful,
        CENTRED=plan.half,
        SYMMETRISE=symmetrise,
        DTYPE=TRITON_DTYPES[dtype],
        OPERAND=operand(like.dtype, like.device),
        PRECISION="tf32" if plan.large and not torch.version.hip else precision(),
        BLOCK=blocks.rows,
        WIDTH=blocks.columns,
        BLOCK_K=blocks.depth,
        ALIGN=read.alignment(sizes),
        **blocks.options,
    )


def careful_gram(domains, means, products, plan, correction, needs) -> tuple[Tensor, Tensor]:
    """The Gram matrix in float64 in blocks of samples where it cancels, and in which it does."""
    sizes, blocks = plan.sizes, tiles.careful(plan.blocks.rows)
    exact = products.new_empty(products.shape, dtype=torch.float64)
    cancelled = products.new_empty(sizes.batch, plan.num_flags, dtype=torch.int32)
    counts, total = plan.careful_programs
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
        plan.num_flags,
        *sizes.packed,
        sizes.no_chunks,
        counts,
        total,
        correction,
        LAYERS=sizes.count,
        FLAT=domains.flat,
        CONTIGUOUS=domains.contiguous,
        ROUTE=sizes.route,
        NEED_SOURCE=needs[0],
        NEED_TARGET=needs[1],
        BLOCK=blocks.rows,
        BLOCK_K=blocks.depth,
        ALIGN=domains.alignment(sizes),
        **blocks.options,
    )
    return exact, cancelled
