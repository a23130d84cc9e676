"""`fastda predict`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..data_files import Samples, open_samples
from ..data_files.labels import UNKNOWN
from ..files import check_writable
from ..progress import progress_bar
from .measure import Accuracy
from .model import AdaptedModel, load_model
from .predictions import write_predictions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Classify samples with a model that `fastda adapt` wrote, chunk by chunk, so that files may be larger than "
        "memory; where they have labels, say how many are right."
    )
    parser.add_argument("model", type=Path, help="model.safetensors, or the folder that it is in")
    parser.add_argument("data", type=Path, help=".npz, .npy, .csv, .parquet, or a folder of images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write row, label and confidence to a .csv file")
    parser.add_argument(
        "--label", default="label", metavar="NAME", help="the column or key that has labels, if any (default: label)"
    )
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="resize the images of a folder to this side")
    parser.add_argument(
        "--network", metavar="PACKAGE.MODULE:FUNCTION", help="the model's network, where it is one of your own"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")


def run(args: argparse.Namespace) -> int:
    """Predict, print, write; 0, or an error that says what to do."""
    check_writable("--out", args.out)
    model = load_model(args.model, network=args.network).to(args.device)
    samples = open_samples(
        args.data,
        label=args.label,
        image_size=args.image_size,
        feature_names=model.feature_names or None,
        channels=model.shape[0] if args.data.is_dir() and len(model.shape) == 3 else None,
    )
    model.check(torch.empty(0, *samples.shape), str(args.data))
    counts = Counts(model, samples)
    with progress_bar(None, total=len(samples), unit="sample") as bar:
        chunks = counts.logits(bar)
        if args.out is None:
            for _ in chunks:
                pass
        else:
            write_predictions(args.out, chunks, model.classes)
    print(counts.table())
    if args.out is not None:
        print(f"Wrote {args.out}")
    return 0


class Counts:
    """What a model says of samples, added up while chunks go by."""

    def __init__(self, model: AdaptedModel, samples: Samples) -> None:
        self.model, self.samples = model, samples
        self.predicted = torch.zeros(len(model.classes), dtype=torch.int64)
        self.sure = torch.zeros(len(model.classes), dtype=torch.float64)
        self.right = self.labelled = 0
        position = {name: index for index, name in enumerate(model.classes)}
        self.positions = torch.tensor([position.get(name, len(position)) for name in samples.class_names])

    def logits(self, bar) -> Iterator[Tensor]:
        """Of all samples, chunk by chunk."""
        for inputs, labels in self.samples.chunks():
            logits = self.model.logits(inputs)
            confidence, predicted = logits.double().softmax(1).max(1)
            self.predicted += torch.bincount(predicted, minlength=len(self.predicted))
            self.sure.index_add_(0, predicted, confidence)
            if labels is not None:
                known = labels != UNKNOWN
                self.labelled += int(known.sum())
                self.right += int((self.positions[labels[known]] == predicted[known]).sum())
            bar.update(len(inputs))
            yield logits

    def table(self) -> str:
        """How many of which class, and how sure."""
        total = int(self.predicted.sum())
        rows = [("class", "samples", "share, %", "confidence, %")]
        for name, count, sure in zip(self.model.classes, self.predicted.tolist(), self.sure.tolist()):
            share = f"{100 * count / total:.1f}"
            rows.append((str(name), str(count), share, f"{100 * sure / count:.1f}" if count else "–"))
        rows.append(("all", str(total), "100.0", f"{100 * float(self.sure.sum()) / total:.1f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = []
        for name, *numbers in rows:
            lines.append("  ".join([name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:]))]))
        if self.labelled:
            found = Accuracy.of_counts(self.right, self.labelled)
            lines.append(
                f"\nright: {100 * found.share:.1f} % of {found.count} labelled samples (95 % interval "
                f"{100 * found.low:.1f} to {100 * found.high:.1f})"
            )
        return "\n".join(lines)
