"""Learning rates that fall from the top layer to the lowest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..reference import checks
from .layers import Layer, find_layers


def layerwise_lr_decay(
    model: nn.Module,
    lr: float,
    decay: float,
    *,
    weight_decay: float | None = None,
    layers: Sequence[str | Sequence[str]] | None = None,
) -> list[dict]:
    r"""Parameter groups in which lower layers learn more slowly: the general is kept, the specific is relearnt.

    .. math:: \eta_l = \eta \, \gamma^{L - l}, \qquad l = 1 \ldots L

    The top layer L has the full rate. Layers are what :func:`fastda.finetuning.find_layers` finds, frozen ones
    included.

    The rate is each group's own `lr`, so that it takes effect with any optimiser and is multiplied by any scheduler.
    Schedulers that set rates rather than multiply them (OneCycleLR, CyclicLR) take a list: `max_lr=[group["lr"] for
    group in groups]`.

    Args:
        model: any module.
        lr: η, the rate of the top layer; above 0.
        decay: γ, in (0, 1].
        weight_decay: that of matrices and kernels, None for the optimiser's own. Biases and parameters of one dimension
            or fewer (norms) have none.
        layers: names of the layers, lowest first; see :func:`fastda.finetuning.find_layers`.

    Returns:
        Groups for any torch optimiser, lowest layer first, each with `params`, `lr`, `name` (the layer's); every
        parameter of the model is in one of them.

    Raises:
        TypeError: `lr` or `decay` is not a number.
        ValueError: `lr` or `decay` out of range; layers that cannot be told apart (says how to name them).

    Source: Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018 (discriminative
    fine-tuning); Clark et al., ELECTRA, ICLR 2020 (one factor a layer).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.finetuning import layerwise_lr_decay
        >>> model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
        >>> optimizer = torch.optim.AdamW(layerwise_lr_decay(model, lr=0.001, decay=0.3))
        >>> [f"{group['lr']:.7f}" for group in optimizer.param_groups]
        ['0.0000081', '0.0000270', '0.0000900', '0.0003000', '0.0010000']
    """
    check_rates(lr, decay, weight_decay)
    found = find_layers(model, layers)
    return [
        group
        for depth, layer in enumerate(reversed(found))
        for group in layer_groups(layer, lr * decay**depth, weight_decay)
    ][::-1]


def check_rates(lr: float, decay: float, weight_decay: float | None) -> None:
    checks.number("lr", lr, above=0)
    checks.number("decay", decay, above=0, most=1)
    if weight_decay is not None:
        checks.number("weight_decay", weight_decay, least=0)


def layer_groups(layer: Layer, lr: float, weight_decay: float | None) -> list[dict]:
    """One group for the layer's matrices, one, without weight decay, for its vectors and biases."""
    with_decay = [p for name, p in layer.parameters.items() if decays(name, p)]
    without_decay = [p for name, p in layer.parameters.items() if not decays(name, p)]
    groups = []
    if without_decay:
        groups.append({"params": without_decay, "lr": lr, "name": layer.name, "weight_decay": 0.0})
    if with_decay:
        own = {} if weight_decay is None else {"weight_decay": weight_decay}
        groups.append({"params": with_decay, "lr": lr, "name": layer.name, **own})
    return groups


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for this parameter."""
    return parameter.dim() > 1 and name.rpartition(".")[2] != "bias"
