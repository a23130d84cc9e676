"""What does `fastda adapt` recover, method by method, on the files of `fastda demo --write-data`?

    python bench/adapt.py images --output bench/results/adapt               # 3 seeds, 2 minutes on one core
    python bench/adapt.py images --shots 5 --output bench/results/adapt
    python bench/adapt.py pixels --output bench/results/adapt

Each run is the command itself, on files: the demo's studio and phone images, as images or as vectors of their pixels;
the target without labels, or with some of each digit. Everything is at the command's defaults.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastda import cli
from fastda.adapting import load_model
from fastda.adapting.folder import JSON
from fastda.benchmarks.machine import cores, processor
from fastda.benchmarks.record import git_revision
from fastda.demo.data import NUM_CLASSES, Digits, make_domains
from fastda.files import write_atomically
from fastda.intervals import interval

WITHOUT = ("prototypes", "coral", "dann", "auto")
WITH = ("prototypes", "coral", "dann", "finetune", "auto")
FORMS = ("images", "pixels")


def samples(digits: Digits, form: str) -> np.ndarray:
    return digits.images.numpy() if form == "images" else digits.images.flatten(1).numpy()


def write(folder: Path, seed: int, form: str, shots: int) -> Digits:
    """source.npz, target.npz with so many labels of each digit, target_labels.npz; returns further phone images."""
    domains = make_domains(seed)
    source, target = domains.source_train, domains.target_train
    labels = target.labels.numpy()
    seen = np.concatenate([np.flatnonzero(labels == digit)[:shots] for digit in range(NUM_CLASSES)])
    known = np.full(len(labels), -1)
    known[seen] = labels[seen]
    np.savez(folder / "source.npz", features=samples(source, form), labels=source.labels.numpy())
    np.savez(folder / "target.npz", features=samples(target, form), labels=known)
    np.savez(folder / "target_labels.npz", labels=labels)
    return domains.target_test


def adapt(folder: Path, method: str, seed: int, test: Digits, form: str) -> dict:
    """One run of the command: what its report says, what it does on further images, and its time on the processor."""
    out = folder / method
    files = [str(folder / name) for name in ("source.npz", "target.npz", "target_labels.npz")]
    argv = ["adapt", *files[:2], "--target-labels", files[2], "--method", method]
    argv += ["--seed", str(seed), "--out", str(out)]
    begin = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        code = cli.main(argv)
    if code:
        raise SystemExit(errors.getvalue())
    seconds = time.process_time() - begin
    report = json.loads((out / JSON).read_text(encoding="utf-8"))
    model = load_model(out)
    further = torch.from_numpy(samples(test, form))
    share = {when: report[when]["target_accuracy"]["share"] for when in ("before", "after")}
    source = report["before"]["source_accuracy"]["share"]
    return {
        "chosen": report["choice"]["method"],
        **share,
        "source": source,
        "recovered": (share["after"] - share["before"]) / (source - share["before"]),
        "further": (model.logits(further).argmax(1) == test.labels).double().mean().item(),
        "seconds": seconds,
    }


def measure(form: str, shots: int, seeds: range) -> dict[str, list[dict]]:
    """By method, a run a seed."""
    methods = WITH if shots else WITHOUT
    found: dict = {method: [] for method in methods}
    with tqdm(total=len(seeds) * len(methods), file=sys.stderr, unit="run") as bar:
        for seed in seeds:
            with tempfile.TemporaryDirectory() as name:
                test = write(Path(name), seed, form, shots)
                for method in methods:
                    bar.set_description(f"{method}, seed {seed}", refresh=False)
                    found[method].append(adapt(Path(name), method, seed, test, form))
                    bar.update()
    return found


def percent(rows: list[dict], quantity: str) -> str:
    mean, half = interval([100 * row[quantity] for row in rows])
    return f"{mean:.1f} ± {half:.1f}"


def table(methods: dict[str, list[dict]]) -> str:
    lines = ["| method | before, % | after, % | gap recovered, % | further phone images, % | seconds |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for method, rows in methods.items():
        chosen = sorted({row["chosen"] for row in rows})
        name = method if chosen == [method] else f"{method}: {', '.join(chosen)}"
        cells = [percent(rows, quantity) for quantity in ("before", "after", "recovered", "further")]
        lines.append(f"| {name} | {' | '.join(cells)} | {np.median([row['seconds'] for row in rows]):.0f} |")
    return "\n".join(lines)


def markdown(form: str, shots: int, found: dict, seeds: range, revision: dict | None) -> str:
    kind = "images of 16 × 16 pixels" if form == "images" else "vectors of the 256 pixels of images"
    known = f"of which {shots} of each digit have a label" if shots else "none of which has a label"
    return f"""# fastda adapt on the demo's digits, as {form}, {shots or "no"} labels a class

`python bench/adapt.py {form} --shots {shots}`; PyTorch {torch.__version__}, {processor()}, {cores()} cores, one
thread{at(revision)}. Each number is the mean ± half the 95 % interval (Student t) over seeds 0 to {len(seeds) - 1};
seconds are of processor time, medians.

The source are 574 labelled studio images of digits, the target 573 phone images of others,
{known}, as {kind}: what
`fastda demo --write-data` writes. Before: a network that has seen the source alone, the command's own, on the target.
After: adapted; both on those target images whose label training did not see. The gap is what lies between before and
that network's accuracy on source images that it was not trained on. Further phone images: 400 that are in neither file.
Everything is at the command's defaults.

{table(found)}
"""


def at(revision: dict | None) -> str:
    return "" if revision is None else f", revision {revision['revision'][:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("--shots", type=int, default=0, help="labelled samples of each class of the target")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("bench/results/adapt"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    revision, seeds = git_revision(), range(args.seeds)
    found = measure(args.form, args.shots, seeds)
    args.output.mkdir(parents=True, exist_ok=True)
    what = {"form": args.form, "shots": args.shots, "seeds": args.seeds}
    content = {**what, "revision": revision, "torch": torch.__version__, "runs": found}
    for suffix, text in (
        ("json", json.dumps(content, indent=2)),
        ("md", markdown(args.form, args.shots, found, seeds, revision).rstrip()),
    ):
        data, path = text.encode() + b"\n", args.output / f"{args.form}-{args.shots}-labels.{suffix}"
        write_atomically(path, lambda file, data=data: file.write(data))


if __name__ == "__main__":
    main()
