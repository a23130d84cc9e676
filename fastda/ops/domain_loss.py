"""The domain-adversarial loss on the fused kernels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..backend import eager_core, serve
from ..reference.domain_loss import check_domain_loss
from ..reference.precision import accumulate
from .fused import fused
from .specification import specified_by


def _fake(source_logits, target_logits, source_weight, target_weight, batch_dims, reduction):
    like, batch = accumulate(source_logits), source_logits.shape[:batch_dims]
    return (
        like.new_empty(batch),
        like.new_empty(source_logits.shape),
        like.new_empty(target_logits.shape),
        like.new_empty((*batch, 2)),
    )


def _backward_fake(grad_loss, *rest):
    tensors, needs = rest[:4], rest[-4:]
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(tensors, needs))


def _formula(source_logits, target_logits, source_weight, target_weight, batch_dims, reduction):
    def domain(logits: Tensor, weight: Tensor) -> Tensor:
        losses = -F.logsigmoid(accumulate(logits)).unsqueeze(-1)
        samples = tuple(range(batch_dims, losses.dim()))
        if weight.shape != logits.shape:
            return losses.sum(samples) if reduction == "sum" else losses.mean(samples) / 2
        weights = weight.to(losses.dtype).unsqueeze(-1)
        total = (weights * losses).sum(samples)
        return total if reduction == "sum" else total / weights.sum(samples) / 2

    return domain(source_logits, source_weight) + domain(-target_logits, target_weight)


# Any shapes of which the first batch_dims are batch. No weight: one without elements, of another shape than its logits.
# Slopes: w·∂l/∂logit; scale: what they are multiplied with, for each domain.
_domain_adversarial_loss = fused(
    "domain_adversarial_loss(Tensor source_logits, Tensor target_logits, Tensor source_weight, Tensor target_weight,"
    " int batch_dims, str reduction) -> (Tensor loss, Tensor source_slope, Tensor target_slope, Tensor scale)",
    _fake,
    "domain_adversarial_loss_backward(Tensor grad_loss, Tensor source_logits, Tensor target_logits,"
    " Tensor source_weight, Tensor target_weight, Tensor source_slope, Tensor target_slope, Tensor scale,"
    " int batch_dims, str reduction,"
    " bool need_source_logits, bool need_target_logits, bool need_source_weight, bool need_target_weight)"
    " -> (Tensor grad_source_logits, Tensor grad_target_logits, Tensor grad_source_weight, Tensor grad_target_weight)",
    _backward_fake,
    _formula,
)


@specified_by(reference.domain_adversarial_loss)
def domain_adversarial_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    core = eager_core(source_logits)
    if core is not None:
        loss = core.domain_adversarial_loss(source_logits, target_logits, source_weight, target_weight, reduction)
        if loss is not None:
            return loss
    source_logits, target_logits = check_domain_loss(
        source_logits, target_logits, source_weight, target_weight, reduction
    )
    if serve("domain_adversarial_loss", source_logits) == "reference" or reduction == "none":
        return reference.domain_adversarial_loss(
            source_logits,
            target_logits,
            source_weight=source_weight,
            target_weight=target_weight,
            reduction=reduction,
        )
    weights = _weight_or_none(source_weight, source_logits), _weight_or_none(target_weight, target_logits)
    loss, *_ = _domain_adversarial_loss(source_logits, target_logits, *weights, 0, reduction)
    return loss


def _weight_or_none(weight: Tensor | None, logits: Tensor) -> Tensor:
    if weight is not None:
        return weight
    return logits.new_empty((0, 0) if logits.dim() == 1 else (0,))
