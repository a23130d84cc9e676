"""What normalisation layers with running statistics (BatchNorm) do while a model is fine-tuned."""

from __future__ import annotations

from torch import nn

from ..reference import checks

CHOICES = ("train", "keep", "batch")


class _Chosen:
    """Mixed into a norm's class, where `model.train()`, copying and pickling leave it."""

    def __reduce_ex__(self, protocol):
        return _remake, (type(self).own_class, type(self).statistics), self.__dict__


class _KeptStatistics(_Chosen):
    """Normalises by the running statistics, which stay as they are."""

    statistics = "keep"

    def train(self, mode: bool = True):
        return super().train(False)


class _BatchStatistics(_Chosen):
    """Normalises by the statistics of the batch, in evaluation as well; the running statistics stay as they are."""

    statistics = "batch"

    def train(self, mode: bool = True):
        return super().train(True)


_classes: dict[tuple[str, type], type] = {}


def set_normalisation(model: nn.Module, statistics: str) -> nn.Module:
    """Choose which statistics the normalisation layers of `model` use, for good: `model.train()` does not undo it.

    Concerns layers with running statistics (BatchNorm, and InstanceNorm that tracks them); LayerNorm, GroupNorm and
    RMSNorm have none. Scale and shift are parameters, which `freeze` and `unfreeze` see to.

    Args:
        model: any module; a norm itself, or one that has norms in it.
        statistics: "train" is PyTorch's own behaviour: the batch's in training, where the running ones follow them, and
            the running ones in evaluation. "keep" always uses the running ones, and leaves them as they are. "batch"
            always uses the batch's, in evaluation too, and leaves the running ones as they are.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown choice.

    Example:
        >>> import torch
        >>> from fastda.finetuning import set_normalisation
        >>> norm = set_normalisation(torch.nn.BatchNorm1d(2, affine=False), "keep").train()
        >>> norm(torch.full((2, 2), 5.0))
        tensor([[5.0000, 5.0000],
                [5.0000, 5.0000]])
        >>> norm.running_mean
        tensor([0., 0.])
    """
    checks.option("statistics", statistics, CHOICES)
    for module in model.modules():
        if has_running_statistics(module):
            set_statistics(module, statistics, model.training)
    return model


def has_running_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None and hasattr(module, "track_running_stats")


def set_statistics(norm: nn.Module, statistics: str, training: bool) -> None:
    """Of one norm, in a model that is in training mode or not."""
    if isinstance(norm, _Chosen):
        norm.__class__ = norm.own_class
        norm.track_running_stats = True
    if statistics != "train":
        norm.__class__ = _class(norm.__class__, statistics)
        norm.track_running_stats = statistics == "keep"
    norm.train(training)


def _class(own_class: type, statistics: str) -> type:
    if (statistics, own_class) not in _classes:
        behaviour = _KeptStatistics if statistics == "keep" else _BatchStatistics
        name = f"{own_class.__name__}With{behaviour.__name__[1:]}"
        _classes[statistics, own_class] = type(name, (behaviour, own_class), {"own_class": own_class})
    return _classes[statistics, own_class]


def _remake(own_class: type, statistics: str) -> nn.Module:
    cls = _class(own_class, statistics)
    return cls.__new__(cls)
