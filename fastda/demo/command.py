"""`fastda demo`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from ..files import check_writable, write_atomically
from .figure import draw
from .report import number_of_steps, print_table, run_all
from .train import STEPS

FIGURE = "fastda-demo.png"
TABLE_WIDTH = 100  # characters, where standard output is not a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="train with seeds 0 to N − 1 (default: 5)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"steps of a training (default: {STEPS})")
    parser.add_argument(
        "--figure", type=Path, default=Path(FIGURE), metavar="FILE", help=f"PNG to write (default: {FIGURE})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers of all seeds to FILE as well")


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write the figure; 0, or an error that names the argument."""
    check(args)
    seeds = range(args.seeds)
    with one_thread():
        with tqdm(total=number_of_steps(seeds, args.steps), unit="step", file=sys.stderr) as bar:

            def progress(doing: str) -> None:
                bar.set_description(doing, refresh=False)
                bar.update()

            report = run_all(seeds, args.steps, progress)
        console = Console()
        console.width = console.width if console.is_terminal else TABLE_WIDTH
        print_table(report, console)
        figure = draw(report)
    write_atomically(args.figure, lambda file: figure.savefig(file, format="png", dpi=150))
    if args.json is not None:
        text = json.dumps({"seeds": list(seeds), "steps": args.steps, **report.as_dict()}, indent=2, allow_nan=False)
        write_atomically(args.json, lambda file: file.write(text.encode() + b"\n"))
    for path in (args.figure, args.json):
        if path is not None:
            print(f"Wrote {path}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError for what would fail only after minutes of training."""
    for name, value in (("--seeds", args.seeds), ("--steps", args.steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    check_writable("--figure", args.figure)
    check_writable("--json", args.json)


@contextmanager
def one_thread() -> Iterator[None]:
    """The tensors are so small that more threads cost more than they save, and the last bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
