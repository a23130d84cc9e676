"""Which dtype a formula is evaluated in."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate(x: Tensor) -> Tensor:
    """Half precision is raised to float32; float32 and float64 stay as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def no_autocast(x: Tensor) -> torch.autocast:
    """Autocast would round the products to half precision behind the formula's back."""
    return torch.autocast(x.device.type, enabled=False)
