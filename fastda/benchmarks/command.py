"""`fastda bench`: the short table, on the user's own machine, in under a minute."""

from __future__ import annotations

import argparse
import sys

import torch

from ..progress import progress_bar
from . import machine, tables
from .cases import CPU_CASES, GPU_CASES, Case, select
from .record import make_record

# One of each kind, all of which together take half a minute; the rest is bench/README.md's.
SHORT = (
    "coral 32×256",
    "coral 64×1024",
    "coral 1024×512",
    "covariance 16 batches of 256×128",
    "5-way 1-shot Q 75 D 640",
    "20-way 5-shot Q 300 D 64",
    "64 episodes 5-way 1-shot Q 75 D 640",
    "60-way 5-shot Q 300 D 1600",
    "reversal fork 256×2048",
    "domain-adversarial loss 64+64",
)
BUDGET = 0.5  # seconds of timing a case
LEGEND = (
    "Above 1×: fastda is faster. Plain PyTorch: fastda.reference. Best other: the fastest of that, PyTorch written by\n"
    "hand with care (“careful”), and pytorch-adapt, easyfsl and learn2learn where they are installed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure fastda against plain PyTorch and careful hand-written PyTorch in eager mode, and against libraries\n"
        "that are installed, and print the table. Every side is held to the result in float64 before it is timed.\n"
        "Nothing is written: records, with compiled baselines and all cases, are made by python -m fastda.benchmarks."
    )
    parser.epilog = "examples:\n  fastda bench\n  fastda bench --cases coral --threads 1"
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="NAME", help="topics, or parts of names; default: a few"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU, where there is one")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET,
        help=f"seconds of timing a case, some cases up to 60 times as many; default {BUDGET:g}",
    )


def run(args: argparse.Namespace) -> int:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected a GPU for cuda, got none; use --device cpu")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    if not args.budget > 0:
        raise ValueError(f"budget: expected seconds above 0, got {args.budget}")
    cases = select(args.cases, device)[0] if args.cases else short(device)
    if not cases:
        raise ValueError(f"cases: expected cases, got sweeps alone; name one of {', '.join(SHORT)}")
    with progress_bar(None, total=len(cases), unit="case", leave=False) as bar:
        record = make_record(
            cases,
            [args.threads or machine.cores()],
            args.budget,
            save=lambda record: bar.update(),
            eager_only=True,
        )
    print(tables.heading(record), tables.aligned(tables.short_table(record)), LEGEND, sep="\n\n")
    refused = [
        f"{row['name']}: {name} has no time: {side['reason']}"
        for row in record["cases"]
        for name, side in row["sides"].items()
        if side.get("reason", "").startswith("no time: ")
    ]
    print(*refused, sep="\n", end="\n" * bool(refused), file=sys.stderr)
    return 0


def short(device: str) -> list[Case]:
    if device == "cuda":
        return [case for case in GPU_CASES if case.dtype == torch.float32]
    return [case for case in CPU_CASES if case.name in SHORT]
