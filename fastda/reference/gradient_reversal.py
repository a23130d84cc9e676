"""Gradient reversal: the identity forward, the negated and scaled gradient backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks


def check_reversal(x: Tensor, lambd: float | Tensor) -> None:
    """Raise for anything but floating features and a finite number or one-element tensor."""
    checks.floating("x", x)
    if isinstance(lambd, Tensor):
        checks.scalar_tensor("lambd", lambd, ((), (1,)), x)
    else:
        checks.number("lambd", lambd)


def scalar_lambda(x: Tensor, lambd: float | Tensor) -> Tensor:
    """λ as a tensor of shape () on the device of x, without gradient."""
    if isinstance(lambd, Tensor):
        return lambd.detach().reshape(())
    # A product: torch.full makes torch.compile compile anew for each value.
    return torch.ones((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32, device=x.device) * lambd


def refuse_forward_mode(name: str) -> None:
    """The identity's directional derivative would contradict the reversed gradient."""
    if torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{name}: has no forward-mode derivative, since its gradient is not that of its value; "
            f"use reverse mode (torch.func.grad, vjp, jacrev)"
        )


class _Reverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, lambd: Tensor) -> Tensor:
        # torch.compile makes aliases among a graph's results anew from what they alias, and would lose the reversal
        # (seen up to torch 2.13). Inductor drops a copy that it does not need.
        return x.clone() if torch.compiler.is_compiling() else x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1].clone())  # the value of now: a schedule may overwrite its buffer

    @staticmethod
    def backward(ctx, grad: Tensor):
        (lambd,) = ctx.saved_tensors
        return (grad * -lambd).to(grad.dtype), None


def _reverse(x: Tensor, lambd: float | Tensor) -> Tensor:
    lambd = scalar_lambda(x, lambd)
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # torch.compile inlines the forward of a Function under torch.func and loses its backward (seen up to torch
        # 2.13). The difference is 0 and has the gradient −λ; for features that are not finite the gradient is 0.
        return x.detach() + ((x.detach() - x) * lambd).nan_to_num().to(x.dtype)
    return _Reverse.apply(x, lambd)


def gradient_reversal(x: Tensor, lambd: float | Tensor = 1.0) -> Tensor:
    r"""Gradient reversal: the identity, whose gradient is multiplied by −λ.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} := -\lambda \frac{\partial L}{\partial y}

    Between a feature extractor and a domain classifier it makes the one train against the other.

    Args:
        x: features of any shape. float32, float64, bfloat16 or float16.
        lambd: λ, a finite number, or a tensor of shape () or (1,) on the device of `x`, so that a schedule neither
            synchronises nor recompiles. The value that stands when forward runs is the one used (under torch.compile
            backward raises if it was overwritten since). No gradient flows to it.

    Returns:
        A view of `x`, in its dtype. In grad mode an in-place operation on it raises; outside it, it writes to `x`.
        Under torch.compile it is no view.

    Raises:
        TypeError: `x` is not a floating tensor, or `lambd` neither a number nor a floating tensor.
        ValueError: `lambd` is not finite, or has more than one element or another device.
        RuntimeError: forward-mode differentiation, which the reversal has not.

    Differentiable any number of times with respect to `x`. λ = 0 multiplies by zero, so that Inf and NaN in the
    incoming gradient become NaN.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch, fastda
        >>> x = torch.ones(2, requires_grad=True)
        >>> fastda.gradient_reversal(x, 0.5).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """
    check_reversal(x, lambd)
    refuse_forward_mode("gradient_reversal")
    return _reverse(x, lambd)


def each_layer(fork, layers: Sequence[Tensor], lambd: float | Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The forks of several layers: all first views, all second ones; an error in a layer says which."""
    if not (isinstance(layers, (list, tuple)) and layers and all(isinstance(x, Tensor) for x in layers)):
        got = checks.describe(layers)
        raise TypeError(f"x: expected a tensor or a list of them, got {got}; pass one tensor a layer")
    pairs = []
    for layer, x in enumerate(layers):
        try:
            pairs.append(fork(x, lambd))
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {layer}: {error}") from error
    first, second = zip(*pairs)
    return first, second


def gradient_reversal_fork(
    x: Tensor | Sequence[Tensor], lambd: float | Tensor = 1.0
) -> tuple[Tensor, Tensor] | tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""Shared features for two heads: one whose gradient comes back as it is, one whose gradient is reversed.

    .. math:: y_1 = y_2 = x, \qquad
        \frac{\partial L}{\partial x} := \frac{\partial L}{\partial y_1} - \lambda \frac{\partial L}{\partial y_2}

    Args:
        x: features of any shape, or a list of them, one tensor a layer, of any shapes, whose gradients are then formed
            together. float32, float64, bfloat16 or float16.
        lambd: λ, as in :func:`fastda.gradient_reversal`.

    Returns:
        Two views of `x`: the first for the label predictor, the second for the domain classifier. For a list, the tuple
        of all first views and the tuple of all second ones.

    Raises:
        What :func:`fastda.gradient_reversal` raises, the layer of a list named.

    Differentiable any number of times with respect to `x`.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch, fastda
        >>> x = torch.ones(2, requires_grad=True)
        >>> for_labels, for_domains = fastda.gradient_reversal_fork(x, 0.5)
        >>> (3 * for_labels + 2 * for_domains).sum().backward()
        >>> x.grad
        tensor([2., 2.])
    """
    if not isinstance(x, Tensor):
        return each_layer(gradient_reversal_fork, x, lambd)
    check_reversal(x, lambd)
    refuse_forward_mode("gradient_reversal_fork")
    return x.view_as(x), _reverse(x, lambd)


def gradient_reversal_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, lambd: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    r"""The fork with the first layer of the domain classifier in it.

    .. math:: y_1 = x, \quad h = x W^T + b, \qquad
        \frac{\partial L}{\partial x} := \frac{\partial L}{\partial y_1} - \lambda \frac{\partial L}{\partial h} W

    The gradients of W and b are the ordinary ones.

    Args:
        x: features of shape `(..., D)`. float32, float64, bfloat16 or float16.
        weight: `(H, D)`, in the dtype of `x` (autocast casts both, as for `torch.nn.functional.linear`).
        bias: `(H,)` or None.
        lambd: λ, as in :func:`fastda.gradient_reversal`.

    Returns:
        A view of `x` for the label predictor, and h of shape `(..., H)` for the rest of the domain classifier.

    Raises:
        What :func:`fastda.gradient_reversal` raises; and ValueError for a weight or bias whose shape, dtype or device
        does not fit.

    Differentiable any number of times with respect to `x`, `weight` and `bias`.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch, fastda
        >>> x, weight = torch.ones(1, 2, requires_grad=True), torch.tensor([[2.0, 4.0]])
        >>> features, hidden = fastda.gradient_reversal_linear(x, weight, lambd=0.5)
        >>> hidden.item()
        6.0
        >>> (features.sum() + hidden.sum()).backward()
        >>> x.grad
        tensor([[ 0., -1.]])
    """
    check_reversal(x, lambd)
    check_linear(x, weight, bias)
    refuse_forward_mode("gradient_reversal_linear")
    return x.view_as(x), F.linear(_reverse(x, lambd), weight, bias)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a linear layer over `x`."""
    checks.floating("weight", weight)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"weight: expected shape (outputs, features of x), got {checks.describe(weight)} "
            f"for x, {checks.describe(x)}"
        )
    if bias is not None:
        checks.floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {checks.describe(bias)}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if parameter.device != x.device:
            raise ValueError(
                f"{name}: expected the device of x, {x.device}, got {checks.describe(parameter)}; "
                "move it with .to(device)"
            )
        if parameter.dtype != x.dtype and not autocast:
            raise TypeError(
                f"{name}: expected the dtype of x, {x.dtype}, got {checks.describe(parameter)}; convert one of them"
            )
