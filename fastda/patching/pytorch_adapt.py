"""pytorch-adapt: CORAL, and the gradient reversal of its DANN, CDAN, GVB and domain-confusion hooks.

Left alone: MMD and the other losses, for which there is no op; the domain loss of its hooks, which takes source and
target in two calls.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .. import ops
from .replacement import Replacement, features

KNOWN = "0.0.83"


def covariance(original, x):
    """Unbiased. The library's own is not centred, and loses digits where means are large."""
    return ops.covariance(x) if features(x) else original(x)


def coral(original, self, x, y):
    """The paper's scale, 1/(4d²)."""
    return ops.coral_loss(x, y) if features(x, y) else original(self, x, y)


def gradient_reversal(original, self, x):
    """λ is the buffer `weight` as it stands when forward runs (the library reads it when backward does)."""
    if not (isinstance(x, torch.Tensor) and features(x, dims=x.dim())):
        return original(self, x)
    weight = self.weight if self.weight.is_floating_point() else self.weight.float()  # GradientReversal(1) has integers
    return ops.gradient_reversal(x, weight.to(x.device))


def _probe_covariance(function, normal):
    yield function(normal(5, 3))


def _probe_coral(function, normal):
    yield function(SimpleNamespace(), normal(5, 3), 2 * normal(4, 3))


def _probe_reversal(function, normal):
    for weight in (torch.tensor([0.3]), torch.tensor([2])):
        yield function(SimpleNamespace(weight=weight), normal(5, 3))


REPLACEMENTS = (
    Replacement("pytorch_adapt.layers.coral_loss", "covariance", "covariance", covariance, _probe_covariance),
    Replacement("pytorch_adapt.layers.coral_loss", "CORALLoss.forward", "coral_loss", coral, _probe_coral),
    Replacement(
        "pytorch_adapt.layers.gradient_reversal",
        "GradientReversal.forward",
        "gradient_reversal",
        gradient_reversal,
        _probe_reversal,
    ),
)
