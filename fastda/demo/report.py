"""Running all methods over all seeds, and the table of what came out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import fastda

from ..intervals import interval
from .data import NUM_CLASSES, Domains, Phone, make_domains
from .model import DigitNetwork
from .train import METHODS, STEPS, Method, Trainer, predict, train

OPS = ("coral_loss", "gradient_reversal", "domain_adversarial_loss")  # what the methods call
TIMED_STEPS, WARM_UP_STEPS = 100, 10


@dataclass(frozen=True)
class Result:
    """One method trained with one seed, on held-out images. Shares from 0 to 1."""

    method: str
    seed: int
    source_accuracy: float
    target_accuracy: float
    target_confidence: float  # mean probability of the predicted class
    class_accuracy: list[float]  # of target images, by digit


@dataclass(frozen=True)
class StepTime:
    """Median milliseconds of a training step."""

    reference: float
    fused: float


@dataclass(frozen=True)
class Report:
    """All numbers, and what the figure draws: data and networks of the first seed."""

    results: list[Result]
    step_times: dict[str, StepTime]
    domains: Domains
    networks: dict[str, DigitNetwork]

    @property
    def seeds(self) -> list[int]:
        return sorted({result.seed for result in self.results})

    def values(self, method: str, quantity: str) -> list[float]:
        """`quantity` of one method, a value a seed."""
        return [getattr(result, quantity) for result in self.results if result.method == method]

    def recovered(self, method: str) -> list[float]:
        """Share of the gap between source-only and the upper bound, a value a seed; NaN where there is no gap."""
        lower, upper = self.values("source-only", "target_accuracy"), self.values("upper bound", "target_accuracy")
        reached = self.values(method, "target_accuracy")
        return [(r - low) / (up - low) if up > low else math.nan for r, low, up in zip(reached, lower, upper)]

    def as_dict(self) -> dict:
        """All numbers of all seeds, for JSON."""
        results = [asdict(result) for result in self.results]
        for method in METHODS:
            own = [result for result in results if result["method"] == method]
            for result, recovered in zip(own, self.recovered(method)):
                result["gap_recovered"] = None if math.isnan(recovered) else recovered
        return {
            "results": results,
            "milliseconds_a_step": {method: asdict(times) for method, times in self.step_times.items()},
            "fused_served_by": served_by(),
            "phone": asdict(Phone()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }


def run_all(seeds: Sequence[int], steps: int = STEPS, progress: Callable[[str], object] = lambda doing: None) -> Report:
    """Train every method with every seed, then time a step of each; `progress` is told before each step."""
    results, networks = [], {}
    for seed in seeds:
        data = make_domains(seed)
        for name, method in METHODS.items():
            network, _ = train(method, data, seed, steps=steps, after_step=lambda: progress(f"seed {seed}, {name}"))
            results.append(evaluate(name, seed, network, data))
            if seed == seeds[0]:
                domains, networks[name] = data, network
    step_times = {
        name: time_steps(method, domains, seeds[0], after_step=lambda: progress(f"timing, {name}"))
        for name, method in METHODS.items()
    }
    return Report(results, step_times, domains, networks)


def number_of_steps(seeds: Sequence[int], steps: int) -> int:
    """How often `run_all` calls `progress`."""
    return len(METHODS) * (len(seeds) * steps + WARM_UP_STEPS + TIMED_STEPS)


def evaluate(name: str, seed: int, network: DigitNetwork, data: Domains) -> Result:
    """Accuracy and confidence on the held-out images of both domains."""
    source_classes, _ = predict(network, data.source_test)
    classes, confidence = predict(network, data.target_test)
    correct, labels = (classes == data.target_test.labels).double(), data.target_test.labels
    return Result(
        method=name,
        seed=seed,
        source_accuracy=(source_classes == data.source_test.labels).double().mean().item(),
        target_accuracy=correct.mean().item(),
        target_confidence=confidence.double().mean().item(),
        class_accuracy=[correct[labels == digit].mean().item() for digit in range(NUM_CLASSES)],
    )


def time_steps(method: Method, data: Domains, seed: int, after_step: Callable[[], object]) -> StepTime:
    """Two trainers with the same seed, one a side, take turns, and take turns in going first; the median of each."""
    trainers = {backend: Trainer(method, data, seed, torch.float32, STEPS) for backend in ("reference", "auto")}
    milliseconds: dict[str, list[float]] = {backend: [] for backend in trainers}
    for step in range(WARM_UP_STEPS + TIMED_STEPS):
        for backend in sorted(trainers, reverse=step % 2 == 1):
            with fastda.use_backend(backend):
                start = time.perf_counter()
                trainers[backend].step()
                milliseconds[backend].append(1e3 * (time.perf_counter() - start))
        after_step()
    reference, fused = (statistics.median(milliseconds[backend][WARM_UP_STEPS:]) for backend in ("reference", "auto"))
    return StepTime(reference, fused)


def served_by() -> dict[str, str]:
    """Which backend an automatic choice gives each op on the CPU."""
    return {row.op: row.backend for row in fastda.backend.serving() if row.op in OPS and row.device == "cpu"}


def percent(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± half interval, in %."""
    mean, half = interval([100 * value for value in values])
    if math.isnan(mean):
        return "–"
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def print_table(report: Report, console: Console) -> None:
    """The table, and what was measured."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for heading in ("studio\nright, %", "phone\nright, %", "phone con-\nfidence, %", "gap re-\ncovered, %"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("ms a step\nreference", justify="right", no_wrap=True)
    table.add_column("\nfused", justify="right", no_wrap=True)
    for method, times in report.step_times.items():
        quantities = ("source_accuracy", "target_accuracy", "target_confidence")
        table.add_row(
            method,
            *(percent(report.values(method, quantity)) for quantity in quantities),
            {"source-only": "0", "upper bound": "100"}.get(method) or percent(report.recovered(method), digits=0),
            f"{times.reference:.2f}",
            f"{times.fused:.2f}",
        )
    console.print(table)
    console.print(explanation(report), highlight=False, soft_wrap=True)


def explanation(report: Report) -> str:
    """In words what the table shows and how it was measured."""
    seeds, data = report.seeds, report.domains
    several = f"mean ± 95 % interval (Student t) over {len(seeds)} seeds"
    which = several if len(seeds) > 1 else "one seed, so no interval"
    threads = f"{torch.get_num_threads()} thread" + ("s" if torch.get_num_threads() > 1 else "")
    served = ", ".join(f"{op} {backend}" for op, backend in served_by().items())
    return (
        f"Right: accuracy on held-out images, {len(data.source_test)} studio and {len(data.target_test)} phone;\n"
        f"{which}.\n"
        f"Trained on {len(data.source_train)} labelled studio images and {len(data.target_train)} phone images of "
        f"other digits,\nwhose labels only the upper bound sees.\n"
        f"Gap recovered: 0 is source-only, 100 the upper bound; seed by seed.\n"
        f"ms a step: median of {TIMED_STEPS} training steps on {threads}, the sides taking turns.\n"
        f"Source-only and upper bound call no op of fastda: what differs there is noise.\n"
        f"Fused: {served}."
    )
