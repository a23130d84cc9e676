"""Gradients that are known before `backward` asks for them, and their sum over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..backend import eager_core


def with_gradient(total: Tensor, gradients: list[Tensor], divisor: int | Tensor, leaves: list[Tensor]) -> Tensor:
    """total / divisor, whose gradients for the leaves are the given ones / divisor. It can be differentiated once."""
    core = eager_core(total)
    if core is None:
        return WithGradient.apply(total, gradients, divisor, *leaves)
    return core.with_gradient(total, gradients, divisor, leaves)


class WithGradient(torch.autograd.Function):
    """`with_gradient` without the compiled core."""

    @staticmethod
    def forward(ctx, total: Tensor, gradients: list[Tensor], divisor: int | Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.divisor = divisor
        return total / divisor

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, got True: a meta-loss can be differentiated once; "
                "for more, differentiate MAML.query_losses"
            )
        return None, None, None, *torch._foreach_mul(ctx.saved_tensors, grad / ctx.divisor)


def sum_over_processes(tensors: list[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> list[Tensor]:
    """The sum of each tensor over the processes, in one collective of this dtype, which all processes agree about."""
    flat = torch.cat([x.flatten().to(dtype) for x in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in tensors])
    return [x.view(like.shape).to(like.dtype) for x, like in zip(parts, tensors)]
