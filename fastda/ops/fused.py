"""How a kernel becomes an op of `torch.ops.fastda`: schemas, shapes, vmap, and the derivatives beyond the first.

An op is four things: a kernel for its value, a kernel for its gradient (both in csrc/ and kernels/), the shapes of their
results (the fakes), and the formula that says what it computes. csrc/autograd.cpp joins the two kernels in PyTorch's Autograd
key, so that eager mode, torch.func and torch.compile share one lane; the derivative of a gradient is that of the formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

library = torch.library.Library("fastda", "DEF")
_formulas: dict[str, tuple[Callable, int]] = {}


def fused(schema: str, fake: Callable, backward_schema: str, backward_fake: Callable, formula: Callable) -> Callable:
    """Define an op and its backward op; returns the op.

    schema: `name(tensors..., constants...) -> (value, saved...)`, the differentiable tensors first.
    backward_schema: `name_backward(grad, tensors..., saved..., constants..., bool need_a, ...) -> (grad_a, ...)`, one `need_`
        and one result for each differentiable tensor; a gradient that is not needed comes back with shape (0,).
    formula: `(*tensors, *constants) -> value` in plain PyTorch.
    """
    op = define(schema, fake)
    backward = define(backward_schema, backward_fake)
    _formulas[op.name()] = formula, len(backward._schema.returns)
    return op


def define(schema: str, fake: Callable) -> Callable:
    """Define one op: its schema, the shapes of its results, and its rule under vmap."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    op = getattr(torch.ops.fastda, name).default
    torch.library.register_fake(f"fastda::{name}", fake, lib=library)
    torch.library.register_vmap(f"fastda::{name}", _batch_rule(op), lib=library)
    return op


def _batch_rule(op: Callable) -> Callable:
    """Ops take any leading batch dimensions, so vmap is one more: in front, expanded where an argument lacks it."""

    def rule(info, in_dims, *args):
        def batched(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        outputs = op(*map(batched, args, in_dims))
        if isinstance(outputs, Tensor):
            return outputs, 0
        # A gradient that nobody asked for is empty, and has no batch.
        return outputs, tuple(None if output.shape == (0,) else 0 for output in outputs)

    return rule


def second_order(
    op: str, incoming: list[Tensor | None], operands: list[Tensor], constants: list, needs: list[bool]
) -> list[Tensor]:
    """Derivative of an op's gradient, called by csrc/autograd.cpp: differentiate the formula twice.

    operands: the incoming gradient of the first derivative, then the op's tensors. Returns a gradient for the former and for
    each differentiable tensor.
    """
    formula, count = _formulas[op]
    grad, *tensors = operands
    variables, labels = tensors[:count], tensors[count:]

    def gradients(grad: Tensor, *variables: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(lambda *inputs: formula(*inputs, *labels, *constants), *variables)
        return tuple(result for result, needed in zip(pull(grad), needs) if needed)

    values, pull = torch.func.vjp(gradients, grad, *variables)
    wanted = (gradient for gradient, needed in zip(incoming, needs) if needed)
    return list(pull(tuple(torch.zeros_like(value) if g is None else g for g, value in zip(wanted, values))))
