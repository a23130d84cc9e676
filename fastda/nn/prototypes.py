"""The loss of prototypical networks as a Module."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import prototypical_loss
from ..reference import checks
from ..reference.prototypes import METRICS
from ..reference.reduction import REDUCTIONS


class PrototypicalLoss(nn.Module):
    r"""The loss of a prototypical network on a batch of episodes; :func:`fastda.prototypical_loss` as a Module.

    Args:
        num_classes: C, the N of an N-way episode.
        metric, reduction, process_group: as in :func:`fastda.prototypical_loss`.
        temperature: a number above 0, or an `nn.Parameter` of shape (), to learn it.

    Shape:
        Support `(..., S, D)` with labels `(..., S)`, queries `(..., Q, D)` with labels `(..., Q)`; float32, float64,
        bfloat16 or float16, and integers. The loss is a scalar, or `(..., Q)` with `reduction="none"`.

    Raises:
        TypeError, ValueError: an argument of another kind or out of its bounds; at the call, what
            :func:`fastda.prototypical_loss` raises.

    Differentiable any number of times with respect to support, queries and temperature.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    Example:
        >>> import torch
        >>> from fastda.nn import PrototypicalLoss
        >>> features, labels = torch.nn.Linear(8, 4), torch.arange(5)
        >>> loss = PrototypicalLoss(num_classes=5)
        >>> loss(features(torch.randn(5, 8)), labels, features(torch.randn(5, 8)), labels).backward()
    """

    def __init__(
        self,
        num_classes: int,
        *,
        metric: str = "sqeuclidean",
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        process_group=None,
    ) -> None:
        super().__init__()
        self.num_classes = checks.whole_number("num_classes", num_classes, 1)
        self.metric = checks.option("metric", metric, METRICS)
        self.reduction, self.process_group = checks.option("reduction", reduction, REDUCTIONS), process_group
        if not isinstance(temperature, Tensor):
            checks.number("temperature", temperature, above=0)
        self.temperature = temperature

    def forward(self, support: Tensor, support_labels: Tensor, queries: Tensor, query_labels: Tensor) -> Tensor:
        return prototypical_loss(
            support,
            support_labels,
            queries,
            query_labels,
            self.num_classes,
            metric=self.metric,
            temperature=self.temperature,
            reduction=self.reduction,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, metric={self.metric!r}"
