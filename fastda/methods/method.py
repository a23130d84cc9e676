"""What every method shares: the passes through the network, the task loss, and the sum of the terms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.outputs import as_tensor
from ..reference import checks
from .networks import call, concatenate, num_samples
from .scheduled import Scheduled

PASSES = ("joint", "separate")


@dataclass
class Passed:
    """What one batch of each domain gave in its pass through the network.

    Attributes:
        source_features, target_features: (Ns, ...), (Nt, ...).
        source_logits, target_logits: (Ns, C), (Nt, C); those of the target only for terms that ask for them.
        process_group: the processes that the batches are spread over, or None.
    """

    source_features: Tensor
    target_features: Tensor
    source_logits: Tensor
    target_logits: Tensor | None = None
    process_group: object = None


class Term(nn.Module):
    """One loss beside the task loss: `forward(passed)` gives it, the method multiplies it by its weight.

    Args:
        name: its name in the method's losses and in the logs.
        weight: a number, or a function from the progress of training, 0 to 1, to one.

    A subclass with `needs_target_logits = True` finds them in `passed`; one with `least_samples` is given at least so
    many of each domain. `attach(method)` is called once, when the method has its networks. Parameters of its own (a
    domain classifier) are trained with the network's.
    """

    needs_target_logits = False
    least_samples = 1

    def __init__(self, name: str, weight: float | Callable[[float], float] = 1.0) -> None:
        super().__init__()
        if not name.isidentifier():
            raise ValueError(f"name: expected one that Python takes for a variable, got {name!r}; choose another")
        self.name = name
        self.weight = Scheduled(f"{name}_weight", weight)

    def attach(self, method: Method) -> None:
        """Look at the method's networks."""

    def begin(self) -> None:
        """A pass through the networks follows."""

    def branch(self, features: Tensor) -> Tensor:
        """Look at both domains' features, source first, before the label predictor; returns those that it gets."""
        return features

    def set_progress(self, progress: float) -> None:
        """Set all schedules to the share of training that is done, 0 to 1."""
        self.weight.set_progress(progress)

    def scheduled(self) -> dict[str, Tensor]:
        """What follows a schedule, by name."""
        return {f"{self.name}_weight": self.weight()}

    def forward(self, passed: Passed) -> Tensor:
        raise TypeError(f"{type(self).__name__}: expected a term with a forward(passed) of its own; define it")


class Method(nn.Module):
    r"""An objective of domain adaptation, around a feature extractor and a label predictor.

    .. math:: L = L_{task} + w_{target} \, L_{target\ task} + \sum_k w_k \, L_k

    `method(inputs)` gives the logits; `method.losses(...)` the terms of L by name, weights included, from a batch of
    each domain; their sum is what to descend. :class:`SourceOnly`, :class:`DeepCORAL` and :class:`DANN` are methods
    with no term and one; with several, it is a combination.

    Args:
        feature_extractor: from inputs to features; any module. Inputs may be a tensor, a tuple (positional arguments)
            or a dictionary (keyword arguments, as of Hugging Face's models).
        label_predictor: from features to logits (N, C).
        terms: the losses beside the task loss; one, or several.
        task_loss: from logits and labels to one loss a sample; cross-entropy by default. Label smoothing:
            `partial(F.cross_entropy, reduction="none", label_smoothing=0.1)`.
        target_label_weight: w_target. At 0 the labels in target batches are never looked at: unsupervised adaptation.
            Above 0 they count where they are known; negative labels are unknown. A number, or a function of progress.
        passes: "joint" sends both domains through the network together, so that batch norms see both; "separate" one
            after the other.

    Raises:
        TypeError: a network that is no module.
        ValueError: two terms of one name, or an unknown `passes`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.methods import CORALTerm, DomainAdversarialTerm, Method
        >>> terms = [CORALTerm(weight=300.0), DomainAdversarialTerm(lambd=0.1)]
        >>> method = Method(nn.Sequential(nn.Linear(8, 4), nn.ReLU()), nn.Linear(4, 3), terms)
        >>> losses = method.losses(torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(5, 8))
        >>> sorted(losses)
        ['coral', 'domain', 'task']
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        label_predictor: nn.Module,
        terms: Term | Sequence[Term] = (),
        *,
        task_loss: Callable[[Tensor, Tensor], Tensor] = partial(F.cross_entropy, reduction="none"),
        target_label_weight: float | Callable[[float], float] = 0.0,
        passes: str = "joint",
    ) -> None:
        super().__init__()
        require_module("feature_extractor", feature_extractor)
        require_module("label_predictor", label_predictor)
        checks.option("passes", passes, PASSES)
        if not callable(task_loss):
            raise TypeError(f"task_loss: expected a function, got {checks.describe(task_loss)}; pass one")
        self.feature_extractor, self.label_predictor = feature_extractor, label_predictor
        self.terms = nn.ModuleDict()
        for term in [terms] if isinstance(terms, nn.Module) else terms:
            if not isinstance(term, Term):
                raise TypeError(f"terms: expected terms, got {type(term).__name__}; make it a subclass of Term")
            if term.name in {*self.terms, "task", "target_task"}:
                raise ValueError(
                    f"terms: expected each name once, got {term.name!r} again; give one of them another name"
                )
            self.terms[term.name] = term
        self.task_loss, self.passes, self.process_group = task_loss, passes, None
        self.uses_target_labels = callable(target_label_weight) or target_label_weight != 0
        self.target_label_weight = Scheduled("target_label_weight", target_label_weight)
        for term in self.terms.values():
            term.attach(self)

    @property
    def needs_target(self) -> bool:
        """Whether the objective has anything to do with the target."""
        return len(self.terms) > 0 or self.uses_target_labels

    @property
    def least_samples(self) -> int:
        """The smallest batch of a domain that all terms can do with."""
        return max((term.least_samples for term in self.terms.values()), default=1)

    @property
    def parallel_heads(self) -> tuple[str, ...]:
        """Terms with parameters stand beside the label predictor, in the top layer."""
        return tuple(f"terms.{name}" for name, term in self.terms.items() if any(True for _ in term.parameters()))

    def forward(self, inputs) -> Tensor:
        """The logits (N, C)."""
        return self.predict_labels(self.features(inputs))

    def features(self, inputs) -> Tensor:
        """The features, on which the domains are aligned."""
        return as_tensor("feature_extractor", call(self.feature_extractor, inputs))

    def predict_labels(self, features: Tensor) -> Tensor:
        """The logits of features."""
        return as_tensor("label_predictor", self.label_predictor(features))

    def set_progress(self, progress: float) -> None:
        """Set all schedules, of weights and λ, to the share of training that is done, 0 to 1."""
        for scheduled in (self.target_label_weight, *self.terms.values()):
            scheduled.set_progress(progress)

    def scheduled(self) -> dict[str, float]:
        """The present weights and λ, by name."""
        values = {"target_label_weight": self.target_label_weight()} if self.uses_target_labels else {}
        for term in self.terms.values():
            values |= term.scheduled()
        return {name: value.item() for name, value in values.items()}

    def losses(
        self, source, source_labels: Tensor, target=None, target_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of the objective; their sum is what to descend.

        Args:
            source: source inputs.
            source_labels: (Ns,) class indices, or what `task_loss` takes; negative integers and NaN are unknown.
            target: target inputs; not needed by a method without terms.
            target_labels: (Nt,), negative where unknown; used only if `target_label_weight` is not 0.

        Returns:
            "task", "target_task" if target labels are used, and one entry a term.
        """
        if not self.needs_target:
            return {"task": self._task("source_labels", self(source), source_labels)}
        if target is None:
            raise ValueError(f"target: expected a batch, since {type(self).__name__} adapts to it, got None; pass one")
        if self.uses_target_labels and target_labels is None:
            raise ValueError(
                "target_labels: expected labels, negative where unknown, since target_label_weight is not 0, got None; "
                "pass them, or set target_label_weight=0"
            )
        for term in self.terms.values():
            term.begin()
        passed = self._pass(source, target)
        losses = {"task": self._task("source_labels", passed.source_logits, source_labels)}
        if self.uses_target_labels:
            target_task = self._task("target_labels", passed.target_logits, target_labels)
            losses["target_task"] = self.target_label_weight() * target_task
        for name, term in self.terms.items():
            loss = term(passed)
            if not isinstance(loss, Tensor) or loss.dim() > 0:
                raise ValueError(
                    f"{name}: expected a scalar tensor from the term, got {checks.describe(loss)}; average it"
                )
            losses[name] = term.weight() * loss
        return losses

    def _pass(self, source, target) -> Passed:
        """Both domains through both networks; the target through the label predictor only if somebody wants it."""
        terms = self.terms.values()
        branching = [term for term in terms if type(term).branch is not Term.branch]
        wants_logits = self.uses_target_labels or any(term.needs_target_logits for term in terms)
        if self.passes == "joint":
            sizes = [num_samples(source), num_samples(target)]
            features = self.features(concatenate(source, target))
        else:
            sources, targets = self.features(source), self.features(target)
            sizes = [len(sources), len(targets)]
            features = torch.cat([sources, targets]) if branching else None
        for term in branching:
            features = term.branch(features)
        if features is not None:
            sources, targets = features.split(sizes)
        if self.passes == "joint" and wants_logits:
            logits, target_logits = self.predict_labels(features).split(sizes)
        else:
            logits = self.predict_labels(sources)
            target_logits = self.predict_labels(targets) if wants_logits else None
        return Passed(sources, targets, logits, target_logits, self.process_group)

    def _task(self, name: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean of the task loss over the samples whose label is known, of all processes; 0 if there are none."""
        if len(labels) != len(logits) or (not labels.is_floating_point() and labels.shape == (len(logits), 1)):
            raise ValueError(
                f"{name}: expected ({len(logits)},), one label a sample, got {checks.describe(labels)}; reshape them"
            )
        known = labels.isfinite() if labels.is_floating_point() else labels >= 0
        labels = labels if labels.is_floating_point() else labels.long()
        try:
            losses = self.task_loss(logits, torch.where(known, labels, 0))
        except IndexError as error:
            raise IndexError(
                f"{name}: expected classes below {logits.shape[1]}, the number of logits, got {labels.max().item()}; "
                "give the label predictor as many outputs, or unknown samples a negative label"
            ) from error
        if 0 < losses.dim() < known.dim():  # one loss for several entries, such as the probabilities of classes
            known = known.flatten(losses.dim()).all(-1)
        if losses.shape != known.shape:
            raise ValueError(
                f"task_loss: expected one loss a label, of shape {tuple(known.shape)}, got {checks.describe(losses)}; "
                f"give it reduction='none'"
            )
        return mean(torch.where(known, losses, 0), known.sum(), self.process_group)


class SourceOnly(Method):
    """Training on labelled data alone: pretraining on the source, or fine-tuning on labelled target samples.

    Args:
        feature_extractor, label_predictor, task_loss: as in :class:`Method`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.methods import SourceOnly
        >>> method = SourceOnly(nn.Linear(8, 4), nn.Linear(4, 3))
        >>> list(method.losses(torch.randn(3, 8), torch.tensor([0, 1, 2])))
        ['task']
    """

    def __init__(self, feature_extractor: nn.Module, label_predictor: nn.Module, **options) -> None:
        super().__init__(feature_extractor, label_predictor, (), **options)


def require_module(name: str, value: object) -> None:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {checks.describe(value)}; wrap it in one")


def mean(losses: Tensor, count: Tensor | int, process_group) -> Tensor:
    """Σ losses / count, 0 for none. Over processes, the sum is of this one and the count of all, times their number, so
    that the mean over processes is that of the whole batch."""
    count = torch.as_tensor(count, device=losses.device)
    if process_group is None:
        return losses.sum() / count.clamp(min=1)
    count = count.clone()
    torch.distributed.all_reduce(count, group=process_group)
    return losses.sum() * (process_group.size() / count.clamp(min=1))
