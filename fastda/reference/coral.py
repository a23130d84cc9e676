"""CORAL: the distance between the covariances of two domains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from . import checks
from .covariance import moments
from .distributed import check_group
from .precision import no_autocast
from .reduction import REDUCTIONS, reduce

SCALES = ("paper", "mean", "sum")


def scale_divisor(scale: str, num_features: int) -> int:
    """What the squared Frobenius norm is divided by: 4d², d² or 1."""
    if scale == "sum":
        return 1
    d = max(num_features, 1)  # without features there is no difference to scale
    return 4 * d * d if scale == "paper" else d * d


def check_coral(source, target, correction, scale, mean_weight, reduction) -> tuple[Tensor, Tensor]:
    """All that can be wrong with the arguments, but for the number of samples; the features, in one dtype."""
    source, target = checks.features("(..., samples, features)", source=source, target=target)
    checks.matching("target", target, "source", source)
    checks.whole_number("correction", correction, 0)
    checks.option("scale", scale, SCALES)
    checks.number("mean_weight", mean_weight, least=0)
    checks.option("reduction", reduction, REDUCTIONS)
    return source, target


def coral_loss(
    source: Tensor,
    target: Tensor,
    *,
    correction: int = 1,
    scale: str = "paper",
    mean_weight: float = 0.0,
    reduction: str = "mean",
    process_group=None,
) -> Tensor:
    r"""CORAL loss: how far apart the covariances of source and target features are.

    .. math:: L = s \, \lVert C_s - C_t \rVert_F^2 + \text{mean\_weight} \cdot \tfrac1D \lVert \mu_s - \mu_t \rVert^2

    with the unbiased covariances C (see :func:`fastda.covariance`) and means μ of the two domains. Added to the task
    loss it pulls the domains together: L_total = L_task + α·L. With the paper's scale useful α are 100 to 1000.

    Args:
        source: features of shape `(..., Ns, D)`. float32, float64, bfloat16 or float16.
        target: features of shape `(..., Nt, D)`, with the same batch dimensions. Ns and Nt may differ.
        correction: 1 divides the covariances by N − 1, 0 by N.
        scale: s = 1/(4D²) for "paper", 1/D² for "mean", 1 for "sum". pytorch-adapt, skada and adapt compute "paper";
            TLlib and DomainBed compute `scale="mean", mean_weight=1.0`.
        mean_weight: weight of the mean squared difference of the means; at least 0.
        reduction: over the batch dimensions: "mean", "sum" or "none".
        process_group: a `torch.distributed` group over whose processes the samples are spread: every process gets the
            loss of the whole batch, and gradients whose mean over the processes (what DistributedDataParallel takes) is
            the gradient of one process. Not under torch.func or torch.compile.

    Returns:
        A scalar, or shape `(...)` with `reduction="none"`; float64 for float64 features, else float32.

    Raises:
        TypeError: features that are not floating tensors.
        ValueError: shapes or devices that do not fit, fewer than `correction + 1` samples in a domain, an unknown
            option.

    Differentiable any number of times with respect to both inputs. NaN and Inf propagate. Blind spot: domains whose
    covariances agree while higher moments differ have loss 0.

    Source: Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016.

    Example:
        >>> import torch, fastda
        >>> source = torch.tensor([[2.0, 1.0], [-2.0, -1.0], [0.0, 2.0], [0.0, -2.0]])
        >>> target = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> fastda.coral_loss(source, target)
        tensor(0.9167)
    """
    source, target = check_coral(source, target, correction, scale, mean_weight, reduction)
    if process_group is not None:
        check_group(process_group)
    with no_autocast(source):
        source_moments = moments("source", source, correction, process_group)
        target_moments = moments("target", target, correction, process_group)
        return reduce(distance_of_moments(source_moments, target_moments, scale, mean_weight), reduction)


def distance_of_moments(
    source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], scale: str, mean_weight: float
) -> Tensor:
    """The losses (...) of two domains, each given by its mean (..., D) and covariance (..., D, D)."""
    (source_mean, source_covariance), (target_mean, target_covariance) = source, target
    num_features = source_mean.shape[-1]
    difference = source_covariance - target_covariance
    losses = difference.square().sum((-2, -1)) / scale_divisor(scale, num_features)
    if mean_weight != 0:
        squares = mean_weight * (source_mean - target_mean).square()
        losses = losses + squares.sum(-1) / max(num_features, 1)
    return losses


def deep_coral_loss(
    sources: Sequence[Tensor],
    targets: Sequence[Tensor],
    *,
    weights: Sequence[float | Tensor] | None = None,
    correction: int = 1,
    scale: str = "paper",
    mean_weight: float = 0.0,
    process_group=None,
) -> Tensor:
    r"""CORAL loss over several layers of a network.

    .. math:: L = \sum_l w_l \cdot \text{coral\_loss}(\text{source}_l, \text{target}_l)

    Args:
        sources: source features, one tensor `(..., Ns, D_l)` a layer. Flatten or pool features of more dimensions.
        targets: target features, one tensor `(..., Nt, D_l)` a layer.
        weights: one weight a layer, numbers or scalar tensors (which get a gradient); all 1 by default.
        correction, scale, mean_weight, process_group: as in :func:`fastda.coral_loss`.

    Returns:
        A scalar: the mean over batch dimensions, summed over the layers.

    Raises:
        ValueError: no layer, or lists of different lengths; and what :func:`fastda.coral_loss` raises, the layer named.

    Differentiable any number of times with respect to all features.

    Source: Sun & Saenko, Deep CORAL, ECCV workshops 2016.

    Example:
        >>> import torch, fastda
        >>> layers = [torch.eye(4), torch.eye(4)]
        >>> fastda.deep_coral_loss(layers, [2 * x for x in layers], weights=[1.0, 0.5])
        tensor(0.0703)
    """
    def loss(source: Tensor, target: Tensor) -> Tensor:
        return coral_loss(
            source, target, correction=correction, scale=scale, mean_weight=mean_weight, process_group=process_group
        )

    return sum_layers(each_layer(loss, sources, targets, weights), weights)


def each_layer(call: Callable, sources, targets, weights) -> list:
    """`call(source, target)` for every layer; an error in a layer says which."""
    for name, layers in (("sources", sources), ("targets", targets), ("weights", () if weights is None else weights)):
        if not hasattr(layers, "__len__"):
            raise TypeError(f"{name}: expected a list, one entry a layer, got {checks.describe(layers)}; pass a list")
    if len(sources) == 0 or len(sources) != len(targets):
        raise ValueError(
            f"targets: expected as many layers as sources, at least one; got {len(sources)} sources, "
            f"{len(targets)} targets; pass one pair of features a layer"
        )
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"weights: expected one a layer, {len(sources)}, got {len(weights)}; pass as many as layers")
    results = []
    for layer, (source, target) in enumerate(zip(sources, targets)):
        try:
            results.append(call(source, target))
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {layer}: {error}") from error
    return results


def sum_layers(losses: Sequence[Tensor], weights: Sequence[float | Tensor] | None) -> Tensor:
    """Σ weights[l]·losses[l]."""
    terms = losses if weights is None else [weight * loss for weight, loss in zip(weights, losses)]
    return sum(terms[1:], terms[0])
