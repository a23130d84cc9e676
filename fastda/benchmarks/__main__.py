"""`python -m fastda.benchmarks`: measure, write one record, print its table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from . import machine, tables
from .cases import Case, select
from .record import make_record, path_for, write


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m fastda.benchmarks", description=__doc__)
    result.add_argument("--output", type=Path, default=Path("bench/results"), help="folder of the record")
    result.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="topics, or parts of names; default all")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--budget", type=float, default=5.0, help="seconds of timing a case and number of threads")
    result.add_argument("--threads", type=int, nargs="+", help="default: all cores and one (on a GPU: all cores)")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--eager-only", action="store_true", help="leave out the compiled sides: seconds, no compiler")
    result.add_argument(
        "--dry-run", action="store_true", help="tiny sizes on the CPU, whatever the device: does it run at all?"
    )
    return result


def progress_bar() -> Callable[..., Iterable]:
    """tqdm, or a line a case where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return progress_lines
    return tqdm


def progress_lines(steps: Sequence[tuple[Case, int, int | None]], unit: str) -> Iterator[tuple[Case, int, int | None]]:
    for number, step in enumerate(steps, 1):
        case, threads, _ = step
        print(f"{unit} {number} of {len(steps)}: {case.name}, {threads} thread(s)", file=sys.stderr, flush=True)
        yield step


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        cases, sweeps = select(options.cases, options.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        cases, sweeps = [case.tiny("cpu") for case in cases], [sweep.tiny("cpu") for sweep in sweeps]
    elif options.device == "cuda" and not torch.cuda.is_available():
        print("device: expected a GPU for cuda, got none; use --device cpu or --dry-run", file=sys.stderr)
        return 2
    threads = options.threads or sorted({machine.cores()} | ({1} if options.device == "cpu" else set()), reverse=True)
    part = " ".join(options.cases)
    record = make_record(
        cases,
        threads,
        options.budget,
        sweeps,
        seed=options.seed,
        progress=progress_bar(),
        save=lambda record: write(record, path_for(record, options.output, part)),
        dry_run=options.dry_run,
        eager_only=options.eager_only,
    )
    path = path_for(record, options.output, part)
    parts = [tables.short_table(record), tables.figures_table(record)] if cases else []
    parts += map(tables.sweep_table, record["sweeps"])
    print(tables.heading(record), *parts, path, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
