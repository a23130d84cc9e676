"""Gradient reversal on the compiled core."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import serve
from ..kernels import cpp
from ..reference.gradient_reversal import check_reversal, refuse_forward_mode, scalar_lambda
from .fused import define
from .specification import specified_by

# For torch.func, which cannot see a view that is made outside of the dispatcher: a copy. λ is one for each batch element.
_gradient_reversal = define("gradient_reversal(Tensor x, Tensor lambd) -> Tensor", lambda x, lambd: x.new_empty(x.shape))


@specified_by(reference.gradient_reversal)
def gradient_reversal(x: Tensor, lambd: float | Tensor = 1.0) -> Tensor:
    check_reversal(x, lambd)
    refuse_forward_mode("gradient_reversal")
    if serve("gradient_reversal", x) == "reference":
        return reference.gradient_reversal(x, lambd)
    if torch._C._are_functorch_transforms_active():
        return _gradient_reversal(x, scalar_lambda(x, lambd))
    if torch.compiler.is_compiling():
        return reference.gradient_reversal(x, lambd)  # traced to nothing forward, one fused product backward
    return cpp.library.gradient_reversal(x, lambd if isinstance(lambd, Tensor) else float(lambd))
