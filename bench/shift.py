"""Is each kind of shift recognised, do the intervals hold, is there a false alarm, and how long does MMD take?

    python bench/shift.py kinds     # known shifts of real digits, about 15 minutes on one core
    python bench/shift.py mmd       # 100 000 × 100 000 samples, about 2 minutes on two cores

`fastda.shift.known_shifts` makes the shifts. Results go to bench/results/shift, or --output.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastda.benchmarks.machine import cores, processor
from fastda.benchmarks.record import git_revision
from fastda.files import write_atomically
from fastda.shift import diagnose, estimate_label_shift, mmd
from fastda.shift.known_shifts import KNOWN_SHIFTS, make
from fastda.shift.logistic import cross_fitted
from fastda.threads import one_thread

LABEL_SHIFTS = ("label: one rare class", "label: three rare classes")
REPEATS = {"none": 100, **dict.fromkeys(LABEL_SHIFTS, 100)}
OTHERS = 20  # repeats
INTERVAL_REPEATS = 200
SAMPLES, FEATURES, PERMUTATIONS = (1_000, 10_000, 100_000), 64, 200


def kinds(repeats: dict[str, int], interval_repeats: int) -> dict:
    """Everything about known shifts, with seeds 0, 1, …"""
    total = 2 * sum(repeats.values()) + interval_repeats * len(LABEL_SHIFTS)
    with one_thread(), tqdm(total=total, unit="data set", file=sys.stderr) as bar:
        recognised = {}
        for name, count in repeats.items():
            bar.set_description(name, refresh=False)
            recognised[name] = {"known": list(make(name, 0).kinds)}
            for given in ("without target labels", "with target labels"):
                recognised[name][given] = [
                    diagnosed(name, seed, given == "with target labels", bar) for seed in range(count)
                ]
        held = {name: [interval_of(name, seed, bar) for seed in range(interval_repeats)] for name in LABEL_SHIFTS}
    return {"recognised": recognised, "intervals": held}


def diagnosed(name: str, seed: int, labelled: bool, bar: tqdm) -> dict:
    """What the diagnosis says of one data set."""
    known = make(name, seed)
    report = diagnose(
        known.source,
        known.target,
        known.source_labels,
        known.target_labels if labelled else None,
        seed=seed,
        progress=False,
    )
    shift, concept = report.label_shift, report.concept
    bar.update()
    return {
        "kinds": list(report.kinds),
        "recommended": report.recommendation.method,
        "unsettled": concept is not None and bool(concept.unsettled),
        "within": within(shift, known.target_frequencies),
    }


def within(shift, frequencies: np.ndarray) -> list[bool]:
    """Class by class, whether the interval has the frequency from which labels were drawn."""
    return [bool(inside) for inside in (shift.low <= frequencies) & (frequencies <= shift.high)]


def interval_of(name: str, seed: int, bar: tqdm) -> dict:
    """The estimate alone, and what correcting the predictions by it gains."""
    known = make(name, 10_000 + seed)
    random = np.random.default_rng(seed)
    source, target = map(torch.from_numpy, (known.source, known.target))
    predictions = cross_fitted(source, known.source_labels, target, 10, random)
    shift = estimate_label_shift(known.source_labels, *predictions)
    bar.update()
    return {
        "within": within(shift, known.target_frequencies),
        "width": (shift.high - shift.low).tolist(),
        "right": [
            float((p.argmax(1) == known.target_labels).mean()) for p in (predictions[1], shift.correct(predictions[1]))
        ],
    }


def table(headings: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def counted(found: list[dict]) -> str:
    """Answers and how often each was given, the commonest first."""
    answers = Counter(" + ".join(entry["kinds"]) or "none" for entry in found)
    return ", ".join(f"{answer} {count}" for answer, count in answers.most_common())


def kinds_page(record: dict) -> str:
    recognised, intervals = record["recognised"], record["intervals"]
    given = ("without target labels", "with target labels")
    rows = []
    for name, found in recognised.items():
        first = found[given[0]]
        unsettled = sum(entry["unsettled"] for entry in found[given[1]])
        rows.append(
            [
                name,
                " + ".join(found["known"]) or "none",
                str(len(first)),
                *(counted(found[g]) for g in given),
                str(unsettled),
            ]
        )
    alarms = [
        [g, str(len(found)), str(sum(bool(entry["kinds"]) for entry in found))]
        for g, found in ((g, recognised["none"][g]) for g in given)
    ]
    coverage = []
    for name in LABEL_SHIFTS:
        for entries, where in (
            (recognised[name][given[0]], "diagnosis"),
            (intervals[name], "estimate alone, other data"),
        ):
            shares = 100 * np.mean([entry["within"] for entry in entries], 0)
            coverage.append(
                [f"{name}, {where}", str(len(entries)), *(f"{share:.4g}" for share in shares), f"{shares.min():.4g}"]
            )
    gains = []
    for name in LABEL_SHIFTS:
        before, after = 100 * np.array([entry["right"] for entry in intervals[name]]).T
        difference = after - before
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        gains.append([name, f"{before.mean():.2f}", f"{after.mean():.2f}", f"{difference.mean():+.2f} ± {half:.2f}"])
    return f"""# Known shifts of digits: what the diagnosis says

`python bench/shift.py kinds`; PyTorch {record["torch"]}, revision {record["revision"]}. The 1797 real digits of
scikit-learn, 64 pixels each: 790 source images, 79 of each digit, and up to 500 other images as target. A rare class is
10 % of the source and drawn with 1 % in the target. The classifier is the default, cross-fitted logistic regression.
Seeds 0, 1, …; how each shift is made: `fastda/shift/known_shifts.py`.

## Which shift is taken for what

{table(["shift", "is", "repeats", *(f"found {g}" for g in given), "concept unsettled"], rows)}

“Unsettled”: no weights make the source look like the target, so that with labels too, covariate shift and concept drift
cannot be told apart, and a warning says so. Without target labels concept drift cannot be seen, nor a label shift
behind a larger covariate shift; a warning says that too.

## False alarms

At the 5 % level, all tests of a diagnosis together:

{table(["", "data sets without a shift", "alarms"], alarms)}

## Intervals of class frequencies

How often, in % of the repeats, the frequency from which the target's labels were drawn lies within its 95 %
interval, by digit:

{table(["", "repeats", *map(str, range(10)), "lowest"], coverage)}

## What correcting the predictions gains

Accuracy on the target in %, before and after `LabelShift.correct`, mean over
{len(intervals[LABEL_SHIFTS[0]])} data sets and 95 % interval of the difference:

{table(["", "before", "after", "gain, points"], gains)}
"""


def time_mmd(sizes: tuple[int, ...], features: int, permutations: int) -> dict:
    """Seconds of whole calls, with all threads that PyTorch has."""
    timings = []
    for size in sizes:
        generator = torch.Generator().manual_seed(0)
        source, target = (torch.randn(size, features, generator=generator) for _ in range(2))
        target[:, 0] += 0.02  # a difference that only large samples show
        mmd(source[:500], target[:500], progress=False)
        start = time.perf_counter()
        found = mmd(source, target, permutations=permutations, progress=True)
        timings.append(
            {
                "samples": size,
                "seconds": time.perf_counter() - start,
                "squared": found.squared,
                "p_value": found.p_value,
                "null_deviation": found.null.std().item(),
            }
        )
    return {"timings": timings, "features": features, "permutations": permutations, "threads": torch.get_num_threads()}


def mmd_page(record: dict) -> str:
    columns, rows = record["features"] + 2 + record["permutations"] + 2, []
    for t in record["timings"]:
        entries = 2 * t["samples"] ** 2
        rows.append(
            [
                f"{t['samples']:,} × {t['samples']:,}".replace(",", " "),
                f"{t['seconds']:.2f}",
                f"{2 * entries * columns / t['seconds'] / 1e9:.0f}",
                f"{4 * (2 * t['samples']) ** 2 / 2**30:.2f}",
                f"{t['squared']:.2e}",
                f"{t['null_deviation']:.1e}",
                f"{t['p_value']:.3f}",
            ]
        )
    headings = ["samples", "seconds", "10⁹ operations a second", "kernel matrix, GiB (never made)"]
    headings += ["MMD²", "its deviation by permutation", "p"]
    return f"""# MMD with a permutation test: how long it takes

`python bench/shift.py mmd`; {record["processor"]}, {record["threads"]} of {record["cores"]} cores; PyTorch
{record["torch"]}, revision {record["revision"]}. {record["features"]} features, float32 tiles,
{record["permutations"]} permutations. The domains differ by 0.02 deviations in one feature.

{table(headings, rows)}

Predicted: of N = m + n points, N²/2 kernel entries, each of which costs a product over the features and one over the
permutations, 2({record["features"]} + 2 + {record["permutations"]} + 2) operations, and one exponential.
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("kinds", "mmd"))
    parser.add_argument("--output", type=Path, default=Path("bench/results/shift"))
    parser.add_argument("--repeats", type=int, help="of each shift and of the intervals, in place of 20 to 200")
    parser.add_argument("--samples", type=int, nargs="+", default=SAMPLES, help="of each domain, for MMD")
    options = parser.parse_args(arguments)
    record = {
        "torch": torch.__version__,
        "revision": (git_revision() or {}).get("revision", "unknown")[:12],
        "processor": processor(),
        "cores": cores(),
    }
    if options.part == "kinds":
        repeats = {name: options.repeats or REPEATS.get(name, OTHERS) for name in KNOWN_SHIFTS}
        record |= kinds(repeats, options.repeats or INTERVAL_REPEATS)
        name, page = "digits", kinds_page(record)
    else:
        record |= time_mmd(tuple(options.samples), FEATURES, PERMUTATIONS)
        name, page = "mmd", mmd_page(record)
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record) + "\n"
    write_atomically(options.output / f"{name}.json", lambda file: file.write(text.encode()))
    write_atomically(options.output / f"{name}.md", lambda file: file.write(page.encode()))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
