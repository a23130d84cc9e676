"""The domain-adversarial loss as a Module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import domain_adversarial_loss
from ..reference import checks
from ..reference.reduction import REDUCTIONS


class DomainAdversarialLoss(nn.Module):
    r"""Binary cross-entropy of a domain classifier's logits; :func:`fastda.domain_adversarial_loss` as a Module.

    Source is 1, target 0; the loss is half the mean over the source and half that over the target. The logits come from
    features whose gradient is reversed: :class:`fastda.nn.GradientReversal`, :class:`fastda.nn.DomainDiscriminator`.

    Args:
        reduction: as in :func:`fastda.domain_adversarial_loss`.

    Shape:
        Source and target logits of any shapes, every element one sample, float32, float64, bfloat16 or float16; weights
        of the logits' shapes. The loss is a scalar, or with `reduction="none"` one loss a logit, as a pair.

    Raises:
        ValueError: an unknown `reduction`; at the call, what :func:`fastda.domain_adversarial_loss` raises.

    Differentiable any number of times.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch
        >>> from fastda.nn import DomainAdversarialLoss, DomainDiscriminator
        >>> discriminator, loss = DomainDiscriminator(8), DomainAdversarialLoss()
        >>> features, logits = discriminator.fork(torch.randn(20, 8, requires_grad=True), lambd=0.3)
        >>> loss(logits[:12], logits[12:]).backward()
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = checks.option("reduction", reduction, REDUCTIONS)

    def forward(
        self,
        source_logits: Tensor,
        target_logits: Tensor,
        source_weight: Tensor | None = None,
        target_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        return domain_adversarial_loss(
            source_logits,
            target_logits,
            source_weight=source_weight,
            target_weight=target_weight,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
