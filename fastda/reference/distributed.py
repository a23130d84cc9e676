"""Sums over the processes of a `torch.distributed` group that can be differentiated, to any order."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes. What every process holds depends on every input, so the gradient is summed as well."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _AllReduceSum.apply(grad, ctx.group), None


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `x` over the processes of `group`, on each of them.

    A loss L that every process computes from such sums has the gradient W·∂L/∂x on each of the W processes, and the
    mean that DistributedDataParallel takes of them is the gradient of one process on the whole batch.
    """
    return _AllReduceSum.apply(x, group)


def check_group(process_group: object) -> None:
    """Collectives cannot be traced: a named error under torch.func and torch.compile."""
    if torch.compiler.is_compiling():
        raise RuntimeError("process_group: collectives do not work under torch.compile; call the op outside of it")
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("process_group: collectives do not work under torch.func; call the op outside the transform")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed ProcessGroup or None, got {type(process_group).__name__}; "
            f"torch.distributed.group.WORLD is the group of all processes"
        )
