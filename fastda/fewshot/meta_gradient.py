"""Gradients that are known before `backward` asks for them, and their sum over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class WithGradient(torch.autograd.Function):
    """A sum over a divisor, whose gradients for some leaves are known already, but for the divisor."""

    @staticmethod
    def forward(ctx, total: Tensor, gradients: list[Tensor], divisor: int | Tensor, *leaves: Tensor) -> Tensor:
        ctx.gradients, ctx.divisor = gradients, divisor
        return total / divisor

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph: expected False, got True: a meta-loss can be differentiated once; "
                "for more, differentiate MAML.query_losses"
            )
        return None, None, None, *torch._foreach_mul(ctx.gradients, grad / ctx.divisor)


def sum_over_processes(tensors: list[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> list[Tensor]:
    """The sum of each tensor over the processes, in one collective of this dtype, which all processes agree about."""
    flat = torch.cat([x.flatten().to(dtype) for x in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in tensors])
    return [x.view(like.shape).to(like.dtype) for x, like in zip(parts, tensors)]
