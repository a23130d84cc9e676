"""Training a method: the arguments, and what can be wrong with them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..finetuning import GradualUnfreezing
from ..methods import Method
from ..reference import checks
from .evaluation import PRECISIONS
from .loaders import check_loader, check_resumable
from .loop import Fit, Training
from .validators import VALIDATORS

EXCLUSIVE = (
    ("lr", "pretraining_lr"),
    ("lr_schedule", "scheduler"),
    *((name, "optimizer") for name in ("lr", "pretraining_lr", "weight_decay")),
    *((name, "unfreezing") for name in ("lr", "pretraining_lr")),
)
"""Arguments of which the one would leave the other without effect."""


def fit(
    method: Method,
    source,
    target=None,
    *,
    epochs: int,
    lr: float | None = None,
    pretraining_lr: float | None = None,
    weight_decay: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    lr_schedule: Callable[[float], float] | None = None,
    scheduler=None,
    scheduler_every: str = "epoch",
    unfreezing: GradualUnfreezing | None = None,
    steps_per_epoch: int | None = None,
    accumulate: int = 1,
    clip_norm: float | None = 1.0,
    precision: str = "float32",
    compile: bool | Mapping[str, object] = False,
    source_validation=None,
    target_validation=None,
    validators: str | Sequence[str] = (),
    select: str | None = None,
    patience: int | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    log: str | os.PathLike | None = None,
    log_every: int | None = None,
    tensorboard: str | os.PathLike | None = None,
    on_row: Callable[[dict[str, float]], object] | None = None,
    progress: bool | None = None,
    device: torch.device | str | None = None,
    divide_loaders: bool = True,
    distributed: Mapping[str, object] | None = None,
) -> Fit:
    """Train a method on a source and, where it adapts, a target.

    Each step takes one batch of each domain; a loader that ends begins again, so that their lengths may differ.

    Under `torchrun` the same call trains with DistributedDataParallel: the batches of the loaders are divided among the
    processes, CORAL sees those of all, and the losses are those of one process with batches as large as all of theirs
    together (but for batch statistics and dropout). Validation runs whole in each process.

    Args:
        method: a :class:`fastda.methods.Method`, trained in place.
        source: a loader of (inputs, labels), or of dictionaries with "labels"; any iterable that can be read again and
            again.
        target: a loader of inputs, (inputs,) or (inputs, labels); negative labels are unknown, and all are ignored
            unless the method has a `target_label_weight`.
        epochs: how many; the learning is scheduled over all their steps.
        lr: learning rate; by default a tenth of `pretraining_lr`, the usual advice for fine-tuning.
        pretraining_lr: the rate at which the network was pretrained; 0.1 by default, the usual one of SGD.
        weight_decay: of the default optimiser, 1e-3 by default; biases and norms have none.
        optimizer: by default SGD with momentum 0.9, as in the papers. Another over the method's parameters instead,
            with rates and weight decay of its own: `torch.optim.SGD(layerwise_lr_decay(method, 0.01, 0.5),
            momentum=0.9)`, or AdamW for transformers. Adversarial methods are less stable with AdamW.
        lr_schedule: from the progress of training, 0 to 1, to a factor of all rates.
        scheduler: a torch scheduler of `optimizer` instead; ReduceLROnPlateau sees the selected score (`mode="max"`),
            or the loss (`mode="min"`) where nothing is selected.
        scheduler_every: "epoch" or "step".
        unfreezing: thaws layers epoch by epoch, at its own rates; without `optimizer` the default one starts with its
            groups.
        steps_per_epoch: by default as many as give each sample of the longer loader its turn.
        accumulate: batches of each domain whose gradients are averaged for one step. Each pair of batches has its own
            CORAL.
        clip_norm: largest norm of the gradient; None for any. Where the domains are far apart, CORAL's first gradients
            are large enough to ruin a pretrained network.
        precision: "float32"; "bfloat16" or "float16" for autocast, the latter with gradient scaling.
        compile: True, or options of torch.compile: the networks are compiled. The losses stay as they are: their
            kernels are fused already.
        source_validation, target_validation: labelled loaders to evaluate on after each epoch (the target's labels may
            be negative or missing).
        validators: scores of the target validation set to compute, of :data:`fastda.training.VALIDATORS`; one, or
            several.
        select: the validator to select by: the weights of its best epoch are kept. Without one, the last.
        patience: epochs without a better score of `select` after which training stops.
        checkpoint: a file, written atomically, from which the same call goes on where it was killed, to the bit on the
            CPU.
        checkpoint_every: steps between two; always after an epoch too.
        resume: go on from `checkpoint` if it is there; False begins anew.
        log: a .csv or .jsonl file to write the rows of the history to; begun anew but where training is resumed.
        log_every: steps between two rows; by default an epoch.
        tensorboard: a folder for TensorBoard, which has to be installed.
        on_row: called with each row.
        progress: a progress bar (tqdm): True, False, or None for one where tqdm is installed and the terminal shows it.
        device: by default the GPU if there is one, else where the method is.
        divide_loaders: False if the loaders are divided among processes already; a DistributedSampler is noticed.
        distributed: options of DistributedDataParallel, such as `{"find_unused_parameters": True}` for a network with
            parameters that no loss depends on.

    Returns:
        A :class:`Fit`.

    Raises:
        TypeError, ValueError: arguments of another kind, or that do not fit together; each says what to do.
        FloatingPointError: a loss or a weight that is not finite; the last checkpoint is from before it.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fastda.methods import DeepCORAL
        >>> from fastda.training import evaluate, fit
        >>> labels = torch.arange(64) % 2
        >>> inputs = torch.randn(64, 2) / 4 + torch.stack([labels, -labels], 1)
        >>> source = DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True)
        >>> target = DataLoader(TensorDataset(inputs.flip(0) * 2), batch_size=16, shuffle=True)
        >>> method = DeepCORAL(nn.Sequential(nn.Linear(2, 8), nn.Tanh()), nn.Linear(8, 2), weight=100.0)
        >>> result = fit(method, source, target, epochs=20)
        >>> sorted(result.history[-1])
        ['coral', 'coral_weight', 'epoch', 'loss', 'lr', 'step', 'task']
        >>> evaluate(method, source).accuracy > 0.9
        True
    """
    options = dict(locals())
    check(options)
    return Training(**options).run()


def check(options: dict) -> None:
    """What can be said of the arguments before anything is made."""
    if isinstance(options["validators"], str):
        options["validators"] = (options["validators"],)
    _check_each(options)
    _check_loaders(options)
    _check_optimizer(options["optimizer"], options["scheduler"])
    for one, other in EXCLUSIVE:
        if options[one] is not None and options[other] is not None:
            raise ValueError(f"{one}: expected one of {one} and {other}, got both; leave one of them out")
    if options["patience"] is not None and options["select"] is None:
        raise ValueError(
            f"select: expected a validator that patience goes by, got None; choose one of {', '.join(VALIDATORS)}"
        )
    if options["checkpoint_every"] is not None and options["checkpoint"] is None:
        raise ValueError("checkpoint: expected a file, since checkpoint_every is given, got None; pass one")
    if options["checkpoint"] is not None:
        path = Path(options["checkpoint"]).absolute()
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(
                f"checkpoint: expected a file in a folder that exists, got {str(path)!r}; "
                f"{'name a file in it' if path.is_dir() else 'make the folder'}"
            )
        for name in ("source", "target"):
            check_resumable(name, options[name])


def _check_each(options: dict) -> None:
    """Each argument by itself."""
    if not isinstance(options["method"], Method):
        compiled = isinstance(getattr(options["method"], "_orig_mod", None), Method)
        raise TypeError(
            f"method: expected one of fastda.methods, got {type(options['method']).__name__}; "
            f"{'pass the method itself, and compile=True' if compiled else 'wrap the networks in one'}"
        )
    for name in ("epochs", "accumulate"):
        checks.whole_number(name, options[name], 1)
    for name in ("steps_per_epoch", "patience", "checkpoint_every", "log_every"):
        if options[name] is not None:
            checks.whole_number(name, options[name], 1)
    for name in ("lr", "pretraining_lr", "clip_norm"):
        if options[name] is not None:
            checks.number(name, options[name], above=0)
    if options["weight_decay"] is not None:
        checks.number("weight_decay", options["weight_decay"], least=0)
    for name in ("lr_schedule", "on_row"):
        if options[name] is not None and not callable(options[name]):
            raise TypeError(f"{name}: expected a function, got {checks.describe(options[name])}; pass one, or None")
    for name in ("compile", "distributed"):
        if not isinstance(options[name], (bool, Mapping, type(None))):
            raise TypeError(
                f"{name}: expected a dictionary of options, got {checks.describe(options[name])}; pass one, such as "
                f"{dict(mode='max-autotune') if name == 'compile' else dict(find_unused_parameters=True)}"
            )
    checks.option("precision", options["precision"], tuple(PRECISIONS))
    checks.option("scheduler_every", options["scheduler_every"], ("epoch", "step"))
    for name in options["validators"]:
        checks.option("validators", name, VALIDATORS)
    if options["select"] is not None:
        checks.option("select", options["select"], VALIDATORS)


def _check_loaders(options: dict) -> None:
    """What the method and the validators need is there, and of the right kind."""
    method, target = options["method"], options["target"]
    if method.needs_target and target is None:
        raise ValueError(f"target: expected a loader, since {type(method).__name__} adapts to it, got None; pass one")
    if not method.needs_target and target is not None:
        raise ValueError(
            f"target: expected None, since {type(method).__name__} has nothing to do with a target, got a loader; "
            "leave it out, or choose a method that adapts"
        )
    for name in ("source", "target", "source_validation", "target_validation"):
        if options[name] is not None or name == "source":
            check_loader(name, options[name])
    for name in (*options["validators"], *([options["select"]] if options["select"] else [])):
        domain = "source" if name == "source_accuracy" else "target"
        if options[f"{domain}_validation"] is None:
            raise ValueError(
                f"{domain}_validation: expected a loader, which {name!r} is computed from, got None; pass one"
            )


def _check_optimizer(optimizer, scheduler) -> None:
    """An optimiser that steps on gradients, and a scheduler of it."""
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer, got {checks.describe(optimizer)}; "
            "make one over method.parameters()"
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure") if optimizer is not None else None
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"optimizer: expected one that steps on the gradients at hand, got {type(optimizer).__name__}, which "
            "evaluates the loss itself; choose another, such as torch.optim.SGD or AdamW"
        )
    if scheduler is None:
        return
    if optimizer is None:
        raise ValueError("scheduler: expected the optimizer that it belongs to beside it, got none; pass optimizer too")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ValueError(
            "scheduler: expected one of the optimizer given, got one of another optimiser, whose rates it would set; "
            "make it from this one"
        )
