"""Prototypes on the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..backend import eager_core, serve
from ..reference import checks
from ..reference.distributed import all_reduce_sum, check_group
from ..reference.precision import accumulate, no_autocast
from ..reference.prototypes import (
    METRICS,
    REDUCTIONS,
    check_cross_entropy,
    check_distance,
    check_episode,
    check_k,
    check_means,
    check_temperature,
    class_logits,
    class_losses,
    loss_of_parts,
)
from ..reference.reduction import reduce
from .fused import fused
from .specification import specified_by

FLOAT32_MAX = torch.finfo(torch.float32).max
MANY_CLASSES = 256  # from so many on an episode's queries × classes matrix is not held


# The ops: what they compute, and in which shapes


def _gradients_fake(*inputs_and_needs):
    """A gradient in the shape of its input, or of shape (0,) where it is not needed."""
    inputs, needs = inputs_and_needs[: len(inputs_and_needs) // 2], inputs_and_needs[len(inputs_and_needs) // 2 :]
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in zip(inputs, needs))


def _class_means_fake(support, labels, num_classes, empty):
    *batch, _, num_features = support.shape
    return accumulate(support).new_empty(*batch, num_classes, num_features), labels.new_empty(*batch, num_classes)


_class_means = fused(
    "class_means(Tensor support, Tensor labels, SymInt num_classes, str empty) -> (Tensor means, Tensor counts)",
    _class_means_fake,
    "class_means_backward(Tensor grad_means, Tensor support, Tensor labels, Tensor counts, SymInt num_classes,"
    " str empty, bool need_support) -> Tensor grad_support",
    lambda grad_means, support, labels, counts, num_classes, empty, need: support.new_empty(
        support.shape if need else (0,)
    ),
    lambda support, labels, num_classes, empty: reference.class_means(support, labels, num_classes, empty=empty),
)

_pairwise_distance = fused(
    "pairwise_distance(Tensor queries, Tensor prototypes, str metric) -> Tensor distances",
    lambda queries, prototypes, metric: accumulate(queries).new_empty(*queries.shape[:-1], prototypes.shape[-2]),
    "pairwise_distance_backward(Tensor grad_distances, Tensor queries, Tensor prototypes, str metric,"
    " bool need_queries, bool need_prototypes) -> (Tensor grad_queries, Tensor grad_prototypes)",
    lambda grad_distances, queries, prototypes, metric, *needs: _gradients_fake(queries, prototypes, *needs),
    lambda queries, prototypes, metric: reference.pairwise_distance(queries, prototypes, metric=metric),
)


def _softmax_fake(queries, prototypes, temperature, metric, log):
    like, shape = accumulate(queries), queries.shape[:-1]
    return like.new_empty(*shape, prototypes.shape[-2]), like.new_empty(shape), like.new_empty(shape)


def _softmax_formula(queries, prototypes, temperature, metric, log):
    with no_autocast(queries):
        logits, _ = class_logits(queries, prototypes, metric, temperature)
        return logits.log_softmax(-1) if log else logits.softmax(-1)


# largest: of a query's logits; log_sum: of the exponentials of the logits less the largest.
_prototype_softmax = fused(
    "prototype_softmax(Tensor queries, Tensor prototypes, Tensor temperature, str metric, bool log)"
    " -> (Tensor probabilities, Tensor largest, Tensor log_sum)",
    _softmax_fake,
    "prototype_softmax_backward(Tensor grad_probabilities, Tensor queries, Tensor prototypes, Tensor temperature,"
    " Tensor largest, Tensor log_sum, str metric, bool log, bool need_queries, bool need_prototypes,"
    " bool need_temperature) -> (Tensor grad_queries, Tensor grad_prototypes, Tensor grad_temperature)",
    lambda grad_probabilities, queries, prototypes, temperature, largest, log_sum, metric, log, *needs: _gradients_fake(
        queries, prototypes, temperature, *needs
    ),
    _softmax_formula,
)


def _cross_entropy_fake(queries, prototypes, temperature, targets, ignore_index, label_smoothing, metric, reduction):
    like, shape = accumulate(queries), queries.shape[:-1]
    batch = shape[:-1]
    loss = like.new_empty(shape if reduction == "none" else batch)
    return loss, like.new_empty(shape), like.new_empty(shape), targets.new_empty(batch), targets.new_empty(batch)


def _cross_entropy_formula(queries, prototypes, temperature, targets, ignore_index, label_smoothing, metric, reduction):
    losses, kept = class_losses(queries, prototypes, temperature, targets, ignore_index, label_smoothing, metric)
    if reduction == "none":
        return losses
    return losses.sum(-1) / kept.sum(-1) if reduction == "mean" else losses.sum(-1)


# present: how many classes are not empty; kept: how many queries are not ignored.
_prototype_cross_entropy = fused(
    "prototype_cross_entropy(Tensor queries, Tensor prototypes, Tensor temperature, Tensor targets,"
    " SymInt ignore_index, float label_smoothing, str metric, str reduction)"
    " -> (Tensor loss, Tensor largest, Tensor log_sum, Tensor present, Tensor kept)",
    _cross_entropy_fake,
    "prototype_cross_entropy_backward(Tensor grad_loss, Tensor queries, Tensor prototypes, Tensor temperature,"
    " Tensor targets, Tensor largest, Tensor log_sum, Tensor present, Tensor kept, SymInt ignore_index,"
    " float label_smoothing, str metric, str reduction, bool need_queries, bool need_prototypes, bool need_temperature)"
    " -> (Tensor grad_queries, Tensor grad_prototypes, Tensor grad_temperature)",
    lambda grad_loss, queries, prototypes, temperature, *rest: _gradients_fake(
        queries, prototypes, temperature, *rest[-3:]
    ),
    _cross_entropy_formula,
)


def _prototypical_fake(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction):
    like = accumulate(queries)
    *batch, num_queries, num_features = queries.shape
    return (
        like.new_empty(*batch, num_queries) if reduction == "none" else like.new_empty(batch),
        like.new_empty(*batch, num_classes, num_features),
        support_labels.new_empty(*batch, num_classes),
        like.new_empty(*batch, num_queries, num_classes),
        like.new_empty(*batch, num_queries),
        like.new_empty(*batch, num_queries, num_classes, dtype=torch.bool),
    )


def _prototypical_formula(support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction):
    prototypes = reference.class_means(support, support_labels, num_classes)
    with no_autocast(queries):
        logits, _ = class_logits(queries, prototypes, metric, temperature)
        losses = -logits.log_softmax(-1).gather(-1, query_labels.unsqueeze(-1)).squeeze(-1)
        if reduction == "none":
            return losses
        return losses.mean(-1) if reduction == "mean" else losses.sum(-1)


# temperature: one an episode. prototypes: NaN for a class without support. weights: what the difference of a query from
# a prototype (for the cosine: the prototype's direction) is multiplied by in the gradient of the query's loss; slopes:
# the derivative of that loss by the temperature; near: pairs whose gradients are sums of differences, since products of
# centred points would cancel.
_prototypical_loss = fused(
    "prototypical_loss(Tensor support, Tensor queries, Tensor temperature, Tensor support_labels, Tensor query_labels,"
    " SymInt num_classes, str metric, str reduction)"
    " -> (Tensor loss, Tensor prototypes, Tensor counts, Tensor weights, Tensor slopes, Tensor near)",
    _prototypical_fake,
    "prototypical_loss_backward(Tensor grad_loss, Tensor support, Tensor queries, Tensor temperature,"
    " Tensor support_labels, Tensor query_labels, Tensor prototypes, Tensor counts, Tensor weights, Tensor slopes,"
    " Tensor near, SymInt num_classes, str metric, str reduction, bool need_support, bool need_queries,"
    " bool need_temperature)"
    " -> (Tensor grad_support, Tensor grad_queries, Tensor grad_temperature)",
    lambda grad_loss, support, queries, temperature, *rest: _gradients_fake(support, queries, temperature, *rest[-3:]),
    _prototypical_formula,
)


def _nearest_fake(queries, prototypes, k, metric):
    shape = (*queries.shape[:-1], k)
    return accumulate(queries).new_empty(shape), queries.new_empty(shape, dtype=torch.int64)


_nearest_prototype = fused(
    "nearest_prototype(Tensor queries, Tensor prototypes, SymInt k, str metric) -> (Tensor distances, Tensor indices)",
    _nearest_fake,
    "nearest_prototype_backward(Tensor grad_distances, Tensor queries, Tensor prototypes, Tensor indices, SymInt k,"
    " str metric, bool need_queries, bool need_prototypes) -> (Tensor grad_queries, Tensor grad_prototypes)",
    lambda grad_distances, queries, prototypes, indices, k, metric, *needs: _gradients_fake(
        queries, prototypes, *needs
    ),
    lambda queries, prototypes, k, metric: reference.nearest_prototype(queries, prototypes, k=k, metric=metric)[0],
)


# The public functions


def _temperature_of_each(temperature: float | Tensor, queries: Tensor) -> Tensor:
    """One for each batch element, in the dtype that the op accumulates in."""
    batch = queries.shape[:-2]
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).expand(batch)
    if torch.compiler.is_compiling():  # a product: torch.full would be compiled anew for each value
        return torch.ones(batch, dtype=dtype, device=queries.device) * temperature
    largest = torch.finfo(dtype).max  # which does to any distance what a number beyond it would
    return torch.full(batch, min(temperature, largest), dtype=dtype, device=queries.device)


def _is_plain_call(num_classes, metric, temperature, reduction) -> bool:
    """The options of a call that may go straight to the compiled core, which checks the tensors."""
    return (
        type(num_classes) is int
        and 0 < num_classes < MANY_CLASSES
        and type(temperature) in (float, int)
        and 0 < temperature < FLOAT32_MAX
        and type(metric) is str
        and metric in METRICS
        and type(reduction) is str
        and reduction in REDUCTIONS
    )


@specified_by(reference.class_means)
def class_means(support: Tensor, labels: Tensor, num_classes: int, *, empty: str = "nan", process_group=None) -> Tensor:
    labels = check_means(support, labels, num_classes)
    checks.option("empty", empty, ("nan", "zero"))
    if serve("class_means", support) == "reference":
        return reference.class_means(support, labels, num_classes, empty=empty, process_group=process_group)
    num_classes = checks.whole_number("num_classes", num_classes, 1)
    if process_group is None:
        return _class_means(support, labels, num_classes, empty)[0]
    check_group(process_group)
    means, counts = _class_means(support, labels, num_classes, "zero")
    counts = counts.to(means.dtype).unsqueeze(-1)
    sums, counts = all_reduce_sum(means * counts, process_group), all_reduce_sum(counts, process_group)
    return torch.where(counts == 0, torch.nan if empty == "nan" else 0.0, sums / counts.clamp_min(1))


@specified_by(reference.pairwise_distance)
def pairwise_distance(queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    queries, prototypes = check_distance(queries, prototypes, metric)
    if serve("pairwise_distance", queries) == "reference":
        return reference.pairwise_distance(queries, prototypes, metric=metric)
    return _pairwise_distance(queries, prototypes, metric)


@specified_by(reference.nearest_prototype)
def nearest_prototype(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", k: int = 1
) -> tuple[Tensor, Tensor]:
    queries, prototypes = check_distance(queries, prototypes, metric)
    k = check_k(k, prototypes)
    if serve("nearest_prototype", queries) == "reference":
        return reference.nearest_prototype(queries, prototypes, metric=metric, k=k)
    return _nearest_prototype(queries, prototypes, k, metric)


def _softmax(name: str, queries: Tensor, prototypes: Tensor, metric: str, temperature: float | Tensor) -> Tensor:
    queries, prototypes = check_distance(queries, prototypes, metric)
    check_temperature(temperature, queries)
    if serve(name, queries) == "reference":
        return getattr(reference, name)(queries, prototypes, metric=metric, temperature=temperature)
    log = name == "prototype_log_softmax"
    return _prototype_softmax(queries, prototypes, _temperature_of_each(temperature, queries), metric, log)[0]


@specified_by(reference.prototype_log_softmax)
def prototype_log_softmax(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", temperature: float | Tensor = 1.0
) -> Tensor:
    return _softmax("prototype_log_softmax", queries, prototypes, metric, temperature)


@specified_by(reference.prototype_softmax)
def prototype_softmax(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", temperature: float | Tensor = 1.0
) -> Tensor:
    return _softmax("prototype_softmax", queries, prototypes, metric, temperature)


@specified_by(reference.prototype_cross_entropy)
def prototype_cross_entropy(
    queries: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    *,
    metric: str = "sqeuclidean",
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    queries, prototypes, targets = check_cross_entropy(
        queries, prototypes, targets, metric, temperature, ignore_index, label_smoothing, reduction
    )
    if serve("prototype_cross_entropy", queries) == "reference":
        return reference.prototype_cross_entropy(
            queries,
            prototypes,
            targets,
            metric=metric,
            temperature=temperature,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    batched = queries.dim() > 2
    each = "sum" if batched and reduction == "mean" else reduction
    temperature = _temperature_of_each(temperature, queries)
    loss, *_, kept = _prototype_cross_entropy(
        queries, prototypes, temperature, targets, int(ignore_index), float(label_smoothing), metric, each
    )
    if not batched or reduction == "none":
        return loss
    return loss.sum() / kept.sum() if reduction == "mean" else loss.sum()


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
    if process_group is None and _is_plain_call(num_classes, metric, temperature, reduction):
        core = eager_core(queries)
        if core is not None:
            episode = support, support_labels, queries, query_labels
            loss = core.prototypical_loss(*episode, num_classes, metric, temperature, reduction)
            if loss is not None:
                return loss
    options = {"metric": metric, "temperature": temperature, "reduction": reduction, "process_group": process_group}
    support, support_labels, queries, query_labels = check_episode(
        support, support_labels, queries, query_labels, num_classes, metric, temperature, reduction
    )
    if serve("prototypical_loss", queries) == "reference":
        return reference.prototypical_loss(support, support_labels, queries, query_labels, num_classes, **options)
    num_classes = checks.whole_number("num_classes", num_classes, 1)
    if process_group is not None or num_classes >= MANY_CLASSES:
        parts = class_means, prototype_cross_entropy
        return loss_of_parts(*parts, support, support_labels, queries, query_labels, num_classes, **options)
    temperature = _temperature_of_each(temperature, queries)
    loss, *_ = _prototypical_loss(
        support, queries, temperature, support_labels, query_labels, num_classes, metric, reduction
    )
    return reduce(loss, reduction)
