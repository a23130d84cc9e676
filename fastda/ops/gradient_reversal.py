"""Gradient reversal on the compiled core: views of the input, whose gradients are those of a C++ node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backend import eager_core, serve
from ..reference.gradient_reversal import check_linear, check_reversal, each_layer, refuse_forward_mode, scalar_lambda
from .fused import define, library
from .specification import specified_by

# For torch.func, which cannot see a view that is made outside of the dispatcher: a copy. One λ for each batch element.
_gradient_reversal = define(
    "gradient_reversal(Tensor x, Tensor lambd) -> Tensor", lambda x, lambd: x.new_empty(x.shape)
)

# g₁ − λ·g₂ in one launch for all layers: the nodes call it where λ is on a GPU.
library.define(
    "gradient_reversal_fork_backward(Tensor[] grads, Tensor[] reversed_grads, Tensor lambd) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(
    "fastda::gradient_reversal_fork_backward",
    lambda grads, reversed_grads, lambd: [torch.empty_like(grad) for grad in grads],
    lib=library,
)


@specified_by(reference.gradient_reversal)
def gradient_reversal(x: Tensor, lambd: float | Tensor = 1.0) -> Tensor:
    core = eager_core(x)
    if core is not None and (result := core.gradient_reversal(x, lambd)) is not None:
        return result
    check_reversal(x, lambd)
    refuse_forward_mode("gradient_reversal")
    return _reverse("gradient_reversal", x, lambd)


def _reverse(op: str, x: Tensor, lambd: float | Tensor) -> Tensor:
    """Outside of plain eager mode: under torch.func an op, for torch.compile a formula that it can fuse with others."""
    if serve(op, x) == "reference" or not torch._C._are_functorch_transforms_active():
        return reference.gradient_reversal(x, lambd)
    return _gradient_reversal(x, scalar_lambda(x, lambd))


@specified_by(reference.gradient_reversal_fork)
def gradient_reversal_fork(
    x: Tensor | Sequence[Tensor], lambd: float | Tensor = 1.0
) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if not isinstance(x, Tensor):
        return _fork_layers(x, lambd)
    core = eager_core(x)
    if core is not None and (results := core.gradient_reversal_fork(x, lambd)) is not None:
        return results
    check_reversal(x, lambd)
    refuse_forward_mode("gradient_reversal_fork")
    return x.view_as(x), _reverse("gradient_reversal_fork", x, lambd)


def _fork_layers(x: Sequence[Tensor], lambd: float | Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    core = eager_core(x[0]) if isinstance(x, (list, tuple)) and x else None
    if core is not None and (pairs := core.gradient_reversal_forks(x, lambd)) is not None:
        return tuple(zip(*pairs))
    return each_layer(gradient_reversal_fork, x, lambd)


@specified_by(reference.gradient_reversal_linear)
def gradient_reversal_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, lambd: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    core = eager_core(x)
    if core is not None and (results := core.gradient_reversal_linear(x, weight, bias, lambd)) is not None:
        return results
    check_reversal(x, lambd)
    check_linear(x, weight, bias)
    refuse_forward_mode("gradient_reversal_linear")
    return x.view_as(x), F.linear(_reverse("gradient_reversal_linear", x, lambd), weight, bias)
