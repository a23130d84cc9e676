"""The domain classifier's loss in adversarial adaptation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import checks
from .precision import accumulate, no_autocast
from .reduction import REDUCTIONS


def check_domain_loss(source_logits, target_logits, source_weight, target_weight, reduction) -> tuple[Tensor, ...]:
    """The logits in one dtype; weights that have the shape of their logits."""
    for name, logits in (("source_logits", source_logits), ("target_logits", target_logits)):
        checks.floating(name, logits)
    source_logits, target_logits = checks.same_dtype(source_logits=source_logits, target_logits=target_logits)
    for name, weight, of, logits in (
        ("source_weight", source_weight, "source_logits", source_logits),
        ("target_weight", target_weight, "target_logits", target_logits),
    ):
        if weight is None:
            continue
        checks.floating(name, weight)
        if weight.shape != logits.shape or weight.device != logits.device:
            raise ValueError(
                f"{name}: expected one weight a logit, the shape and device of {of}, {checks.describe(logits)}; "
                f"got {checks.describe(weight)}"
            )
    checks.option("reduction", reduction, REDUCTIONS)
    return source_logits, target_logits


def domain_adversarial_loss(
    source_logits: Tensor,
    target_logits: Tensor,
    *,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Binary cross-entropy of a domain classifier from its logits; source is 1, target is 0.

    .. math:: L = \tfrac12 \left( \frac{\sum_i w_i \log(1 + e^{-s_i})}{\sum_i w_i}
                  + \frac{\sum_j v_j \log(1 + e^{t_j})}{\sum_j v_j} \right)

    The objective of DANN is L_y − λ·L_d, the minus sign being the gradient reversal between features and classifier.

    Args:
        source_logits: domain logits s of the source samples, any shape, each element one logit. float32, float64,
            bfloat16 or float16.
        target_logits: domain logits t of the target samples, any shape; sizes may differ.
        source_weight: weights w in the shape of `source_logits`, all 1 by default.
        target_weight: weights v in the shape of `target_logits`, all 1 by default.
        reduction: "mean" is L; "sum" the sum of all weighted losses, without the ½; "none" the pair of weighted losses,
            each in the shape of its logits.

    Returns:
        A scalar, or the pair for "none"; float64 for float64 logits, else float32.

    Raises:
        TypeError: logits or weights that are not floating tensors.
        ValueError: weights that do not fit their logits, another device, an unknown reduction.

    Differentiable any number of times with respect to logits and weights; exact, and with a gradient, for logits of any
    size. No samples in a domain: NaN for "mean". NaN propagates.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch, fastda
        >>> fastda.domain_adversarial_loss(torch.tensor([0.0, 2.0]), torch.tensor([-1.0]))
        tensor(0.3616)
    """
    source_logits, target_logits = check_domain_loss(
        source_logits, target_logits, source_weight, target_weight, reduction
    )
    with no_autocast(source_logits):
        source_loss = -F.logsigmoid(accumulate(source_logits))
        target_loss = -F.logsigmoid(-accumulate(target_logits))
        if source_weight is not None:
            source_weight = source_weight.to(source_loss.dtype)
            source_loss = source_weight * source_loss
        if target_weight is not None:
            target_weight = target_weight.to(target_loss.dtype)
            target_loss = target_weight * target_loss
        if reduction == "none":
            return source_loss, target_loss
        if reduction == "sum":
            return source_loss.sum() + target_loss.sum()
        source_mean = source_loss.mean() if source_weight is None else source_loss.sum() / source_weight.sum()
        target_mean = target_loss.mean() if target_weight is None else target_loss.sum() / target_weight.sum()
        return (source_mean + target_mean) / 2
