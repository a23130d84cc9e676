"""`fastda adapt`."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from pathlib import Path

from ..data_files import Samples, open_labels, open_pair
from ..threads import one_thread
from .folder import MARKDOWN, MODEL, PREDICTIONS
from .run import run as adapt
from .settings import BATCH_SIZE, LEARNING_RATE, METHODS, Settings
from .task import Task, make_task

SMALL = 4096  # numbers of a sample: below, threads cost more than they save
COPIES = 3  # as read, scaled, and scaled for adaptation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a classifier on a labelled source, adapt it to a target, and write the adapted model, its predictions "
        "for the target, and a report of before and after. Source and target: .npz, .npy, .csv, .parquet, or a folder "
        "of images."
    )
    parser.add_argument("source", type=Path, help="labelled samples")
    parser.add_argument("target", type=Path, help="samples to adapt to; labels may be missing, negative or empty")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help="auto (default): what `fastda diagnose` recommends; known target labels count in all but source-only and "
        "reweight, and the last three need them",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a new folder for the results; the same command again goes on where it was killed",
    )
    parser.add_argument(
        "--label", default="label", metavar="NAME", help="the column or key that has the labels (default: label)"
    )
    parser.add_argument(
        "--target-labels",
        type=Path,
        metavar="FILE",
        help="labels of the target's samples, in their order, to measure accuracy on; training does not see them",
    )
    parser.add_argument(
        "--measure-only", action="store_true", help="use labels in the target itself for measuring alone, too"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the images of a folder to this side")
    parser.add_argument("--epochs", type=int, metavar="N", help="of each training (default: about 500 steps)")
    parser.add_argument(
        "--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=f"samples of each domain ({BATCH_SIZE})"
    )
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=LEARNING_RATE,
        metavar="RATE",
        help=f"of the training on the source ({LEARNING_RATE}); adaptation has a tenth",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random (0)")
    parser.add_argument(
        "--network",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="a network of your own: function(input_shape, num_classes) returns a torch module whose last layer is "
        "linear, or a pair of feature extractor and label predictor",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Adapt and write; 0, or an error that says what to do."""
    settings = Settings(**{name: getattr(args, name) for name in Settings.names()})
    source, target = open_pair(args.source, args.target, label=args.label, image_size=args.image_size)
    task = read(args, source, target)
    names = (str(args.source), str(args.target))
    small = settings.network is None and math.prod(task.shape) <= SMALL
    try:
        with one_thread() if small else nullcontext():
            adaptation = adapt(task, settings, args.out, names=names, say=lambda line: print(line, file=sys.stderr))
    except FloatingPointError as error:
        raise ValueError(f"{error}; --learning-rate {settings.learning_rate / 10:g}, for example") from error
    print(f"\n{adaptation.report.summary()}\n")
    for name in (MODEL, PREDICTIONS, MARKDOWN):
        print(f"Wrote {args.out / name}")
    return 0


def read(args: argparse.Namespace, source: Samples, target: Samples) -> Task:
    """Both domains, in memory; labels for measuring from their own file."""
    measured = None
    if args.target_labels is not None:
        options = {"count": len(target), "class_names": source.class_names, "label": args.label}
        measured = open_labels(args.target_labels, **options)
    for samples in (source, target):
        samples.check_memory(copies=COPIES)
    (x, y), (target_x, target_y) = source.read(), target.read()
    return make_task(
        x,
        y,
        target_x,
        target_y,
        measured,
        source.class_names,
        measure_only=args.measure_only,
        seed=args.seed,
        names=(str(args.source), str(args.target)),
        feature_names=source.feature_names,
    )

