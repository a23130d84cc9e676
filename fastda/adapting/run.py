"""The whole of an adaptation: from two sets of samples to a model, its predictions, and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..shift.samples import as_indices, as_label_list
from ..training import random_states
from ..training.distributed import as_device
from ..version import __version__
from .choice import check_method, choose
from .folder import JSON, MARKDOWN, MODEL, PREDICTIONS, RunFolder
from .measure import measure
from .model import AdaptedModel, load_model, require_safetensors
from .networks import make_network
from .predictions import write_predictions
from .report import Report
from .settings import BATCH_SIZE, LEARNING_RATE, Settings
from .task import Task, make_task
from .training import Data, Trainer


@dataclass(frozen=True, eq=False)
class Adaptation:
    """What came of an adaptation.

    Attributes:
        model: the adapted one.
        report: of before and after: `print(adaptation.report.summary())`.
        logits: (Nt, C), of the target.
    """

    model: AdaptedModel
    report: Report
    logits: Tensor


def adapt(
    source: Tensor,
    source_labels,
    target: Tensor,
    target_labels=None,
    *,
    method: str = "auto",
    measured_labels=None,
    measure_only: bool = False,
    classes: Sequence | None = None,
    epochs: int | None = None,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    network: str | None = None,
    device: str | None = None,
    out: str | os.PathLike | None = None,
    progress: bool | None = False,
    say: Callable[[str], object] = lambda line: None,
) -> Adaptation:
    """Train a classifier on a source and adapt it to a target: what `fastda adapt` does, on tensors.

    A network is trained on four fifths of the source; the others are held out. Then the method adapts it:

    ==================== ==============================================================================================
    `source-only`         nothing: the model as it is
    `reweight`            nothing is trained: probabilities are corrected for the target's class frequencies
    `prototypes`          nothing is trained: the class of the nearest prototype, which the target draws to itself
    `coral`               Deep CORAL: covariances of the features agree
    `dann`                the features are trained against a classifier of the domains
    `feature-extraction`  the last layer learns from target labels
    `top-layers`          the last two layers do, the lower more slowly
    `finetune`            all layers do, at a tenth of the rate
    `auto`                what :func:`fastda.recommend` says to what :func:`fastda.shift.diagnose` finds
    ==================== ==============================================================================================

    Target labels that are known are trained on by all methods that train or take means, but for a fifth of each class
    (none of fewer than five), which accuracy is measured on.

    Args:
        source, target: (N, D) features or (N, C, H, W) images, floating. They are standardised, by mean and deviation
            of each feature or channel over both domains; features, where a method adapts, each domain by its own.
        source_labels: (Ns,), integers or strings; unknown ones are left out.
        target_labels: (Nt,); unknown ones are negative, empty or None. All of them may be.
        method: see above.
        measured_labels: (Nt,), target labels for measuring alone; those that training may see are left out.
        measure_only: the target's labels too are for measuring alone.
        classes: names of the classes, where the labels are positions in them; by default the source's labels, sorted.
        epochs: of each training; by default about 500 steps.
        batch_size: samples of each domain in a step.
        learning_rate: of the training on the source; adaptation has a tenth of it.
        seed: of all that is random.
        network: "package.module:function" of a network of your own: see the README.
        device: "cpu", "cuda", ...; by default the GPU if there is one.
        out: a new folder to write model, predictions and report to, or that of the same run, which then goes on where
            it was killed, to the bit on the CPU. None: nothing is written.
        progress: progress bars (tqdm): True, False, or None for some where the terminal shows them.
        say: called with a line about what is being done.

    Returns:
        An :class:`Adaptation`.

    Raises:
        TypeError, ValueError: arguments or data that do not fit; each says what to do.
        FloatingPointError: training diverged; what it wrote is removed.

    Example:
        >>> import torch
        >>> from fastda.adapting import adapt
        >>> labels = torch.arange(200) % 2
        >>> source = torch.randn(200, 2) / 4 + torch.stack([labels, -labels], 1)
        >>> adaptation = adapt(source, labels, source.flip(0) + 2, method="prototypes", epochs=20)
        >>> adaptation.model.predict(torch.tensor([[3.0, 1.0], [2.0, 2.0]]))
        [1, 0]
    """
    settings = Settings(method, epochs, batch_size, learning_rate, seed, network, device)
    names, indices = _positions(source_labels, target_labels, measured_labels, classes, (len(source), len(target)))
    task = make_task(source, indices[0], target, *indices[1:], names, measure_only=measure_only, seed=seed)
    return run(task, settings, out, progress=progress, say=say)


def run(
    task: Task,
    settings: Settings,
    out: str | os.PathLike | None = None,
    *,
    names: tuple[str, str] = ("source", "target"),
    progress: bool | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Adaptation:
    """Adapt by the settings; see :func:`adapt`. `names`: what to call the domains."""
    check_method(settings, task, names)
    if settings.device is not None:
        as_device(settings.device)
    with random_states.unchanged():  # a network of the user's fails, if it does, before anything is written
        make_network(task.shape, len(task.classes), settings.network)
    folder = None
    if out is not None:
        require_safetensors("adapt")
        identity = settings.to_dict() | {"version": __version__, "torch": torch.__version__, "data": task.digest()}
        folder = RunFolder(out, identity)
        if folder.finished:
            folder.end()
            say(f"finished before: {folder.path}")
            model = load_model(folder / MODEL, network=settings.network)
            report = Report.from_json((folder / JSON).read_text(encoding="utf-8"))
            return Adaptation(model, report, model.logits(task.target))
        if folder.begun:
            say(f"going on where {folder.path} was left")
        folder.begin()
    try:
        adaptation = _adapt(task, settings, folder, names, progress, say)
    except FloatingPointError:
        if folder is not None:
            folder.discard()
        raise
    if folder is not None:
        _write(folder, adaptation)
    return adaptation


def _adapt(task: Task, settings: Settings, folder: RunFolder | None, names, progress, say) -> Adaptation:
    data = Data.of(task)
    trainer = Trainer(data, settings, None if folder is None else folder.path, say, progress)
    pretrained = trainer.pretrained()
    before, logits = measure(pretrained, data, settings.seed)
    source, target = data.source, data.target
    if settings.method == "auto":
        say("what kind of shift is it?")
        if task.is_images:  # pixels say little: what the network makes of them is what will be aligned
            source, target = (pretrained.features(x, scaled=True) for x in (source, target))
    choice = choose(task, settings, source, target, progress)
    say(f"{choice.found or choice.reason}: {choice.title}")
    model, after = pretrained, before
    if choice.method != "source-only":
        model, data = trainer.adapted(pretrained, choice)
        after, logits = measure(model, data, settings.seed)
    return Adaptation(model, Report.of(task, settings, choice, before, after, names), logits)


def _write(folder: RunFolder, adaptation: Adaptation) -> None:
    """The report comes last: where it is, all is."""
    adaptation.model.save(folder / MODEL)
    write_predictions(folder / PREDICTIONS, [adaptation.logits], adaptation.model.classes)
    folder.write(JSON, adaptation.report.to_json())
    folder.write(MARKDOWN, adaptation.report.to_markdown())
    folder.end()


def _positions(source_labels, target_labels, measured_labels, classes, counts: tuple[int, int]):
    """Names of the classes, and labels as positions in them."""
    given = (
        ("source_labels", source_labels, counts[0]),
        ("target_labels", target_labels, counts[1]),
        ("measured_labels", measured_labels, counts[1]),
    )
    listed = [None if labels is None else as_label_list(name, labels, count) for name, labels, count in given]
    if listed[0] is None:
        raise ValueError("source_labels: expected a label of each sample, got None; pass them")
    if classes is None:
        names = tuple(sorted({label for label in listed[0] if label is not None}))
    else:
        names = tuple(classes)
        positions = set(range(len(names)))
        if not {label for labels in listed if labels for label in labels if label is not None} <= positions:
            raise ValueError(
                f"classes: expected labels that are positions in them, 0 to {len(names) - 1}, got others; leave "
                "classes out, or pass as many names as there are classes"
            )
    known = range(len(names)) if classes is not None else names
    for (name, _, _), labels in zip(given[1:], listed[1:]):
        new = {label for label in labels or () if label is not None} - set(known)
        if new:
            raise ValueError(
                f"{name}: expected labels among the source's, got {sorted(new, key=str)[0]!r} too; leave these samples "
                "out, or their labels empty"
            )
    return names, [None if labels is None else torch.from_numpy(as_indices(labels, known)) for labels in listed]
