"""The covariance's ops on Triton: each function takes and gives what the op of torch.ops.fastda of its name does."""

from __future__ import annotations

import math

from torch import Tensor

from .backward import backward
from .coral import check_samples, flatten
from .forward import forward
from .problem import Domains, Layer, plan_backward, plan_forward


def one_domain(x: Tensor, correction: int) -> tuple[Layer, ...]:
    check_samples((x.shape[-2],), correction)
    return (Layer(x.shape[-2], 0, x.shape[-1], gram=False),)


def covariance(x: Tensor, correction: int) -> tuple[Tensor, Tensor]:
    batch, num_features = x.shape[:-2], x.shape[-1]
    plan = plan_forward(one_domain(x, correction), math.prod(batch), x.dtype, x.device, False)
    rows = flatten(x, 2)
    _, _, means, value = forward(Domains(rows, rows, False), plan, correction)
    return value.view(*batch, num_features, num_features), means.view(*batch, num_features)


def covariance_backward(grad_value: Tensor, x: Tensor, mean: Tensor, correction: int, need_x: bool) -> Tensor:
    if not need_x:
        return x.new_empty(0)
    rows, grad = flatten(x, 2), x.new_empty(x.shape)
    flat_grad, incoming = flatten(grad, 2), flatten(grad_value, 2).contiguous()
    backward(
        (incoming, incoming),  # not read: the covariance's gradient is in the place of the products
        Domains(rows, rows, False),
        flatten(mean, 1).contiguous(),
        incoming,
        plan_backward(one_domain(x, correction), math.prod(x.shape[:-2]), x.dtype, False, (True, False)),
        correction,
        "sum",
        (flat_grad, flat_grad),
        (True, False),
        covariance=True,
    )
    return grad
