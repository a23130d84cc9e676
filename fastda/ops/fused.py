"""How a kernel becomes an op of `torch.ops.fastda`: schemas, shapes, vmap, and the derivatives beyond the first.

An op is four things: a kernel for its value, a kernel for its gradient (both in csrc/ and kernels/), the shapes of
their results (the fakes), and the formula that says what it computes. csrc/autograd.cpp joins the two kernels in
PyTorch's Autograd key, so that eager mode, torch.func and torch.compile share one lane; the derivative of a gradient is
that of the formula.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import launchers
from ..reference.precision import no_autocast

library = torch.library.Library("fastda", "DEF")
_formulas: dict[str, tuple[Callable, int, int]] = {}


def fused(schema: str, fake: Callable, backward_schema: str, backward_fake: Callable, formula: Callable) -> Callable:
    """Define an op and its backward op; returns the op.

    schema: `name(tensors..., constants...) -> (values..., saved...)`, the differentiable tensors first.
    backward_schema:
        `name_backward(grad_x, ..., tensors..., saved..., constants..., bool need_a, ...) -> (grad_a, ...)`, one `grad_`
        for each value, one `need_` and one result for each differentiable tensor; a gradient that is not needed comes
        back with shape (0,).
    formula: `(*tensors, *constants) -> values` in plain PyTorch, one tensor or a tuple.
    """
    op = define(schema, fake)
    backward = define(backward_schema, backward_fake)
    values = sum(argument.name.startswith("grad_") for argument in backward._schema.arguments)
    _formulas[op.name()] = formula, values, len(backward._schema.returns)
    return op


def define(schema: str, fake: Callable) -> Callable:
    """Define one op: its schema, the shapes of its results, and its rule under vmap."""
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    op = getattr(torch.ops.fastda, name).default
    if launchers.serves(name):
        library.impl(name, launchers.launcher(name), "CUDA")
    torch.library.register_fake(f"fastda::{name}", fake, lib=library)
    torch.library.register_vmap(f"fastda::{name}", _batch_rule(op), lib=library)
    return op


def _batch_rule(op: Callable) -> Callable:
    """Ops take any leading batch dimensions, so vmap is one more: in front, expanded where an argument lacks it.

    An op whose samples may have several dimensions says how many come before them, in its argument `batch_dims`.
    """
    names = [argument.name for argument in op._schema.arguments]

    def rule(info, in_dims, *args):
        def batched(arg, dim):
            if not isinstance(arg, Tensor):
                return arg
            return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)

        outputs = op(*(x + 1 if name == "batch_dims" else x for name, x in zip(names, map(batched, args, in_dims))))
        if isinstance(outputs, Tensor):
            return outputs, 0
        # A gradient that nobody asked for is empty, and has no batch.
        return outputs, tuple(None if output.shape == (0,) else 0 for output in outputs)

    return rule


def second_order(
    op: str, incoming: list[Tensor | None], operands: list[Tensor], constants: list, needs: list[bool]
) -> list[Tensor]:
    """Derivative of an op's gradient, called by csrc/autograd.cpp: differentiate the formula twice.

    operands: the incoming gradients of the first derivative, then the op's tensors. Returns a gradient for each of the
    former and for each differentiable tensor.
    """
    formula, values, count = _formulas[op]
    grads, variables, labels = operands[:values], operands[values : values + count], operands[values + count :]

    def gradients(grads: tuple[Tensor, ...], *variables: Tensor) -> tuple[Tensor, ...]:
        _, pull = torch.func.vjp(lambda *inputs: formula(*inputs, *labels, *constants), *variables)
        return tuple(result for result, needed in zip(pull(grads if values > 1 else grads[0]), needs) if needed)

    with no_autocast(grads[0]):
        results, pull = torch.func.vjp(gradients, tuple(grads), *variables)
        wanted = (gradient for gradient, needed in zip(incoming, needs) if needed)
        of_grads, *rest = pull(tuple(torch.zeros_like(x) if g is None else g for g, x in zip(wanted, results)))
        return [*of_grads, *rest]
