"""Numbers that follow a schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..reference import checks

Schedule = "float | Callable[[float], float]"
"""A number, or a function from the progress of training, 0 to 1, to a number."""


class Scheduled(nn.Module):
    """The present value of a schedule, as a tensor on the device, so that it neither synchronises nor recompiles."""

    def __init__(self, name: str, schedule: float | Callable[[float], float]) -> None:
        super().__init__()
        if not callable(schedule):
            checks.number(name, schedule)
        self.name, self.schedule = name, schedule
        self.register_buffer("value", torch.tensor(0.0), persistent=False)
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        value = self.schedule(progress) if callable(self.schedule) else self.schedule
        checks.number(f"{self.name} at progress {progress:.3g}", value)
        self.value.fill_(value)

    def forward(self) -> Tensor:
        return self.value

    def extra_repr(self) -> str:
        return f"{self.name}={getattr(self.schedule, '__name__', self.schedule)}"
