"""Covariance on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import serve
from ..reference import checks
from ..reference.precision import accumulate
from .fused import fused
from .specification import specified_by


def _covariance_fake(x: Tensor, correction: int):
    *batch, _, num_features = x.shape
    like = accumulate(x)
    return like.new_empty(*batch, num_features, num_features), like.new_empty(*batch, num_features, dtype=torch.float64)


def _covariance_backward_fake(grad_value, x, mean, correction, need_x):
    return x.new_empty(x.shape if need_x else (0,))


_covariance = fused(
    "covariance(Tensor x, int correction) -> (Tensor value, Tensor mean)",
    _covariance_fake,
    "covariance_backward(Tensor grad_value, Tensor x, Tensor mean, int correction, bool need_x) -> Tensor grad_x",
    _covariance_backward_fake,
    lambda x, correction: reference.covariance(x, correction=correction),
)


@specified_by(reference.covariance)
def covariance(x: Tensor, *, correction: int = 1) -> Tensor:
    (x,) = checks.features("(..., samples, features)", x=x)
    checks.whole_number("correction", correction, 0)
    if serve("covariance", x) == "reference":
        return reference.covariance(x, correction=correction)
    checks.enough_samples("x", x.shape[-2], correction)
    return _covariance(x, correction)[0]
