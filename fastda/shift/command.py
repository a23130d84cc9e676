"""`fastda diagnose`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..data_files import Samples, open_pair
from ..data_files.labels import listed
from ..files import check_writable
from ..threads import one_thread
from .advice import DOMAINS, MODALITIES, SCENARIOS
from .kinds import LEAST_PERMUTATIONS, diagnose
from .report import ShiftReport
from .samples import LEAST_SAMPLES

SIDE = 16  # pixels: of larger images, averages are looked at
SMALL = 5_000_000  # numbers in both samples: below, one thread is the fastest
MAX_SAMPLES = 10_000
COPIES = 16  # of both domains in float32: in float64, standardised, put together


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help="what the model was trained on, with labels where there are any")
    parser.add_argument("target", type=Path, help="what it meets now: .npz, .npy, .csv, .parquet or a folder of images")
    parser.add_argument("--label", default="label", metavar="NAME", help="column or key of the labels (default: label)")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize the images of folders to N×N pixels")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw classes, features and confidence: .png, .pdf")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument("--alpha", type=float, default=0.05, help="probability of a false alarm (default: 0.05)")
    parser.add_argument(
        "--max-samples",
        type=int,
        default=MAX_SAMPLES,
        metavar="N",
        help=f"of each domain; of more, a random part is looked at (default: {MAX_SAMPLES})",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (default: 0)")
    advice = parser.add_argument_group("what the advice is for, where it is not what the files say")
    labelled = advice.add_mutually_exclusive_group()
    labelled.add_argument("--labelled", type=int, metavar="N", help="target samples with labels, in all")
    labelled.add_argument("--labelled-per-class", type=int, metavar="N", help="the same, of each class")
    advice.add_argument("--unlabelled", type=int, metavar="N", help="target samples without")
    advice.add_argument("--modality", choices=MODALITIES, help="what the samples are")
    advice.add_argument("--domains", choices=DOMAINS, help="by default as far apart as the domains were found to be")
    names = [row.name for row in SCENARIOS]
    advice.add_argument("--scenario", choices=names, metavar="NAME", help=f"one of: {'; '.join(names)}")


def run(args: argparse.Namespace) -> int:
    """Read, diagnose, print; 0, or an error that names the file or the argument."""
    check(args)
    source, target = open_pair(args.source, args.target, label=args.label, image_size=args.image_size, labelled=False)
    situation = the_situation(args, source)
    report = dataclasses.replace(diagnose_samples(source, target, args), situation=situation)
    report.print()
    print(f"\n{report.recommendation.how()}")
    if source.labels is not None and report.recommendation.method != "none":
        print(f"In one command: {adapt_command(args)}\n")
    for path, write in ((args.figure, report.plot), (args.json, report.save)):
        if path is not None:
            print(f"Wrote {write(path)}")
    return 0


def adapt_command(args: argparse.Namespace) -> str:
    """What follows the recommendation on the same files."""
    words = ["fastda", "adapt", str(args.source), str(args.target), "--out", "adapted"]
    words += ["--label", args.label] if args.label != "label" else []
    words += ["--image-size", str(args.image_size)] if args.image_size is not None else []
    return shlex.join(words)


def check(args: argparse.Namespace) -> None:
    """Raise a ValueError for what would fail only when the work is done."""
    bounds = {"labelled": 0, "labelled_per_class": 0, "unlabelled": 0, "image_size": 1, "max_samples": LEAST_SAMPLES}
    for name, least in bounds.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}; pass a larger one")
    if not 0 < args.alpha <= 0.5:
        raise ValueError(f"--alpha: expected a number above 0 and at most 0.5, got {args.alpha}; 0.05 is usual")
    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}; pass another")
    check_writable("--figure", args.figure)
    check_writable("--json", args.json)
    if args.figure is not None and args.figure.suffix:
        from .figure import formats

        if args.figure.suffix.lower().lstrip(".") not in formats():
            raise ValueError(
                f"--figure: expected a suffix of {', '.join(formats())}, got {args.figure.suffix!r}; choose one of them"
            )


def the_situation(args: argparse.Namespace, source: Samples) -> dict:
    """Arguments of `recommend` that are not what the report says."""
    situation = {
        "modality": args.modality or ("images" if len(source.shape) == 3 else "features"),
        "same_task": source.labels is not None,
    }
    if args.labelled_per_class is not None:
        if not source.class_names:
            raise ValueError(
                f"--labelled-per-class: expected labels in {source.path}, to know how many classes there are, got "
                "none; pass --labelled"
            )
        situation["labelled"] = args.labelled_per_class * len(source.class_names)
    chosen = {name: getattr(args, name) for name in ("labelled", "unlabelled", "domains", "scenario")}
    return situation | {name: value for name, value in chosen.items() if value is not None}


def diagnose_samples(source: Samples, target: Samples, args: argparse.Namespace) -> ShiftReport:
    """Read as much as is looked at, and diagnose it."""
    for samples in (source, target):
        if len(samples) < LEAST_SAMPLES:
            raise ValueError(
                f"{samples.path}: expected at least {LEAST_SAMPLES} samples, got {len(samples)}: of fewer nothing can "
                "be told; collect more"
            )
        flat(samples).check_memory(min(len(samples), args.max_samples), COPIES)
    drawn = [flat(samples).draw(args.max_samples, args.seed) for samples in (source, target)]
    check_classes(source, drawn[0][1])
    small = sum(x.numel() for x, _ in drawn) <= SMALL
    with one_thread() if small else nullcontext():
        report = diagnose(
            drawn[0][0],
            drawn[1][0],
            names(source, drawn[0][1]),
            names(target, drawn[1][1]) if source.labels is not None else None,
            feature_names=feature_names(source),
            alpha=args.alpha,
            permutations=max(LEAST_PERMUTATIONS, 200),
            max_samples=args.max_samples,
            seed=args.seed,
        )
    warnings = [
        f"of {len(samples)} {which} samples a random {args.max_samples} are looked at; --max-samples takes more"
        for samples, which in ((source, "source"), (target, "target"))
        if len(samples) > args.max_samples
    ]
    if max(source.shape[1:], default=0) > SIDE:
        height, width = (min(side, SIDE) for side in source.shape[1:])
        warnings.append(
            f"of the images, averages over {height}×{width} parts are looked at; what a network's layer gives, saved "
            "with numpy.savez(..., features=...), shows more"
        )
    return dataclasses.replace(
        report,
        num_source=len(source),
        num_target=len(target),
        num_labelled=target.num_labelled,
        num_unlabelled=len(target) - target.num_labelled,
        warnings=tuple(warnings) + report.warnings,
    )


def check_classes(source: Samples, labels: Tensor | None) -> None:
    """A class of one sample could not be both learnt and tested."""
    if labels is None:
        return
    counts = labels.bincount(minlength=len(source.class_names)).tolist()
    rare = [name for name, count in zip(source.class_names, counts) if count < 2]
    if rare:
        raise ValueError(
            f"{source.path}: expected at least 2 samples of each of the {len(counts)} classes, got fewer of "
            f"{listed(rare)}; merge or drop such classes, or name another column of labels (--label)"
        )


def flat(samples: Samples) -> Samples:
    """Images as vectors of pixels, larger ones averaged."""
    if len(samples.shape) == 1:
        return samples
    channels, *sides = samples.shape
    sides = [min(side, SIDE) for side in sides]

    def blocks(rows: int) -> Iterator[np.ndarray]:
        for images, _ in samples.chunks(rows):
            yield adaptive_avg_pool2d(images, sides).flatten(1).numpy()

    return dataclasses.replace(samples, shape=(channels * math.prod(sides),), blocks=blocks)


def feature_names(samples: Samples) -> list[str] | None:
    if len(samples.shape) == 1:
        return list(samples.feature_names) or None
    channels, *sides = samples.shape
    colours = {1: ["pixel"], 3: ["red", "green", "blue"]}.get(channels, [f"channel {i}" for i in range(channels)])
    rows, columns = (min(side, SIDE) for side in sides)
    return [f"{colour} {i}, {j}" for colour in colours for i in range(rows) for j in range(columns)]


def names(samples: Samples, labels: Tensor | None) -> list | None:
    """Labels as the file has them; None where unknown."""
    if labels is None:
        return None
    return [None if label < 0 else samples.class_names[label] for label in labels.tolist()]
