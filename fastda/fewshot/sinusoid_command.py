"""`fastda sinusoid`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ..files import check_writable, write_atomically
from ..intervals import interval
from .maml import MAML
from .sinusoid import (
    INNER_LR,
    ITERATIONS,
    METHODS,
    TASKS,
    TEST_STEPS,
    TEST_TASKS,
    NewTasks,
    draw_new_tasks,
    task_errors,
    train,
)

FIGURE = "fastda-sinusoid.png"
MEDIANS = (1, 2, 5, 10)  # steps
TABLE_WIDTH = 100  # characters, where standard output is not a terminal
PUBLISHED = (
    "Published: 0.67 with 5 shots after one step (Finn, Abbeel & Levine, 2017). An independent run of all 70 000\n"
    "iterations gave 0.718 ± 0.063, first-order MAML 1.105, pretraining 2.80."
)


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of a method on the test curves, a value for each number of steps in TEST_STEPS.

    Attributes:
        mean: over the curves. Beyond the one step that is trained for, a single curve that diverges rules it.
        half_width: of the mean's 95 % interval, Student t over the curves.
        median: over the curves.
    """

    mean: list[float]
    half_width: list[float]
    median: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Learn to learn sine curves: the regression experiment of the MAML paper. Trains MAML, first-order MAML and a\n"
        "pretrained network, prints their errors on new curves, and draws fits before and after adaptation."
    )
    parser.add_argument("--shots", type=int, default=5, metavar="K", help="support points of a curve (default: 5)")
    parser.add_argument(
        "--iterations",
        type=int,
        default=ITERATIONS,
        metavar="N",
        help=f"of training (default: {ITERATIONS}, the paper's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of weights, training and test curves (default: 0)"
    )
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile: ten times slower")
    parser.add_argument(
        "--figure", type=Path, default=Path(FIGURE), metavar="FILE", help=f"PNG to write (default: {FIGURE})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE as well")


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write the figure; 0, or an error that names the argument."""
    check(args)
    from .sinusoid_figure import draw

    learners = {}
    with tqdm(total=len(METHODS) * args.iterations, unit="iteration", file=sys.stderr) as bar:
        for method in METHODS:
            bar.set_description(method)
            learners[method] = train(
                method,
                shots=args.shots,
                iterations=args.iterations,
                seed=args.seed,
                compile=not args.no_compile,
                after_step=bar.update,
            )
    tasks = draw_new_tasks(args.shots, args.seed)
    errors = {method: measure(learner, tasks) for method, learner in learners.items()}
    console = Console()
    console.width = console.width if console.is_terminal else TABLE_WIDTH
    print_table(errors, args, console)
    figure = draw(learners, errors, tasks)
    write_atomically(args.figure, lambda file: figure.savefig(file, format="png", dpi=150))
    if args.json is not None:
        numbers = {"shots": args.shots, "iterations": args.iterations, "seed": args.seed, "torch": torch.__version__}
        numbers |= {"steps": list(TEST_STEPS), "errors": {method: as_dict(error) for method, error in errors.items()}}
        text = json.dumps(numbers, indent=2, allow_nan=False) + "\n"
        write_atomically(args.json, lambda file: file.write(text.encode()))
    for path in (args.figure, args.json):
        if path is not None:
            print(f"Wrote {path}")
    return 0


def measure(learner: MAML, tasks: NewTasks) -> Errors:
    errors = [task_errors(learner, tasks, steps).double() for steps in TEST_STEPS]
    means, half_widths = zip(*map(interval, errors))
    return Errors(list(means), list(half_widths), [error.median().item() for error in errors])


def as_dict(errors: Errors) -> dict[str, list[float | None]]:
    """For JSON, which knows no infinity."""
    return {name: [x if math.isfinite(x) else None for x in values] for name, values in asdict(errors).items()}


def print_table(errors: dict[str, Errors], args: argparse.Namespace, console: Console) -> None:
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for heading in ("before:\nmean", "1 step:\nmean", *(f"{n} step{'s' * (n > 1)}:\nmedian" for n in MEDIANS)):
        table.add_column(heading, justify="right", no_wrap=True)
    for method, error in errors.items():
        means = (f"{error.mean[steps]:.3f} ± {error.half_width[steps]:.3f}" for steps in (0, 1))
        table.add_row(method, *means, *(f"{error.median[steps]:.3f}" for steps in MEDIANS))
    console.print(table)
    console.print(
        f"Squared error on {TEST_TASKS} new curves from {args.shots} points each; means ± 95 % interval (Student t).\n"
        f"Steps of {INNER_LR}. Trained for one: {args.iterations} iterations of {TASKS} curves, seed {args.seed}.\n"
        f"{PUBLISHED}",
        highlight=False,
        soft_wrap=True,
    )


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError for what would fail only after minutes of training."""
    for name, value, least in (
        ("--shots", args.shots, 1),
        ("--iterations", args.iterations, 1),
        ("--seed", args.seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    check_writable("--figure", args.figure)
    check_writable("--json", args.json)
