"""Prototypes: class means, distances to them, and the softmax over the classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .distributed import all_reduce_sum, check_group
from .precision import accumulate, no_autocast
from .reduction import REDUCTIONS, reduce

METRICS = ("sqeuclidean", "euclidean", "cosine")
CHUNK = 2**25  # elements of a tensor of differences held at a time


# Arguments


def check_distance(queries: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Features that fit each other, in one dtype."""
    checks.option("metric", metric, METRICS)
    (queries,) = checks.features("(..., queries, features)", queries=queries)
    (prototypes,) = checks.features("(..., classes, features)", prototypes=prototypes)
    queries, prototypes = checks.same_dtype(queries=queries, prototypes=prototypes)
    checks.matching("prototypes", prototypes, "queries", queries)
    return queries, prototypes


def check_temperature(temperature: float | Tensor, like: Tensor) -> None:
    """A number > 0, or a zero-dimensional tensor (whose value is not read: that would synchronise)."""
    if isinstance(temperature, Tensor):
        checks.scalar_tensor("temperature", temperature, ((),), like)
    else:
        checks.number("temperature", temperature, above=0)


def check_means(support, labels, num_classes) -> Tensor:
    """Support features with one integer label each; the labels as int64."""
    checks.features("(..., support samples, features)", support=support)
    checks.whole_number("num_classes", num_classes, 1)
    return checks.labels("labels", labels, support.shape[:-1], "support", support)


def labels_in_range(name: str, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor | None]:
    """Labels that can index, and which of them were valid.

    On the CPU a label out of range is an IndexError (None is returned: all are valid). Elsewhere reading the labels
    would synchronise, so they are replaced by 0 and it is the caller's part to make their results NaN.
    """
    if labels.device.type != "cpu":
        valid = (labels >= 0) & (labels < num_classes)
        return torch.where(valid, labels, 0), valid
    classes = torch.arange(num_classes, device=labels.device)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return classes.index_select(0, labels.reshape(-1)).view(labels.shape), None
    try:
        return classes.index_select(0, labels.reshape(-1)).view(labels.shape), None
    except IndexError:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        known, cure = ("prototypes", "add prototypes") if name == "targets" else ("num_classes", "raise num_classes")
        raise IndexError(
            f"{name}: expected labels in 0 ... {num_classes - 1} ({known} - 1), got {int(wrong[0])}; "
            f"relabel the classes or {cure}"
        ) from None


# Class means


def class_means(support: Tensor, labels: Tensor, num_classes: int, *, empty: str = "nan", process_group=None) -> Tensor:
    r"""Prototypes: the mean of the support samples of each class.

    .. math:: p_c = \frac{1}{|S_c|} \sum_{s \in S_c} x_s, \qquad S_c = \{ s : \text{label}_s = c \}

    Args:
        support: features of shape `(..., S, D)`. float32, float64, bfloat16 or float16.
        labels: integers of shape `(..., S)`, from 0 to `num_classes − 1`. Classes may be unbalanced, in any order.
        num_classes: C; never read from the labels, which would synchronise.
        empty: the prototype of a class without support: "nan" (which the other ops recognise and leave out) or "zero".
        process_group: a `torch.distributed` group over whose processes the support is spread; every process gets the
            means of the whole. Not under torch.func or torch.compile.

    Returns:
        `(..., C, D)`; float64 for float64 features, else float32.

    Raises:
        TypeError: features that are not floating, labels that are not integers.
        ValueError: shapes or devices that do not fit, an unknown option.
        IndexError: a label out of range, on the CPU. On a GPU the means of that batch element are NaN.

    Differentiable any number of times with respect to `support`.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    Example:
        >>> import torch, fastda
        >>> support = torch.tensor([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0]])
        >>> fastda.class_means(support, torch.tensor([0, 0, 1]), num_classes=3)
        tensor([[1., 2.],
                [5., 5.],
                [nan, nan]])
    """
    labels = check_means(support, labels, num_classes)
    checks.option("empty", empty, ("nan", "zero"))
    if process_group is not None:
        check_group(process_group)
    labels, valid = labels_in_range("labels", labels, num_classes)
    with no_autocast(support):
        x = accumulate(support)
        sums = x.new_zeros(*x.shape[:-2], num_classes, x.shape[-1])
        sums = sums.scatter_add(-2, labels.unsqueeze(-1).expand(x.shape), x)
        counts = x.new_zeros(*x.shape[:-2], num_classes).scatter_add(-1, labels, torch.ones_like(labels, dtype=x.dtype))
        if process_group is not None:
            sums, counts = all_reduce_sum(sums, process_group), all_reduce_sum(counts, process_group)
        is_empty = (counts == 0).unsqueeze(-1)
        means = sums / counts.unsqueeze(-1).clamp_min(1)
        means = torch.where(is_empty, math.nan if empty == "nan" else 0.0, means)
        if valid is not None:
            means = torch.where(valid.all(-1)[..., None, None], means, math.nan)
        return means


# Distances


def empty_classes(prototypes: Tensor) -> Tensor:
    """Which prototypes are NaN in all components: (..., C)."""
    if prototypes.shape[-1] == 0:
        return torch.zeros(prototypes.shape[:-1], dtype=torch.bool, device=prototypes.device)
    return prototypes.isnan().all(-1)


def _squared_distances(queries: Tensor, prototypes: Tensor) -> Tensor:
    """Σ(q − p)², in chunks of classes: exact where ‖q‖² − 2q·p + ‖p‖² would cancel."""
    chunk = max(1, CHUNK // max(1, queries.numel()))
    if prototypes.shape[-2] <= chunk:
        return (queries.unsqueeze(-2) - prototypes.unsqueeze(-3)).square().sum(-1)
    parts = prototypes.split(chunk, -2)
    return torch.cat([_squared_distances(queries, part) for part in parts], -1)


def _directions(x: Tensor) -> Tensor:
    """x/‖x‖, with 0 for the zero vector and no gradient there."""
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(*x.shape[:-1], 1)
    is_zero = largest == 0
    x = x / torch.where(is_zero, 1.0, largest)  # neither overflows nor underflows when squared
    norm = torch.where(is_zero, 1.0, x.square().sum(-1, keepdim=True)).sqrt()
    return torch.where(is_zero, 0.0, x / norm)


def _distances(queries: Tensor, prototypes: Tensor, metric: str) -> Tensor:
    if metric == "cosine":
        similarity = _directions(queries) @ _directions(prototypes).mT
        return (1 - similarity).clamp(0, 2)
    squared = _squared_distances(queries, prototypes)
    if metric == "sqeuclidean":
        return squared
    is_zero = squared == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squared).sqrt())  # the gradient at 0 is 0, not NaN


def _distances_and_empty(queries: Tensor, prototypes: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Distances (any finite value for an empty class), and which classes are empty: (..., 1, C)."""
    queries, prototypes = accumulate(queries), accumulate(prototypes)
    is_empty = empty_classes(prototypes)
    prototypes = torch.where(is_empty.unsqueeze(-1), 0.0, prototypes)  # its NaN must not reach any gradient
    return _distances(queries, prototypes, metric), is_empty.unsqueeze(-2)


def pairwise_distance(queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    r"""Distance from each query to each prototype.

    "sqeuclidean" is ‖q − p‖², "euclidean" its square root, "cosine" 1 − q·p / (‖q‖‖p‖), in [0, 2].

    Args:
        queries: features of shape `(..., Q, D)`. float32, float64, bfloat16 or float16.
        prototypes: `(..., C, D)`, with the same batch dimensions.
        metric: "sqeuclidean", "euclidean" or "cosine". Peers disagree: easyfsl's Euclidean logits are −√, those of
            learn2learn, LibFewShot, torchmeta and the paper −‖·‖².

    Returns:
        `(..., Q, C)`; float64 for float64 features, else float32. The distance to an empty class (a prototype that is
        NaN in all components) is NaN and gives no gradient.

    Raises:
        TypeError: features that are not floating tensors.
        ValueError: shapes or devices that do not fit, an unknown metric.

    Differentiable any number of times with respect to both inputs; a second derivative holds all differences,
    `(..., Q, C, D)`. Equal points are at distance 0, with gradient 0; for the cosine but for rounding, as 1 − cos is
    exact to the last digits of 1: points near each other and far from zero are told apart by "euclidean". The cosine
    similarity to a zero vector is 0, with gradient 0. NaN and Inf propagate; the gradient of an infinite feature, here
    infinite where all its terms have one sign, may be NaN from fused kernels.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017, who compare the squared
    Euclidean distance and the cosine.

    Example:
        >>> import torch, fastda
        >>> fastda.pairwise_distance(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        tensor([[25.,  1.]])
    """
    queries, prototypes = check_distance(queries, prototypes, metric)
    with no_autocast(queries):
        distances, is_empty = _distances_and_empty(queries, prototypes, metric)
        return torch.where(is_empty, math.nan, distances)


def nearest_prototype(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", k: int = 1
) -> tuple[Tensor, Tensor]:
    r"""The k nearest prototypes of each query, nearest first; ties go to the lower index.

    .. math:: i_{q1}, \ldots, i_{qk} = \text{the classes } c \text{ of the smallest } d(q, p_c)

    Args:
        queries: features of shape `(..., Q, D)`. float32, float64, bfloat16 or float16.
        prototypes: `(..., C, D)`, with the same batch dimensions.
        metric: as in :func:`fastda.pairwise_distance`.
        k: how many, at most C.

    Returns:
        distances `(..., Q, k)`, float64 for float64 features, else float32, and indices `(..., Q, k)` (int64). Empty
        classes (NaN in all components) come last, at distance NaN.

    Raises:
        TypeError: features that are not floating tensors.
        ValueError: shapes or devices that do not fit, an unknown metric, `k` below 1 or above C.

    The distances are differentiable any number of times with respect to both inputs.

    Source: Mensink, Verbeek, Perronnin & Csurka, Metric Learning for Large Scale Image Classification, ECCV 2012 (the
    nearest class mean).

    Example:
        >>> import torch, fastda
        >>> prototypes = torch.tensor([[0.0], [1.0], [5.0]])
        >>> distances, indices = fastda.nearest_prototype(torch.tensor([[0.9]]), prototypes, k=2)
        >>> indices
        tensor([[1, 0]])
    """
    queries, prototypes = check_distance(queries, prototypes, metric)
    check_k(k, prototypes)
    with no_autocast(queries):
        distances, is_empty = _distances_and_empty(queries, prototypes, metric)
        distances = torch.where(is_empty, math.nan, distances)
        order = distances.detach().sort(dim=-1, stable=True).indices  # NaN sorts last
        order = order.gather(
            -1, is_empty.expand_as(order).gather(-1, order).to(torch.uint8).sort(dim=-1, stable=True).indices
        )
        indices = order[..., :k].contiguous()
        return distances.gather(-1, indices), indices


def check_k(k: int, prototypes: Tensor) -> int:
    k = checks.whole_number("k", k, 1)
    if k > prototypes.shape[-2]:
        raise ValueError(
            f"k: expected at most the number of prototypes, {prototypes.shape[-2]}, got {k}; ask for fewer"
        )
    return k


# Softmax and losses


def class_logits(
    queries: Tensor, prototypes: Tensor, metric: str, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """−d/T, −Inf for an empty class; and which classes are empty. A tensor T has one value, or one a batch element."""
    distances, is_empty = _distances_and_empty(queries, prototypes, metric)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(distances.dtype)[..., None, None]
    return torch.where(is_empty, -math.inf, -distances / temperature), is_empty


def prototype_log_softmax(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Log-probabilities of the classes of each query.

    .. math:: \log p_{qc} = \ell_{qc} - \log \sum_{c'} e^{\ell_{qc'}}, \qquad \ell_{qc} = -d(q, p_c) / T

    Args:
        queries: features of shape `(..., Q, D)`. float32, float64, bfloat16 or float16.
        prototypes: `(..., C, D)`, with the same batch dimensions.
        metric: as in :func:`fastda.pairwise_distance`.
        temperature: T, a number > 0, or a zero-dimensional tensor, which gets a gradient. (easyfsl multiplies by it.)

    Returns:
        `(..., Q, C)`; float64 for float64 features, else float32. An empty class (NaN in all components) has −Inf.

    Raises:
        TypeError: features that are not floating tensors.
        ValueError: shapes or devices that do not fit, an unknown metric, a temperature that is not positive.

    Differentiable any number of times with respect to queries, prototypes and temperature.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    Example:
        >>> import torch, fastda
        >>> fastda.prototype_log_softmax(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[-0.3133, -1.3133]])
    """
    queries, prototypes = check_distance(queries, prototypes, metric)
    check_temperature(temperature, queries)
    with no_autocast(queries):
        logits, _ = class_logits(queries, prototypes, metric, temperature)
        return logits.log_softmax(-1)


def prototype_softmax(
    queries: Tensor, prototypes: Tensor, *, metric: str = "sqeuclidean", temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Probabilities of the classes of each query: the exponential of :func:`fastda.prototype_log_softmax`.

    .. math:: p_{qc} = e^{\ell_{qc}} / \sum_{c'} e^{\ell_{qc'}}, \qquad \ell_{qc} = -d(q, p_c) / T

    Arguments, errors and differentiability are the same, and so are shapes, dtypes and source. An empty class has
    probability 0.

    Example:
        >>> import torch, fastda
        >>> fastda.prototype_softmax(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]]))
        tensor([[0.7311, 0.2689]])
    """
    queries, prototypes = check_distance(queries, prototypes, metric)
    check_temperature(temperature, queries)
    with no_autocast(queries):
        logits, _ = class_logits(queries, prototypes, metric, temperature)
        return logits.softmax(-1)


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
    r"""Cross-entropy of queries against prototypes, as `torch.nn.functional.cross_entropy` on the logits −d/T.

    .. math:: L_q = -(1 - \varepsilon) \log p_{q y_q} - \frac{\varepsilon}{C} \sum_c \log p_{qc}

    Args:
        queries: features of shape `(..., Q, D)`. float32, float64, bfloat16 or float16.
        prototypes: `(..., C, D)`, with the same batch dimensions.
        targets: the class y of each query, integers of shape `(..., Q)`, from 0 to C − 1 or `ignore_index`.
        metric, temperature: as in :func:`fastda.prototype_log_softmax`.
        ignore_index: queries with this target count for nothing: loss 0, and not part of the mean.
        label_smoothing: ε in [0, 1], spread over the classes that are not empty.
        reduction: "mean" over all queries of all batches that are not ignored (none left: NaN), "sum" or "none".

    Returns:
        A scalar, or `(..., Q)` for "none"; float64 for float64 features, else float32. A target on an empty class has
        loss +Inf.

    Raises:
        TypeError: features that are not floating tensors, targets that are not integers.
        ValueError: shapes or devices that do not fit, an unknown option, numbers out of their bounds.
        IndexError: a target out of range, on the CPU. On a GPU that query's loss is NaN.

    Differentiable any number of times with respect to queries, prototypes and temperature. Of many classes nothing of
    the size Q × C is held, forward or backward; features in half precision, and a graph that is kept, hold one more
    gradient of the prototypes, in float32. A second derivative is the formula's, which holds `(..., Q, C, D)`.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    Example:
        >>> import torch, fastda
        >>> queries, prototypes = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> fastda.prototype_cross_entropy(queries, prototypes, torch.tensor([0, 1]))
        tensor(0.3133)
    """
    queries, prototypes, targets = check_cross_entropy(
        queries, prototypes, targets, metric, temperature, ignore_index, label_smoothing, reduction
    )
    losses, kept = class_losses(queries, prototypes, temperature, targets, ignore_index, label_smoothing, metric)
    if reduction == "mean":
        return losses.sum() / kept.sum()
    return reduce(losses, reduction)


def check_cross_entropy(
    queries, prototypes, targets, metric, temperature, ignore_index, label_smoothing, reduction
) -> tuple[Tensor, Tensor, Tensor]:
    """All that can be wrong, but for the targets' values; features in one dtype, targets as int64."""
    queries, prototypes = check_distance(queries, prototypes, metric)
    check_temperature(temperature, queries)
    targets = checks.labels("targets", targets, queries.shape[:-1], "queries", queries)
    checks.whole_number("ignore_index", ignore_index, -(2**63))
    checks.number("label_smoothing", label_smoothing, least=0, most=1)
    checks.option("reduction", reduction, REDUCTIONS)
    return queries, prototypes, targets


def class_losses(
    queries: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each query, and which of them are not ignored."""
    kept = targets != ignore_index
    targets, valid = labels_in_range("targets", torch.where(kept, targets, 0), prototypes.shape[-2])
    with no_autocast(queries):
        logits, is_empty = class_logits(queries, prototypes, metric, temperature)
        log_probabilities = logits.log_softmax(-1)
        losses = -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if label_smoothing != 0:
            others = torch.where(is_empty, 0.0, log_probabilities).sum(-1) / (~is_empty).sum(-1)
            losses = (1 - label_smoothing) * losses - label_smoothing * others
        losses = torch.where(kept, losses, 0.0)
        if valid is not None:
            losses = torch.where(valid, losses, math.nan)
        return losses, kept


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
    r"""The loss of a prototypical network on a batch of episodes.

    Class means of the support (:func:`fastda.class_means`), distances of the queries to them, softmax over the classes,
    cross-entropy (:func:`fastda.prototype_cross_entropy`).

    .. math:: p_c = \frac{1}{n_c} \sum_{s: y_s = c} x_s, \qquad
        L = -\frac{1}{Q} \sum_q \log \frac{e^{-d(q, p_{y_q}) / T}}{\sum_c e^{-d(q, p_c) / T}}

    Args:
        support: features of shape `(..., S, D)`. float32, float64, bfloat16 or float16.
        support_labels: integers of shape `(..., S)`, from 0 to `num_classes − 1`.
        queries: features of shape `(..., Q, D)`, with the same batch dimensions.
        query_labels: integers of shape `(..., Q)`, from 0 to `num_classes − 1`.
        num_classes: C, the N of an N-way episode. A class without support is left out; a query of it has loss +Inf.
        metric, temperature: as in :func:`fastda.prototype_log_softmax`.
        reduction: "mean" over all queries of all episodes, "sum" or "none".
        process_group: a `torch.distributed` group over whose processes support and queries are spread: means and loss
            are those of the whole, and the mean of the gradients over the processes (what DistributedDataParallel
            takes) is the gradient of one process. Not under torch.func or torch.compile.

    Returns:
        A scalar, or `(..., Q)` for "none" (this process's queries); float64 for float64 features, else float32.

    Raises:
        TypeError: features that are not floating tensors, labels that are not integers.
        ValueError: shapes or devices that do not fit, an unknown option, a temperature that is not positive.
        IndexError: a label out of range, on the CPU. On a GPU: a query label makes that query's loss NaN, a
            support label all losses of its episode.

    Differentiable any number of times with respect to support, queries and temperature.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017.

    Example: one two-way one-shot episode
        >>> import torch, fastda
        >>> support, queries = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.1], [0.8]])
        >>> labels = torch.tensor([0, 1])
        >>> fastda.prototypical_loss(support, labels, queries, labels, num_classes=2)
        tensor(0.4043)
    """
    support, support_labels, queries, query_labels = check_episode(
        support, support_labels, queries, query_labels, num_classes, metric, temperature, reduction
    )
    return loss_of_parts(
        class_means,
        prototype_cross_entropy,
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


def loss_of_parts(
    class_means: Callable,
    prototype_cross_entropy: Callable,
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    metric: str,
    temperature: float | Tensor,
    reduction: str,
    process_group,
) -> Tensor:
    """The prototypical loss by way of the two ops it is made of, the reference's or the fused ones."""
    support_labels, support_valid = labels_in_range("support_labels", support_labels, num_classes)
    query_labels, query_valid = labels_in_range("query_labels", query_labels, num_classes)
    prototypes = class_means(support, support_labels, num_classes, process_group=process_group)
    losses = prototype_cross_entropy(
        queries, prototypes, query_labels, metric=metric, temperature=temperature, ignore_index=-1, reduction="none"
    )
    if support_valid is not None:
        valid = support_valid.all(-1, keepdim=True) & query_valid
        losses = torch.where(valid, losses, math.nan)
    if process_group is None or reduction == "none":
        return reduce(losses, reduction)
    total = all_reduce_sum(losses.sum(), process_group)
    return total if reduction == "sum" else total / all_reduce_sum(losses.new_tensor(losses.numel()), process_group)


def check_episode(
    support, support_labels, queries, query_labels, num_classes, metric, temperature, reduction
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that can be wrong with an episode, but for label values; features in one dtype, labels as int64."""
    checks.option("metric", metric, METRICS)
    (support,) = checks.features("(..., support samples, features)", support=support)
    (queries,) = checks.features("(..., queries, features)", queries=queries)
    support, queries = checks.same_dtype(support=support, queries=queries)
    checks.matching("queries", queries, "support", support)
    checks.whole_number("num_classes", num_classes, 1)
    support_labels = checks.labels("support_labels", support_labels, support.shape[:-1], "support", support)
    query_labels = checks.labels("query_labels", query_labels, queries.shape[:-1], "queries", queries)
    check_temperature(temperature, queries)
    checks.option("reduction", reduction, REDUCTIONS)
    return support, support_labels, queries, query_labels
