"""Gradual unfreezing: the top layer learns first, and epoch by epoch the layers below join it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..reference import checks
from .freezing import train_top
from .layers import find_layers
from .learning_rates import check_rates, layer_groups
from .normalisation import CHOICES


class GradualUnfreezing:
    r"""Thaw a model from the top, one layer every few epochs, each at its own rate.

    Freezes all but the top `start` layers of `model` at once. `start_epoch` thaws the layers that are due and gives
    their parameters to the optimiser as new groups, whose rates are η·γ^(L − l) times what the schedule has made of the
    others' by then; nothing that the optimiser has gathered (momenta, step counts) is lost.

    Args:
        model: any module.
        lr: η, the rate of the top layer; above 0.
        decay: γ, the factor from a layer to the one below it; 1 for the same rate everywhere.
        every: epochs from one layer to the next.
        start: how many layers learn from the beginning.
        weight_decay: as in :func:`fastda.finetuning.layerwise_lr_decay`.
        normalisation: what frozen normalisation layers do, as in :func:`fastda.finetuning.freeze`.
        layers: names of the layers, lowest first; see :func:`fastda.finetuning.find_layers`.

    Raises:
        ValueError: a number out of range; layers that cannot be told apart.

    Source: Howard & Ruder, Universal Language Model Fine-tuning for Text Classification, ACL 2018.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.finetuning import GradualUnfreezing
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> unfreezing = GradualUnfreezing(model, lr=0.01, decay=0.5)
        >>> optimizer = torch.optim.SGD(unfreezing.parameter_groups(), momentum=0.9)
        >>> [unfreezing.start_epoch(epoch, optimizer) for epoch in range(4)]
        [[], ['2'], ['0'], []]
        >>> sorted({group["lr"] for group in optimizer.param_groups})
        [0.0025, 0.005, 0.01]
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        decay: float = 1.0,
        every: int = 1,
        start: int = 1,
        weight_decay: float | None = None,
        normalisation: str = "keep",
        layers: Sequence[str | Sequence[str]] | None = None,
    ) -> None:
        check_rates(lr, decay, weight_decay)
        checks.whole_number("every", every, 1)
        checks.whole_number("start", start, 1)
        checks.option("normalisation", normalisation, CHOICES)
        self.model, self.every, self.start, self.normalisation = model, every, start, normalisation
        self.layers = find_layers(model, layers)
        if start > len(self.layers):
            raise ValueError(
                f"start: expected at most the number of layers, {len(self.layers)}, got {start}; start lower"
            )
        self._groups = [
            layer_groups(layer, lr * decay**depth, weight_decay) for depth, layer in enumerate(reversed(self.layers))
        ]
        self.num_unfrozen = start
        train_top(model, self.layers, start, normalisation)

    def parameter_groups(self) -> list[dict]:
        """Groups of the layers that learn now, for an optimiser to begin with."""
        return [dict(group) for groups in self._groups[: self.num_unfrozen] for group in groups]

    def start_epoch(
        self,
        epoch: int,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> list[str]:
        """Thaw what is due before epoch `epoch` (from 0) begins; returns the names of the layers thawed now.

        Args:
            epoch: epochs that are done.
            optimizer: gets the groups of the thawed layers, unless it has their parameters already.
            scheduler: one that multiplies rates and belongs to `optimizer`, told of the new groups. Those that set
                rates of their own (OneCycleLR, CyclicLR) and those made of several are a ValueError: give the optimiser
                all groups from the beginning (`all_parameter_groups`).
        """
        checks.whole_number("epoch", epoch, 0)
        due = min(self.start + epoch // self.every, len(self.layers))
        if due <= self.num_unfrozen:
            return []
        thawed = [layer.name for layer in self.layers[len(self.layers) - due : len(self.layers) - self.num_unfrozen]]
        self._unfreeze(due, optimizer, scheduler)
        return thawed[::-1]

    def all_parameter_groups(self) -> list[dict]:
        """Groups of all layers. Frozen parameters have no gradient, so that an optimiser leaves them alone until they
        thaw."""
        return [dict(group) for groups in self._groups for group in groups]

    def state_dict(self) -> dict[str, int]:
        """How many layers have been thawed."""
        return {"num_unfrozen": self.num_unfrozen}

    def load_state_dict(
        self,
        state: dict[str, int],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ) -> None:
        """Thaw as many layers as had been thawed; call it before the optimiser and the scheduler load theirs."""
        count = state["num_unfrozen"]
        if not self.start <= count <= len(self.layers):
            raise ValueError(
                f"state: expected {self.start} to {len(self.layers)} layers thawed, got {count}; load it with the "
                "same model"
            )
        self._unfreeze(count, optimizer, scheduler)

    def _unfreeze(self, count: int, optimizer: torch.optim.Optimizer, scheduler) -> None:
        present = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [
            group
            for groups in self._groups[:count]
            for group in groups
            if not all(id(p) in present for p in group["params"])
        ]
        if missing and scheduler is not None:
            _check_extendable(scheduler)
        share = self._share(optimizer)
        for group in missing:
            optimizer.add_param_group({**group, "lr": group["lr"] * share, "initial_lr": group["lr"]})
            if scheduler is not None:
                _extend(scheduler, group["lr"])
        train_top(self.model, self.layers, count, self.normalisation)
        self.num_unfrozen = count

    def _share(self, optimizer: torch.optim.Optimizer) -> float:
        """What the schedule has made of the rates by now, all of them alike: the present rate over the first one."""
        rates = {id(p): group["lr"] for groups in self._groups for group in groups for p in group["params"]}
        for group in optimizer.param_groups:
            first = next((rates[id(p)] for p in group["params"] if id(p) in rates), None)
            if first is not None:
                return float(group["lr"]) / group.get("initial_lr", first)
        return 1.0


MULTIPLYING = (
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "ExponentialLR",
    "LambdaLR",
    "LinearLR",
    "MultiplicativeLR",
    "MultiStepLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "StepLR",
)
"""Schedulers that can be told of a new group."""


def _check_extendable(scheduler) -> None:
    if type(scheduler).__name__ not in MULTIPLYING or len(set(map(id, getattr(scheduler, "lr_lambdas", [])))) > 1:
        raise ValueError(
            f"scheduler: expected one that multiplies all rates alike, one of {', '.join(MULTIPLYING)}, got "
            f"{type(scheduler).__name__}; give the optimiser unfreezing.all_parameter_groups() from the beginning"
        )


def _extend(scheduler, lr: float) -> None:
    """As if the group had been there when the scheduler was made."""
    for attribute, value in (
        ("base_lrs", lambda _: lr),
        ("lr_lambdas", lambda values: values[0]),
        ("min_lrs", lambda values: values[0]),
        ("_last_lr", lambda values: scheduler.optimizer.param_groups[-1]["lr"]),
    ):
        values = getattr(scheduler, attribute, None)
        if isinstance(values, list) and values:
            values.append(value(values))
