"""`fastda demo`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from rich.console import Console
from tqdm import tqdm

from ..files import check_writable, write_atomically
from ..threads import one_thread
from .export import write_domains
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
    parser.add_argument(
        "--write-data",
        type=Path,
        metavar="FOLDER",
        help="train nothing: write both domains to source.npz and target.npz there, for fastda diagnose",
    )


def run(args: argparse.Namespace) -> int:
    """Train, print the table, write the figure; 0, or an error that names the argument."""
    if args.write_data is not None:
        return write_data(args.write_data)
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


def write_data(folder: Path) -> int:
    """The domains as files, and what to try on them."""
    try:
        for path, words in write_domains(folder):
            print(f"Wrote {path}: {words}")
    except OSError as error:
        raise ValueError(
            f"--write-data: expected a folder that can be made or written to, got {str(folder)!r} "
            f"({error.strerror}); choose another"
        ) from error
    print(f"Next: fastda diagnose {shlex.quote(str(folder / 'source.npz'))} {shlex.quote(str(folder / 'target.npz'))}")
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError for what would fail only after minutes of training."""
    for name, value in (("--seeds", args.seeds), ("--steps", args.steps)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    check_writable("--figure", args.figure)
    check_writable("--json", args.json)
