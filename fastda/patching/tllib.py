"""TLlib: the gradient reversal layers of its DANN, CDAN and MDD, the domain-adversarial loss, CORAL.

The warm start runs again: TLlib's own calls `numpy.float`, which NumPy 1.24 removed. The domain-adversarial loss also
takes batches of unequal sizes, runs under autocast, and keeps its gradient where the classifier is certain.

Left alone: MK-MMD, JAN, MCC and the other losses, for which there is no op; CDAN's and MDD's own losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy
import torch
from torch import Tensor, nn

from .. import ops
from ..reference.reduction import REDUCTIONS
from ..schedules import warm_start_lambda
from .replacement import Replacement, features

KNOWN = "0.4"


def _reversed_copy(x: Tensor, coeff: float) -> Tensor:
    """A copy, as TLlib gives: its discriminators may begin with an in-place ReLU."""
    return ops.gradient_reversal(x, coeff).clone()


def reversal(original, self, *input):
    """Called with features, or with features and λ."""
    if not (len(input) in (1, 2) and isinstance(input[0], Tensor) and features(input[0], dims=input[0].dim())):
        return original(self, *input)
    return _reversed_copy(input[0], *input[1:] or (1.0,))


def warm_start(original, self, input):
    """λ rises with the number of steps; with `auto_step` each call is one, in evaluation too."""
    coeff = warm_start_lambda(self.iter_num, self.alpha, self.lo, self.hi, self.max_iters)
    if self.auto_step:
        self.step()
    return _reversed_copy(input, coeff)


def domain_adversarial(original, self, f_s, f_t, w_s=None, w_t=None):
    """½ (source + target), source is 1; weighted losses are divided by the number of samples, not by their weight.

    The discriminator's sigmoid is taken off, and the loss taken from its logits.
    """
    layers = _before_sigmoid(self.domain_discriminator)
    if not self.sigmoid or layers is None or self.reduction not in REDUCTIONS:
        return original(self, f_s, f_t, w_s, w_t)
    logits = self.grl(torch.cat((f_s, f_t)))
    for layer in layers:
        logits = layer(logits)
    source, target = logits.split([len(f_s), len(f_t)])
    with torch.no_grad():
        correct = (source >= 0).float().mean() + (target < 0).float().mean()
        self.domain_discriminator_accuracy = 50 * correct  # per cent, the mean of both domains
    weights = [w if w is None else w.view_as(x) for w, x in ((w_s, source), (w_t, target))]
    if self.reduction == "mean" and weights != [None, None]:
        weights = [torch.ones_like(x) if w is None else w for w, x in zip(weights, (source, target))]
        weights = [w / len(w) for w in weights]
    elif self.reduction == "mean":
        return ops.domain_adversarial_loss(source, target)
    reduction = "none" if self.reduction == "none" else "sum"
    loss = ops.domain_adversarial_loss(
        source, target, source_weight=weights[0], target_weight=weights[1], reduction=reduction
    )
    return (loss[0] + loss[1] if reduction == "none" else loss) / 2


def _before_sigmoid(module: nn.Module) -> list[nn.Module] | None:
    """The layers before the sigmoid in which a plain sequence of layers ends; None where it is anything else."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.Sigmoid:
        return []
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward or not len(module):
        return None
    *layers, last = module
    rest = _before_sigmoid(last)
    return None if rest is None else [*layers, *rest]


def coral(original, self, f_s, f_t):
    """Mean square of the difference of the covariances, and of the means; TLlib documents another scale."""
    return ops.coral_loss(f_s, f_t, scale="mean", mean_weight=1.0) if features(f_s, f_t) else original(self, f_s, f_t)


@contextmanager
def _numpy_float() -> Iterator[None]:
    """Within the block there is a `numpy.float`, as there was before NumPy 1.24."""
    absent = "float" not in vars(numpy)
    if absent:
        numpy.float = float
    try:
        yield
    finally:
        if absent:
            del numpy.float


def _probe_reversal(function, normal):
    yield function(None, normal(5, 3))
    yield function(None, normal(5, 3), 0.3)


def _probe_warm_start(function, normal):
    layer = SimpleNamespace(alpha=2.0, lo=0.1, hi=0.7, iter_num=300, max_iters=1000.0, auto_step=True)
    layer.step = lambda: setattr(layer, "iter_num", layer.iter_num + 1)
    with _numpy_float():
        yield function(layer, normal(5, 3))
        yield torch.tensor(layer.iter_num)


def _probe_domain_adversarial(function, normal):
    """In float32: TLlib makes its targets in that."""
    from tllib.alignment.dann import DomainAdversarialLoss

    weights = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 0.0, 3.0])
    for reduction in REDUCTIONS:
        loss = DomainAdversarialLoss(nn.Sequential(nn.Flatten(), nn.Sigmoid()), reduction=reduction, grl=nn.Identity())
        yield function(loss, normal(3, 1).float(), normal(3, 1).float())
        yield torch.as_tensor(loss.domain_discriminator_accuracy)
        yield function(loss, normal(3, 1).float(), normal(3, 1).float(), *weights)


def _probe_coral(function, normal):
    yield function(SimpleNamespace(), normal(5, 3), 2 * normal(4, 3))


REPLACEMENTS = (
    Replacement("tllib.modules.grl", "GradientReverseLayer.forward", "gradient_reversal", reversal, _probe_reversal),
    Replacement(
        "tllib.modules.grl", "WarmStartGradientReverseLayer.forward", "gradient_reversal", warm_start, _probe_warm_start
    ),
    Replacement(
        "tllib.alignment.dann",
        "DomainAdversarialLoss.forward",
        "domain_adversarial_loss",
        domain_adversarial,
        _probe_domain_adversarial,
    ),
    Replacement("tllib.alignment.coral", "CorrelationAlignmentLoss.forward", "coral_loss", coral, _probe_coral),
)
