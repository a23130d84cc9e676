"""The trainings: on the source first, then the method's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..finetuning import feature_extraction, layerwise_lr_decay, unfreeze_top
from ..methods import DANN, DeepCORAL, Method, SourceOnly
from ..nn import DomainDiscriminator
from ..schedules import dann_lambda
from ..shift import estimate_label_shift
from ..training import Batches, fit, random_states
from .choice import Choice
from .model import AdaptedModel
from .networks import Scale, make_network
from .prototypes import Prototypes, target_prototypes
from .settings import Settings
from .task import Task

CORAL_WEIGHT, LARGEST_LAMBDA = 1000.0, 0.03
"""The recipes' own; fastda/demo/train.py tells how they were chosen."""
SLOWER = 10  # than on the source: adaptation is fine-tuning
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 500, 5, 200
DECAY = 0.5  # of the rate from a layer to the one below
CHECKPOINT_EVERY = 200  # steps


@dataclass(frozen=True, eq=False)
class Data:
    """What trainings and measurements work on: a task whose inputs are scaled already.

    Attributes:
        task: the data as they are.
        scale: the target's, which a model trained on this has.
        source, target: (Ns, *shape), (Nt, *shape), float32, scaled.
    """

    task: Task
    scale: Scale
    source: Tensor
    target: Tensor

    @classmethod
    def of(cls, task: Task) -> Data:
        scale = Scale.of(task.source[~task.held_out], task.target)
        return cls(task, scale, scale(task.source), scale(task.target))

    def for_adaptation(self) -> Data:
        """Features: each domain scaled by itself, which undoes what has been moved or stretched one by one, and leaves
        the rest to the method. Images: as before, since their brightness differs from one to the next.

        Source: Li et al., Revisiting batch normalization for practical domain adaptation, ICLR workshops 2017, who do
        so with the features of each layer.
        """
        if self.task.is_images:
            return self
        task = self.task
        scales = Scale.of(task.source[~task.held_out]), Scale.of(task.target)
        return replace(self, scale=scales[1], source=scales[0](task.source), target=scales[1](task.target))

    def source_batches(self, batch_size: int, class_weights: Tensor | None = None) -> Batches:
        """Of the source but for what is held out; `class_weights`: how much more often each class is drawn."""
        labels = self.task.source_labels[~self.task.held_out]
        weights = None if class_weights is None else class_weights[labels]
        return Batches(batch_size, self.source[~self.task.held_out], labels, weights=weights)

    def target_batches(self, batch_size: int) -> Batches:
        """All target samples, with the labels that may be seen."""
        return Batches(batch_size, self.target, self.task.target_labels)

    def labelled_batches(self, batch_size: int) -> Batches:
        """The target samples whose label may be seen."""
        return Batches(batch_size, self.target[self.task.known], self.task.target_labels[self.task.known])


def default_epochs(num_samples: int, batch_size: int) -> int:
    """About 500 steps: at least 5 epochs, at most 200."""
    steps = max(1, num_samples // min(batch_size, num_samples))
    return min(MOST_EPOCHS, max(LEAST_EPOCHS, math.ceil(STEPS / steps)))


class Trainer:
    """Trains by the settings; each training draws from the seed alone, and can be resumed from its checkpoint.

    Args:
        data: of both domains.
        settings: of the run.
        folder: where checkpoints go, or None.
        say: called with a line about what begins.
        progress: of `fit`.
    """

    def __init__(
        self,
        data: Data,
        settings: Settings,
        folder: Path | None = None,
        say: Callable[[str], object] = lambda line: None,
        progress: bool | None = None,
    ) -> None:
        self.data, self.settings, self.folder, self.say, self.progress = data, settings, folder, say, progress

    def pretrained(self) -> AdaptedModel:
        """A network that has seen the source alone."""
        task = self.data.task
        with random_states.seeded(self.settings.seed):
            parts = make_network(task.shape, len(task.classes), self.settings.network)
            batches = self.data.source_batches(self.settings.batch_size)
            self._fit("pretraining", "training on the source", SourceOnly(*parts), batches, self.settings.learning_rate)
        return self._model(*parts, method="source-only")

    def adapted(self, model: AdaptedModel, choice: Choice) -> tuple[AdaptedModel, Data]:
        """The pretrained model, adapted, and the data as it sees them; the model given is left as it was."""
        model, method, data = copy.deepcopy(model), choice.method, self.data
        if method not in ("source-only", "reweight"):
            data = self.data.for_adaptation()
        model.scale, model.method = data.scale, method
        with random_states.seeded(self.settings.seed + 1):
            if method == "reweight":
                model.log_weights = _class_weights(model, data).log().float().to(model.log_weights.device)
            elif method == "prototypes":
                model.label_predictor = _prototypes(model, data)
            elif method != "source-only":
                self._train(model, choice, data)
        return model, data

    # The methods

    def _train(self, model: AdaptedModel, choice: Choice, data: Data) -> None:
        parts, size = (model.feature_extractor, model.label_predictor), self.settings.batch_size
        lr, doing = self.settings.learning_rate / SLOWER, f"adapting: {choice.title}"
        method = choice.method
        if method in ("coral", "dann"):
            options = {"target_label_weight": 1.0} if data.task.num_known else {}
            if method == "coral":
                objective = DeepCORAL(*parts, weight=CORAL_WEIGHT, **options)
            else:
                objective = DANN(*parts, _discriminator(model), lambd=_lambda, **options)
            weights = None if choice.class_weights is None else torch.tensor(choice.class_weights)
            source = data.source_batches(size, weights)
            self._fit("adaptation", doing, objective, source, lr, data.target_batches(size))
            return
        objective = SourceOnly(*parts)
        optimizer = None
        if method == "feature-extraction":
            feature_extraction(objective)
        elif method == "top-layers":
            unfreeze_top(objective, 2)
            groups = layerwise_lr_decay(objective, lr=lr, decay=DECAY)
            optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)
        self._fit("adaptation", doing, objective, data.labelled_batches(size), lr, optimizer=optimizer)

    # How

    def _fit(self, name: str, doing: str, method: Method, source, lr: float, target=None, optimizer=None) -> None:
        longest = max(len(loader.tensors[0]) for loader in (source, target) if loader is not None)
        epochs = self.settings.epochs or default_epochs(longest, self.settings.batch_size)
        self.say(f"{doing}, {epochs} epochs")
        fit(
            method,
            source,
            target,
            epochs=epochs,
            lr=None if optimizer is not None else lr,
            optimizer=optimizer,
            checkpoint=None if self.folder is None else self.folder / f"{name}.pt",
            checkpoint_every=None if self.folder is None else CHECKPOINT_EVERY,
            progress=self.progress,
            device=self.settings.device,
        )

    def _model(self, extractor: nn.Module, predictor: nn.Module, method: str) -> AdaptedModel:
        task = self.data.task
        device = next((p.device for p in predictor.parameters()), torch.device("cpu"))
        zeros = torch.zeros(len(task.classes), device=device)
        return AdaptedModel(
            self.data.scale,
            extractor,
            predictor,
            zeros,
            task.classes,
            task.shape,
            method,
            self.settings.network,
            task.feature_names,
        )


LEAST_WEIGHT = 1e-6  # of a class: its logit stays finite


def _class_weights(model: AdaptedModel, data: Data) -> Tensor:
    """Target over source frequency of each class, by its predictions; 1 where too few samples are held out."""
    task = data.task
    held_out, labels = task.held_out, task.source_labels[task.held_out]
    seen = (torch.bincount(labels, minlength=len(task.classes)) >= 2).nonzero()[:, 0]
    weights = torch.ones(len(task.classes), dtype=torch.float64)
    if len(seen) < 2:
        return weights
    kept = torch.isin(labels, seen)
    position = torch.full((len(task.classes),), -1)
    position[seen] = torch.arange(len(seen))
    source, target = (
        model.logits(x, scaled=True)[:, seen].double().softmax(1)
        for x in (data.source[held_out][kept], data.target)
    )
    shift = estimate_label_shift(position[labels[kept]], source, target, classes=range(len(seen)))
    weights[seen] = torch.from_numpy(np.maximum(shift.weights, LEAST_WEIGHT))
    return weights


def _prototypes(model: AdaptedModel, data: Data) -> Prototypes:
    task = data.task
    source, target = (model.features(x, scaled=True) for x in (data.source, data.target))
    found = target_prototypes(
        source, task.source_labels, task.held_out, target, task.target_labels, len(task.classes)
    )
    return found.to(model.log_weights.device)


def _lambda(progress: float) -> float:
    return LARGEST_LAMBDA * dann_lambda(progress)


def _discriminator(model: AdaptedModel) -> nn.Module:
    num_features = model.features(torch.zeros(1, *model.shape), scaled=True).shape[1]
    return DomainDiscriminator(num_features, 64, num_layers=2, dropout=0.0)
