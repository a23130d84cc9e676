"""Prototypes on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import serve
from ..reference.checks import whole_number
from ..reference.precision import accumulate, no_autocast
from ..reference.prototypes import check_episode, class_logits
from ..reference.reduction import reduce
from .fused import fused
from .specification import specified_by


def _prototypical_fake(support, queries, temperature, support_labels, query_labels, num_classes, metric):
    like = accumulate(queries)
    *batch, num_queries, num_features = queries.shape
    return (
        like.new_empty(*batch, num_queries),
        like.new_empty(*batch, num_classes, num_features),
        like.new_empty(*batch, num_queries, num_classes),
    )


def _prototypical_backward_fake(grad_losses, support, queries, temperature, *rest):
    *_, need_support, need_queries, need_temperature = rest
    return (
        support.new_empty(support.shape if need_support else (0,)),
        queries.new_empty(queries.shape if need_queries else (0,)),
        temperature.new_empty(temperature.shape if need_temperature else (0,)),
    )


def _prototypical_formula(support, queries, temperature, support_labels, query_labels, num_classes, metric):
    prototypes = reference.class_means(support, support_labels, num_classes)
    with no_autocast(queries):
        logits, _ = class_logits(queries, prototypes, metric, temperature)
        return -logits.log_softmax(-1).gather(-1, query_labels.unsqueeze(-1)).squeeze(-1)


# temperature: one an episode. prototypes: NaN for a class without support.
_prototypical_loss = fused(
    "prototypical_loss(Tensor support, Tensor queries, Tensor temperature, Tensor support_labels, Tensor query_labels,"
    " SymInt num_classes, str metric) -> (Tensor losses, Tensor prototypes, Tensor distances)",
    _prototypical_fake,
    "prototypical_loss_backward(Tensor grad_losses, Tensor support, Tensor queries, Tensor temperature, Tensor support_labels,"
    " Tensor query_labels, Tensor prototypes, Tensor distances, SymInt num_classes, str metric,"
    " bool need_support, bool need_queries, bool need_temperature)"
    " -> (Tensor grad_support, Tensor grad_queries, Tensor grad_temperature)",
    _prototypical_backward_fake,
    _prototypical_formula,
)


@specified_by(reference.prototypical_loss)
def prototypical_loss(
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    process_group=None,
) -> Tensor:
    if serve("prototypical_loss", queries) == "reference" or process_group is not None:
        return reference.prototypical_loss(
            support,
            support_labels,
            queries,
            query_labels,
            num_classes,
            metric=metric,
            temperature=temperature,
            reduction=reduction,
            process_group=process_group,
        )
    support, support_labels, queries, query_labels = check_episode(
        support, support_labels, queries, query_labels, num_classes, metric, temperature, reduction
    )
    num_classes = whole_number("num_classes", num_classes, 1)
    batch, dtype = queries.shape[:-2], accumulate(queries.new_empty(0)).dtype
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).expand(batch)
    else:
        # A product: torch.full makes torch.compile compile anew for each value.
        temperature = torch.ones(batch, dtype=dtype, device=queries.device) * temperature
    losses, *_ = _prototypical_loss(support, queries, temperature, support_labels, query_labels, num_classes, metric)
    return reduce(losses, reduction)
