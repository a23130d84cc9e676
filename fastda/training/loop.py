"""The loop that `fit` runs, and everything of it that a checkpoint holds."""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..finetuning import GradualUnfreezing
from ..finetuning.learning_rates import decays
from ..methods import Method
from ..progress import NoBar, progress_bar
from ..reference import checks
from . import checkpoint as checkpoints
from . import loaders, random_states
from .data import to_device, unpack
from .distributed import join
from .evaluation import Evaluation, autocast, evaluate
from .metrics import MetricsFile, tensorboard
from .validators import OF_TARGET

PRETRAINING_LR = 0.1
SLOWER = 10
"""How many times slower than pretraining fine-tuning is: steps as large as then would undo what was learnt."""
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-3

_logger = logging.getLogger("fastda")


@dataclass(frozen=True)
class Fit:
    """What came of a training.

    Attributes:
        history: the rows that were logged: step, epoch, the mean of each loss since the last row and of their sum
            (`loss`), the rate (`lr`), the scheduled weights and λ, and after an epoch what validation found.
        best: the row that was selected, whose weights the method has now; None where nothing was selected.
        steps: steps done.
        stopped_early: whether `patience` ended it.
    """

    history: list[dict[str, float]]
    best: dict[str, float] | None
    steps: int
    stopped_early: bool


class _Objective(nn.Module):
    """The losses as a module's forward, which is what DistributedDataParallel wraps."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, *batch) -> dict[str, Tensor]:
        return self.method.losses(*batch)


class Training:
    """One run of `fit`; everything that a checkpoint holds is an attribute of it."""

    def __init__(self, method: Method, source, target, **options) -> None:
        self.method, self.options = method, options
        self.processes, self.device = join(options["device"], method)
        method.to(self.device)
        self.streams = self._streams(source, target)
        self.accumulate, self.epochs = options["accumulate"], options["epochs"]
        self.steps_per_epoch = options["steps_per_epoch"] or self._steps_per_epoch()
        self.total_steps = self.epochs * self.steps_per_epoch
        self.unfreezing: GradualUnfreezing | None = options["unfreezing"]
        self.optimizer = options["optimizer"] or self._default_optimizer()
        self.scheduler = options["scheduler"]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options["precision"] == "float16")

        self.step = self.epoch = self.logged_step = 0
        self.epochs_without_better = 0
        self.stopped_early = False
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.sums: dict[str, Tensor] = {}

        self.checkpoint = None if options["checkpoint"] is None else Path(options["checkpoint"])
        first = self.processes.is_first
        self.log = MetricsFile(options["log"], self._columns()) if options["log"] is not None and first else None
        self.compiled: list[nn.Module] = []
        self.writer = None
        self.bar = NoBar()

    # What is made of the arguments

    def _streams(self, source, target) -> dict[str, loaders.Stream]:
        given = {"source": source} | ({} if target is None else {"target": target})
        if self.processes.group is not None:
            # One seed for the order of the data, drawn by the first process; the others draw differently from here on.
            seed = self.processes.of_first(int(torch.randint(2**31, ())))
            if not self.processes.is_first:
                torch.manual_seed(seed + self.processes.rank)
            if self.options["divide_loaders"]:
                rank, world = self.processes.rank, self.processes.world
                given = {name: loaders.share(name, loader, rank, world, seed) for name, loader in given.items()}
        else:
            for name, loader in given.items():
                loaders.check_batches(name, loader, self.method.least_samples)
        return {name: loaders.Stream(name, loader) for name, loader in given.items()}

    def _steps_per_epoch(self) -> int:
        longest = max(loaders.length(name, stream.loader) for name, stream in self.streams.items())
        return max(1, math.ceil(longest / self.accumulate))

    def _default_optimizer(self) -> torch.optim.Optimizer:
        lr = self.options["lr"] or (self.options["pretraining_lr"] or PRETRAINING_LR) / SLOWER
        weight_decay = WEIGHT_DECAY if self.options["weight_decay"] is None else self.options["weight_decay"]
        if self.unfreezing is not None:
            groups = self.unfreezing.parameter_groups()
        else:
            named = list(self.method.named_parameters())
            groups = [
                {"params": [p for name, p in named if decays(name, p)]},
                {"params": [p for name, p in named if not decays(name, p)], "weight_decay": 0.0},
            ]
        return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, weight_decay=weight_decay)

    def _columns(self) -> list[str]:
        target_task = ["target_task"] if self.method.uses_target_labels else []
        columns = ["step", "epoch", "loss", "task", *target_task, *self.method.terms, "lr", *self.method.scheduled()]
        for domain in ("source", "target"):
            if self.options[f"{domain}_validation"] is not None:
                columns += [f"{domain}_accuracy", f"{domain}_confidence", f"{domain}_loss"]
        columns += [name for name in OF_TARGET if name in self._validators()]
        return columns

    def _validators(self) -> list[str]:
        return [*self.options["validators"], *([self.options["select"]] if self.options["select"] else [])]

    # The run

    def run(self) -> Fit:
        try:
            self._start()
            while self.epoch < self.epochs and not self.stopped_early:
                self._train_epoch()
            if self.best_weights is not None:
                self.method.load_state_dict(self.best_weights)
        finally:
            self._finish()
        return Fit(self.history, self.best, self.step, self.stopped_early)

    def _start(self) -> None:
        self.method.process_group = self.processes.group
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        self._thaw()
        if self.checkpoint is not None and self.options["resume"] and self.processes.of_first(self.checkpoint.exists()):
            self._load()
        elif self.log is not None:
            self.log.begin()
        self._check_optimizer()
        first = self.processes.is_first
        folder = self.options["tensorboard"]
        progress = self.options["progress"] if first else False
        self.bar = progress_bar(progress, total=self.total_steps, initial=self.step, unit="step")
        self.writer = tensorboard(folder, self.step) if folder is not None and first else None
        if self.options["compile"]:
            compile_options = {} if self.options["compile"] is True else dict(self.options["compile"])
            self.compiled = [self.method.feature_extractor, self.method.label_predictor]
            for network in self.compiled:
                network._compiled_call_impl = _compiled(network, compile_options)
        self.objective = self._wrap()

    def _finish(self) -> None:
        self.bar.close()
        self.method.process_group = None
        for network in self.compiled:
            network._compiled_call_impl = None
        for stream in self.streams.values():
            stream.close()
        if self.writer is not None:
            self.writer.close()

    def _wrap(self) -> nn.Module:
        objective = _Objective(self.method)
        if self.processes.group is None:
            return objective
        from torch.nn.parallel import DistributedDataParallel

        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(objective, **{"device_ids": devices} | dict(self.options["distributed"] or {}))

    def _thaw(self) -> bool:
        """Whether layers joined for this epoch."""
        if self.unfreezing is None:
            return False
        return bool(self.unfreezing.start_epoch(self.epoch, self.optimizer, self.scheduler))

    def _train_epoch(self) -> None:
        if self._thaw():
            self.objective = self._wrap()  # DistributedDataParallel looks only once at what learns
        self.method.train()
        while self.step < (self.epoch + 1) * self.steps_per_epoch:
            self._train_step()
            self.bar.update()
            last = self.step == (self.epoch + 1) * self.steps_per_epoch
            every = self.options["log_every"]
            if every is not None and self.step % every == 0 and not last:
                self._write_row()
            every = self.options["checkpoint_every"]
            if every is not None and self.step % every == 0 and not last:
                self._save()
        self.epoch += 1
        found = self._validate()
        row = self._write_row(found)
        self._select(row)
        if self.scheduler is not None and self.options["scheduler_every"] == "epoch":
            self._step_scheduler(row)
        self._save()

    def _train_step(self) -> None:
        progress = self.step / self.total_steps
        self.method.set_progress(progress)
        if self.options["lr_schedule"] is not None:
            factor = self.options["lr_schedule"](progress)
            checks.number(f"lr_schedule at progress {progress:.3g}", factor, least=0)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        for turn in range(self.accumulate):
            batch = [part for name, stream in self.streams.items() for part in self._batch(name, stream.next())]
            apart = turn < self.accumulate - 1 and self.processes.group is not None
            with self.objective.no_sync() if apart else nullcontext():
                with autocast(self.device, self.options["precision"]):
                    losses = self.objective(*batch)
                total = sum(losses.values())
                self.scaler.scale(total / self.accumulate).backward()
            for name, loss in {"loss": total, **losses}.items():
                self.sums[name] = self.sums.get(name, 0) + loss.detach().double() / self.accumulate
        if self.options["clip_norm"] is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, self.options["clip_norm"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.scheduler is not None and self.options["scheduler_every"] == "step":
            self._step_scheduler(None)

    def _batch(self, name: str, batch) -> tuple:
        inputs, labels = unpack(name, to_device(batch, self.device))
        if name == "source" and labels is None:
            raise ValueError(
                "source: expected batches of (inputs, labels), got inputs alone; let the data set give both"
            )
        return inputs, labels

    def _step_scheduler(self, row: dict[str, float] | None) -> None:
        if not isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step()
            return
        score = self.options["select"] or "loss"
        mode = "max" if self.options["select"] else "min"
        if row is None or self.scheduler.mode != mode:
            raise ValueError(
                f"scheduler: expected ReduceLROnPlateau with mode={mode!r}, since it follows {score!r}, and "
                f"scheduler_every='epoch', got mode={self.scheduler.mode!r}, {self.options['scheduler_every']!r}; "
                "change it"
            )
        self.scheduler.step(row[score])

    # What is found and written down

    @torch.no_grad()
    def _means(self) -> dict[str, float]:
        """Mean losses since the last row, over all processes."""
        steps = self.step - self.logged_step
        values = self.processes.mean(torch.stack(list(self.sums.values()))) / steps
        means = dict(zip(self.sums, values.tolist()))
        for name, value in means.items():
            if not math.isfinite(value):
                raise self._not_finite(
                    f"{name}: not finite ({value}) within steps {self.logged_step + 1} to {self.step}"
                )
        return means

    def _check_weights(self) -> None:
        """A gradient that is not finite ruins them though the losses were."""
        named = dict(self.method.named_parameters())
        if named and not torch.stack([p.detach().isfinite().all() for p in named.values()]).all():
            name = next(name for name, p in named.items() if not p.detach().isfinite().all())
            raise self._not_finite(f"{name}: weights that are not finite after step {self.step}")

    @staticmethod
    def _not_finite(what: str) -> FloatingPointError:
        return FloatingPointError(
            f"{what}; lower the rate or the loss weights, clip the gradient (clip_norm), or look at the data"
        )

    def _write_row(self, found: dict[str, float] | None = None) -> dict[str, float]:
        row = {"step": self.step, "epoch": self.epoch, **self._means(), "lr": self._lr(), **self.method.scheduled()}
        row |= found or {}
        self.history.append(row)
        self.sums, self.logged_step = {}, self.step
        if self.log is not None:
            self.log.write(row)
        if self.writer is not None:
            for name, value in row.items():
                if name != "step":
                    self.writer.add_scalar(name, value, self.step)
            self.writer.flush()
        shown = ("loss", "source_accuracy", "target_accuracy")
        self.bar.set_postfix({name: f"{row[name]:.4g}" for name in shown if name in row}, refresh=False)
        if self.options["on_row"] is not None and self.processes.is_first:
            self.options["on_row"](dict(row))
        return row

    def _lr(self) -> float:
        """The rate of the top layer, or of the only group."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)

    def _validate(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for domain in ("source", "target"):
            loader = self.options[f"{domain}_validation"]
            if loader is not None:
                result: Evaluation = evaluate(
                    self.method, loader, device=self.device, precision=self.options["precision"]
                )
                found |= {f"{domain}_{name}": getattr(result, name) for name in ("accuracy", "confidence", "loss")}
                if domain == "target":
                    wanted = {name: OF_TARGET[name] for name in OF_TARGET if name in self._validators()}
                    found |= {name: score(result.logits) for name, score in wanted.items()}
        return self.processes.of_first(found)  # all select, and stop, alike

    def _select(self, row: dict[str, float]) -> None:
        name = self.options["select"]
        if name is None:
            return
        if math.isnan(row[name]):
            raise ValueError(
                f"select: expected a score, got NaN for {name!r}: its validation loader has no labels; add them"
            )
        if self.best is None or row[name] > self.best[name]:
            self.best, self.epochs_without_better = row, 0
            self.best_weights = {key: value.detach().cpu().clone() for key, value in self.method.state_dict().items()}
        else:
            self.epochs_without_better += 1
        self._judge_patience()

    def _judge_patience(self) -> None:
        patience = self.options["patience"]
        self.stopped_early = patience is not None and self.epochs_without_better >= patience

    # Checkpoints

    def _identity(self) -> dict:
        """What has to be the same for a checkpoint to go on from."""
        return {
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "accumulate": self.accumulate,
            "precision": self.options["precision"],
            "select": self.options["select"],
            "processes": self.processes.world,
            "method": type(self.method).__name__,
            "optimizer": type(self.optimizer).__name__,
            "lr": max(float(group["initial_lr"]) for group in self.optimizer.param_groups),
            "weight_decay": max(float(group.get("weight_decay", 0.0)) for group in self.optimizer.param_groups),
            "weights": [[name, list(value.shape)] for name, value in self.method.state_dict().items()],
        }

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        if self.sums:
            self._means()  # raises rather than keep a state that is ruined
        self._check_weights()
        own = {
            "random": random_states.capture(),
            "streams": {name: stream.state_dict() for name, stream in self.streams.items()},
            "sums": self.sums,
        }
        own["generators"] = {
            name: random_states.capture(s.generators)["generators"] for name, s in self.streams.items()
        }
        every = self.processes.gather(own)
        if self.processes.is_first:
            state = {
                "identity": self._identity(),
                "step": self.step,
                "epoch": self.epoch,
                "logged_step": self.logged_step,
                "epochs_without_better": self.epochs_without_better,
                "history": self.history,
                "best": self.best,
                "best_weights": self.best_weights,
                "log_length": self.log.length if self.log is not None else 0,
                "method": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "unfreezing": None if self.unfreezing is None else self.unfreezing.state_dict(),
                "processes": every,
            }
            checkpoints.save(self.checkpoint, state)

    def _load(self) -> None:
        state = checkpoints.load(self.checkpoint)
        for name, now in self._identity().items():
            before = state["identity"][name]
            if before != now:
                shown = "other layers or shapes" if name == "weights" else f"{before!r}"
                raise ValueError(
                    f"checkpoint: expected one of this training, got one with {name} {shown}, where now it is "
                    f"{'the method given' if name == 'weights' else repr(now)}; remove {str(self.checkpoint)!r}, name "
                    "another file, or pass resume=False"
                )
        self.method.load_state_dict(state["method"])
        if self.unfreezing is not None:
            self.unfreezing.load_state_dict(state["unfreezing"], self.optimizer, self.scheduler)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        for name in ("step", "epoch", "logged_step", "epochs_without_better", "history", "best", "best_weights"):
            setattr(self, name, state[name])
        self._judge_patience()
        own = state["processes"][self.processes.rank]
        self.sums = {name: value.to(self.device) for name, value in own["sums"].items()}
        for name, stream in self.streams.items():
            stream.load_state_dict(own["streams"][name])
        for name, stream in self.streams.items():
            for generator, generator_state in zip(stream.generators, own["generators"][name], strict=True):
                generator.set_state(generator_state)
        random_states.restore(own["random"])
        if self.log is not None:
            self.log.begin(state["log_length"])
        _logger.info("training goes on from step %d of %d, found in %s", self.step, self.total_steps, self.checkpoint)

    def _check_optimizer(self) -> None:
        """A parameter that learns but is in no optimiser would stay as it is, and nobody would know."""
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        learning = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        missing = [name for name, p in learning.items() if id(p) not in held]
        if not learning:
            raise ValueError("method: expected parameters that learn, got none, all are frozen; unfreeze some")
        if missing:
            given = "optimizer" if self.options["optimizer"] is not None else "unfreezing"
            raise ValueError(
                f"{given}: expected all parameters of the method that learn, got none of {', '.join(missing[:3])}"
                f"{', ...' if len(missing) > 3 else ''}; make it from method"
                f"{'.parameters()' if given == 'optimizer' else ''}, or freeze them"
            )


def _compiled(network: nn.Module, options: dict):
    """As `network.compile` does, which silently leaves PyTorch's own containers and layers as they are: it needs a
    function from elsewhere to begin at."""

    def call(*args, **kwargs):
        return network._call_impl(*args, **kwargs)

    return torch.compile(call, **options)
