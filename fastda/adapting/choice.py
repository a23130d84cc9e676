"""Which method, and why: what the user asked for, or what the diagnosis recommends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from ..data_files.labels import UNKNOWN
from ..shift import ShiftReport, diagnose, recommend
from ..shift.advice import TITLES
from ..shift.samples import LEAST_SAMPLES
from .settings import ALIGNING, TRAINED_ON_TARGET_LABELS, Settings
from .task import Task

OF_ADVICE = {
    "none": "source-only",
    "few-shot": "prototypes",
    "coral+finetune": "coral",
    "dann+finetune": "dann",
}
"""What the adviser's names are here, where they differ: known labels count in any case."""
LEAST_OF_CLASS = 2  # of a class that the diagnosis looks at


@dataclass(frozen=True)
class Choice:
    """What is done, and why.

    Attributes:
        method: one of `METHODS` but "auto".
        title: the same in words.
        reason: why.
        recommended: whether the diagnosis chose it.
        found: what the diagnosis found; empty where there was none.
        next_step: what to try where it is not enough; empty where nothing is known.
        class_weights: how much more often than in the source each class is to be drawn; None for as often.
        diagnosis: :meth:`fastda.shift.ShiftReport.to_dict`, or None where there was none.
    """

    method: str
    title: str
    reason: str
    recommended: bool = False
    found: str = ""
    next_step: str = ""
    class_weights: tuple[float, ...] | None = None
    diagnosis: dict | None = None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def title(method: str, task: Task) -> str:
    """A method in words; known labels of the target count in alignment too."""
    known = task.num_known > 0
    if method == "prototypes":
        return TITLES["few-shot"] if known else "prototypes of the source, moved to the target"
    return TITLES[f"{method}+finetune" if known and method in ALIGNING else method]


def check_method(settings: Settings, task: Task, names: tuple[str, str] = ("source", "target")) -> None:
    """Raise a ValueError for what the method needs and the data do not have, before anything is trained."""
    if settings.method in TRAINED_ON_TARGET_LABELS and not task.num_known:
        raise ValueError(
            f"method: expected target labels to train on, which {settings.method!r} needs, got none in {names[1]} that "
            "training may see; label some samples, or choose coral, dann or prototypes"
        )
    if settings.method != "auto":
        return
    diagnosed = len(_diagnosed(task)) if task.is_images else len(task.source)
    for name, count in ((names[0], diagnosed), (names[1], len(task.target))):
        if count < LEAST_SAMPLES:
            held_out = " that training does not see" if task.is_images and name == names[0] else ""
            raise ValueError(
                f"method: expected at least {LEAST_SAMPLES} samples of each domain{held_out}, without which there is "
                f"no diagnosis to choose by, got {count} in {name}; choose a method instead of 'auto'"
            )


def choose(
    task: Task, settings: Settings, source_features: Tensor, target_features: Tensor, progress: bool | None
) -> Choice:
    """The method that was asked for, or the one that `fastda.recommend` names for what is diagnosed.

    Args:
        task: the data.
        settings: of the run.
        source_features, target_features: (Ns, D), (Nt, D): what the diagnosis looks at.
        progress: of the tests.
    """
    if settings.method != "auto":
        reason = "it was asked for"
        return Choice(settings.method, title(settings.method, task), reason)
    report = _diagnose(task, source_features, target_features, settings.seed, progress)
    modality = "images" if task.is_images else "features"
    advice = recommend(
        task.num_known,
        len(task.target) - task.num_known,
        num_classes=len(task.classes),
        shift=report,
        modality=modality,
    )
    method = OF_ADVICE.get(advice.method, advice.method)
    weights = None
    if method in ALIGNING and set(report.kinds) >= {"covariate", "label"}:
        weights = _class_weights(report, task)
    words = advice.title if advice.method in ("none", "source-only") else title(method, task)
    next_step = "" if advice.next_step is None else f"{advice.next_step.title}: {advice.next_step.reason}"
    return Choice(method, words, advice.reason, True, report.summary, next_step, weights, report.to_dict())


def _diagnosed(task: Task) -> Tensor:
    """Which source samples the diagnosis looks at: of images those that no training saw, since a network is surer of
    what it learnt by heart; of features all. Classes that are too rare are left out."""
    chosen = task.held_out if task.is_images else torch.ones_like(task.held_out)
    counts = torch.bincount(task.source_labels[chosen], minlength=len(task.classes))
    return (chosen & (counts >= LEAST_OF_CLASS)[task.source_labels]).nonzero()[:, 0]


def _diagnose(task: Task, source: Tensor, target: Tensor, seed: int, progress: bool | None) -> ShiftReport:
    chosen = _diagnosed(task)
    labels = [task.classes[index] for index in task.source_labels[chosen].tolist()]
    present = set(labels)
    known = None
    if task.num_known:
        names = [None if index == UNKNOWN else task.classes[index] for index in task.target_labels.tolist()]
        known = [name if name in present else None for name in names]
    report = diagnose(source[chosen], target, labels, known, seed=seed, progress=progress)
    return replace(report, num_source=len(task.source))


def _class_weights(report: ShiftReport, task: Task) -> tuple[float, ...]:
    """Of all classes, 1 for those that were not estimated; none is left out altogether."""
    found = dict(zip(report.label_shift.classes, report.label_shift.weights.tolist()))
    return tuple(max(found.get(name, 1.0), 0.05) for name in task.classes)
