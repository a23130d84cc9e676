"""Several processes: found, joined, and told from one another."""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; `group` is None for one alone."""

    rank: int = 0
    world: int = 1
    group: object = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
            values /= self.world
        return values

    def of_first(self, value):
        """What the first process has, on all of them."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value) -> list:
        """What each process has."""
        if self.group is None:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values


def as_device(device: torch.device | str) -> torch.device:
    """One that torch knows, and this machine has."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected 'cpu', 'cuda', 'cuda:1' or alike, got {device!r}; choose one") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: expected one that is here, got {device!r}, and torch finds no GPU; pass 'cpu' or None"
        )
    return found


def join(device: torch.device | str | None, module: torch.nn.Module) -> tuple[Processes, torch.device]:
    """Join the processes that torchrun started, if it did, and choose the device of this one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else next((p.device for p in module.parameters()), "cpu")
    device = as_device(device)
    started = dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) > 1)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if started else torch.cuda.current_device())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not started:
        return Processes(), device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if dist.get_world_size() == 1:
        return Processes(), device
    return Processes(dist.get_rank(), dist.get_world_size(), dist.group.WORLD), device
