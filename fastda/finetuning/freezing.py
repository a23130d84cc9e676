"""Freezing and thawing by name, pattern or depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..reference import checks
from .layers import find_layers, matching
from .normalisation import CHOICES, has_running_statistics, set_statistics

Layers = Sequence["str | Sequence[str]"]


def freeze(
    model: nn.Module, *names: str, depth: int | None = None, normalisation: str = "keep", layers: Layers | None = None
) -> nn.Module:
    """Freeze parts of a model: their parameters get no gradient, their normalisation layers keep their statistics.

    Args:
        model: any module.
        names: modules or parameters, by name (`"layer1"` has all that is in it) or pattern (`"blocks.[0-5]"`,
            `"*.norm1"`); without names and depth, the whole model.
        depth: the lowest so many layers, as :func:`fastda.finetuning.find_layers` finds them.
        normalisation: what frozen normalisation layers with running statistics do, also after `model.train()`: "keep"
            their statistics, use the "batch"'s, or "train": see :func:`fastda.finetuning.set_normalisation`.
        layers: names of the layers for `depth`, lowest first.

    Returns:
        `model`.

    Raises:
        ValueError: a name that matches nothing, a depth beyond the number of layers, an unknown `normalisation`.

    Frozen parameters may be in an optimiser: without a gradient they are not touched, nor do they decay.

    Example:
        >>> from torch import nn
        >>> from fastda.finetuning import freeze
        >>> model = freeze(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), "0")
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    checks.option("normalisation", normalisation, CHOICES)
    _set_trainable(model, _chosen(model, names, depth, layers, from_the_top=False), False, normalisation)
    return model


def unfreeze(model: nn.Module, *names: str, depth: int | None = None, layers: Layers | None = None) -> nn.Module:
    """Thaw parts of a model: their parameters learn, their normalisation layers train as usual.

    Args:
        model: any module.
        names: modules or parameters, by name or pattern; without names and depth, the whole model.
        depth: the top so many layers, as :func:`fastda.finetuning.find_layers` finds them.
        layers: names of the layers for `depth`, lowest first.

    Returns:
        `model`.

    Raises:
        ValueError: a name that matches nothing, a depth beyond the number of layers.

    Example:
        >>> from torch import nn
        >>> from fastda.finetuning import freeze, unfreeze
        >>> model = unfreeze(freeze(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))), depth=1)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    _set_trainable(model, _chosen(model, names, depth, layers, from_the_top=True), True, "train")
    return model


def feature_extraction(model: nn.Module, *, normalisation: str = "keep", layers: Layers | None = None) -> nn.Module:
    """Freeze all but the top layer: the pretrained features stay, and a classifier is learnt on them.

    Args:
        model: any module whose top layer is the classifier; heads beside it (a domain classifier) learn too.
        normalisation: as in :func:`fastda.finetuning.freeze`.
        layers: names of the layers, lowest first.

    Returns:
        `model`.

    Raises:
        ValueError: layers that cannot be told apart; says how to name them.

    Example:
        >>> from torch import nn
        >>> from fastda.finetuning import feature_extraction
        >>> model = feature_extraction(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['2.weight', '2.bias']
    """
    return unfreeze_top(model, 1, normalisation=normalisation, layers=layers)


def unfreeze_top(model: nn.Module, k: int, *, normalisation: str = "keep", layers: Layers | None = None) -> nn.Module:
    """Train the top k layers, and freeze those below.

    Args:
        model: any module.
        k: how many layers learn, from 1 (feature extraction) to all of them (full fine-tuning).
        normalisation: of the layers below, as in :func:`fastda.finetuning.freeze`.
        layers: names of the layers, lowest first.

    Returns:
        `model`.

    Raises:
        TypeError: `k` is not an int.
        ValueError: `k` below 1 or beyond the number of layers; layers that cannot be told apart.

    Example:
        >>> from torch import nn
        >>> from fastda.finetuning import unfreeze_top
        >>> model = unfreeze_top(nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5))), 2)
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['3.weight', '4.weight']
    """
    checks.whole_number("k", k, 1)
    checks.option("normalisation", normalisation, CHOICES)
    found = find_layers(model, layers)
    if k > len(found):
        raise ValueError(f"k: expected at most the number of layers, {len(found)}, got {k}; they are {_names(found)}")
    train_top(model, found, k, normalisation)
    return model


def train_top(model: nn.Module, found: list, k: int, normalisation: str) -> None:
    """Only the top k of the layers found learn."""
    for trainable, part in ((False, found[: len(found) - k]), (True, found[len(found) - k :])):
        names = [name for layer in part for name in layer.parameters]
        _set_trainable(model, names, trainable, "train" if trainable else normalisation)


def _chosen(model, names: Sequence[str], depth: int | None, layers, from_the_top: bool) -> list[str]:
    """Names of the parameters that names or depth choose."""
    if names and depth is not None:
        raise ValueError(f"depth: expected names or a depth, got {names} and {depth}; call it once for each")
    if depth is not None:
        checks.whole_number("depth", depth, 1)
        found = find_layers(model, layers)
        if depth > len(found):
            raise ValueError(
                f"depth: expected at most the number of layers, {len(found)}, got {depth}; they are {_names(found)}"
            )
        part = found[len(found) - depth :] if from_the_top else found[:depth]
        return [name for layer in part for name in layer.parameters]
    if not names:
        return [name for name, _ in model.named_parameters()]
    return [name for pattern in names for name in matching(model, pattern)]


def _set_trainable(model: nn.Module, names: Iterable[str], trainable: bool, statistics: str) -> None:
    """A norm follows its own parameters; one without any (affine=False) the module that holds it, if all of that is
    chosen."""
    names = set(names)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(trainable)
    # By identity, since a shared parameter has several names, of which one was chosen.
    chosen = {id(p) for name, p in model.named_parameters() if name in names}
    for module_name, module in model.named_modules():
        if has_running_statistics(module):
            own = {id(p) for p in module.parameters()} or _surrounding(model, module_name)
            if own and own <= chosen:
                set_statistics(module, statistics, model.training)


def _surrounding(model: nn.Module, name: str) -> set[int]:
    """The parameters of the nearest module around a norm that has any."""
    while name:
        name = name.rpartition(".")[0]
        parameters = {id(p) for p in model.get_submodule(name).parameters()}
        if parameters:
            return parameters
    return set()


def _names(found: list) -> str:
    return ", ".join(repr(layer.name) for layer in found)
