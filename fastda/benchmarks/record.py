"""One JSON record a machine and date: everything that was measured, and what it was measured with."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastda import backend
from fastda.kernels import cpp

from . import machine
from .baselines import FUSED, Absent, Side, make_side, side_names
from .cases import GROUP_FIGURES, Case, Figure, Sweep
from .correctness import Check
from .memory import memory
from .timing import PHASES, Refused, Times, compare

FORMAT = 1
PACKAGES = ("torch", "numpy", "triton", "fastda-kernels", "pytorch-adapt", "easyfsl", "learn2learn")


# One case


def measure(
    case: Case,
    budget: float,
    seed: int = 0,
    limits: machine.Limits | None = None,
    *,
    eager_only: bool = False,
    sides: Sequence[str] | None = None,
) -> dict:
    """The sides of a case, all by default, at the present number of threads, as a row of the record."""
    torch.compiler.reset()  # each case, and each number of threads, compiles afresh
    arguments = case.arguments(seed)
    names = side_names(case) if sides is None else sides
    left_out = {name for name in names if eager_only and name.endswith(" compiled")}
    made = [
        Absent(name, "compiled sides were left out") if name in left_out else make_side(case, name) for name in names
    ]
    present = [side for side in made if isinstance(side, Side)]
    checks: dict[object, Check] = {}

    def check(side: Side) -> Check:
        if side.truth not in checks:
            checks[side.truth] = Check(case, arguments, seed, side.truth)
        return checks[side.truth]

    found, rounds = compare(present, check, budget, seed, partial(deciding, case, present), case.patience)
    rows = {}
    for side in made:
        if isinstance(side, Absent):
            rows[side.name] = {"reason": side.reason}
        elif isinstance(times := found[side.name], Refused):
            rows[side.name] = {"reason": f"no time: {times.reason}"}
        else:
            rows[side.name] = {
                "times": {phase: summary(times, phase, found.get(FUSED)) for phase in PHASES if phase in times.samples},
                "memory": memory(side.call, arguments, case.device, seed),
                "errors": times.errors,
                "baseline": side.is_baseline,
            }
    row = {
        "name": case.name,
        "topic": case.topic,
        "op": case.op,
        "sizes": case.sizes,
        "dtype": str(case.dtype).removeprefix("torch."),
        "device": case.device,
        "threads": torch.get_num_threads(),
        "phase": case.phase,
        "rounds": rounds,
        "work": dataclasses.asdict(case.work),
        "sides": rows,
        "ratios": {phase: ratio for phase in PHASES if (ratio := speed(rows, phase)) is not None},
    }
    if case.beyond_reference:
        row["note"] = f"the reference's differences take {case.difference_bytes / 1e9:.1f} GB: careful code stands in"
    if limits is not None and "times" in rows[FUSED]:
        row["share_of_limit"] = limits.seconds(case.work, case.dtype) / rows[FUSED]["times"][case.phase]["median"]
    row["figures"] = [outcome(case, figure, row) for figure in case.figures]
    return row


def deciding(case: Case, sides: Sequence[Side], found: dict[str, Times | Refused]) -> set[str]:
    """The sides that decide about the figures: the fused op, and all that may be the fastest of those it is to beat.

    None where there is nothing to compare: a side alone runs on caches that no other has used meanwhile.
    """
    names: set[str] = set()
    for figure in case.figures:
        if figure.quantity != "speed":
            continue
        against = {side.name for side in sides if side.is_baseline} if figure.against is None else set(figure.against)
        medians = {name: x.median(case.phase) for name, x in found.items() if name in against and isinstance(x, Times)}
        names.update(name for name, seconds in medians.items() if seconds < 2 * min(medians.values()))
    return names | {FUSED} if names and isinstance(found[FUSED], Times) else set()


def summary(times: Times, phase: str, fused: Times | Refused | None) -> dict:
    """Seconds (median, quartiles, number of samples), and how many times as long as the fused op's (with interval)."""
    lower, upper = times.quartiles(phase)
    comparable = isinstance(fused, Times)
    return {
        "median": times.median(phase),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "samples": len(times.samples[phase]),
        "over_fused": times.over(fused, phase) if comparable else None,
        "over_fused_interval": times.interval_over(fused, phase) if comparable else None,
    }


def speed(sides: dict[str, dict], phase: str, against: Sequence[str] | None = None) -> dict | None:
    """Time of the fastest baseline over that of the fused op; None where one of them has no time."""
    ratios = {
        name: side["times"][phase]["over_fused"]
        for name, side in sides.items()
        if phase in side.get("times", {}) and (side["baseline"] if against is None else name in against)
    }
    if not ratios or phase not in sides[FUSED].get("times", {}):
        return None
    fastest = min(ratios, key=ratios.get)
    interval = sides[fastest]["times"][phase]["over_fused_interval"]
    return {"against": fastest, "ratio": ratios[fastest], "interval": interval}


def outcome(case: Case, figure: Figure, row: dict) -> dict:
    """The figure, what was measured, and whether it is reached (None: not measured)."""
    value = interval = None
    if figure.quantity == "speed":
        ratio = speed(row["sides"], case.phase, figure.against)
        if ratio is not None:
            value, interval = ratio["ratio"], ratio["interval"]
    elif figure.quantity == "memory":
        if "memory" in row["sides"][FUSED]:
            value = row["sides"][FUSED]["memory"]["extra"] / case.logits_bytes
    elif figure.quantity == "megabytes":
        if "memory" in row["sides"][FUSED]:
            value = row["sides"][FUSED]["memory"]["extra"] / 1e6
    elif figure.quantity == "seconds":
        if "times" in row["sides"][FUSED] and row["threads"] > 1:  # of two cores
            value = row["sides"][FUSED]["times"][case.phase]["median"]
    elif figure.quantity == "limit":
        value = row.get("share_of_limit")
    return judged(figure, value, interval)


def judged(figure: Figure, value: float | None, interval: tuple[float, float] | None = None) -> dict:
    reached = None
    if value is not None:
        at_most = figure.quantity in ("memory", "megabytes", "seconds")
        reached = value <= figure.bound if at_most else value >= figure.bound
    return {"figure": str(figure), "bound": figure.bound, "value": value, "interval": interval, "reached": reached}


def group_outcomes(rows: Sequence[dict]) -> list[dict]:
    """Figures for a geometric mean, for each number of threads at which all of their cases were measured."""
    outcomes = []
    for group in GROUP_FIGURES:
        for threads in sorted({row["threads"] for row in rows}, reverse=True):
            ratios = [
                speed(row["sides"], row["phase"], group.figure.against)
                for row in rows
                if row["threads"] == threads and row["name"] in group.cases
            ]
            if len(ratios) == len(group.cases) and None not in ratios:
                mean = math.exp(sum(math.log(ratio["ratio"]) for ratio in ratios) / len(ratios))
                outcomes.append({"group": group.name, "threads": threads, **judged(group.figure, mean)})
    return outcomes


def growth(rows: Sequence[dict], sweep: Sweep) -> dict[str, float]:
    """By what factor the time of each side grows when the size doubles: a line through the logarithms."""
    factors = {}
    for side in sweep.sides:
        points = [
            (math.log2(row["sizes"][sweep.axis]), math.log2(row["sides"][side]["times"][row["phase"]]["median"]))
            for row in rows
            if row["sizes"][sweep.axis] >= sweep.growth_from and "times" in row["sides"][side]
        ]
        if len(points) > 1:
            factors[side] = 2 ** statistics.linear_regression(*zip(*points)).slope
    return factors


# The record


def make_record(
    cases: Sequence[Case],
    threads: Sequence[int],
    budget: float,
    sweeps: Sequence[Sweep] = (),
    *,
    seed: int = 0,
    progress: Callable[..., Iterable] = lambda steps, **options: steps,
    save: Callable[[dict], None] = lambda record: None,
    dry_run: bool = False,
    eager_only: bool = False,
) -> dict:
    """Measure all cases of one device at each number of threads, and the sweeps at the largest.

    `progress` wraps the steps, as tqdm does. `save` gets the record so far after each case, so that a run which is cut
    short leaves what it measured.
    """
    every = [*cases, *(case for sweep in sweeps for case in sweep.cases)]
    device, before = every[0].device, torch.get_num_threads()
    record = {
        "format": FORMAT,
        "machine": machine.name(device),
        "dry_run": dry_run,
        "complete": False,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "processor": machine.processor(),
        "cores": machine.cores(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": list(threads),
        "load_before": machine.load(),
        "versions": versions(),
        "build": cpp.status.stamp,
        "git": git_revision(),
        "serving": [dataclasses.asdict(row) for row in backend.serving()],
        "seed": seed,
        "budget_seconds": budget,
        "limits": {},
        "cases": [],
        "groups": [],
        "sweeps": [
            {
                "name": sweep.name,
                "axis": sweep.axis,
                "threads": max(threads),
                "growth_from": sweep.growth_from,
                "growth": {},
                "cases": [],
            }
            for sweep in sweeps
        ],
    }
    try:
        limits = {}
        for count in threads:
            torch.set_num_threads(count)
            small = {"size": 64, "rounds": 2} if dry_run else {}
            limits[count] = machine.limits(device, {case.dtype for case in every}, **small)
            record["limits"][str(count)] = dataclasses.asdict(limits[count])
        steps = [(case, count, None) for case in cases for count in threads]
        steps += [(case, max(threads), number) for number, sweep in enumerate(sweeps) for case in sweep.cases]
        for done, (case, count, sweep) in enumerate(progress(steps, unit="case"), 1):
            torch.set_num_threads(count)
            sides = None if sweep is None else sweeps[sweep].sides
            row = measure(case, budget, seed, limits[count], eager_only=eager_only, sides=sides)
            if sweep is None:
                record["cases"].append(row)
                record["groups"] = group_outcomes(record["cases"])
            else:
                record["sweeps"][sweep]["cases"].append(row)
                record["sweeps"][sweep]["growth"] = growth(record["sweeps"][sweep]["cases"], sweeps[sweep])
            record["complete"] = done == len(steps)
            save(record)
    finally:
        torch.set_num_threads(before)
    return record


def versions() -> dict[str, str | None]:
    """Of Python and the packages that matter; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    return found


def git_revision() -> dict | None:
    """Revision of the checkout of fastda that one stands in, and whether its files were changed; else None."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        if not (Path(git("rev-parse", "--show-toplevel")) / "fastda" / "reference").is_dir():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return None


def path_for(record: dict, folder: Path, part: str = "") -> Path:
    """`<machine>-<date>.json`; a record of some cases only has their names in it, so that it replaces no whole one."""
    words = [record["machine"], record["date"][:10], machine.slug(part), "dry-run" if record["dry_run"] else ""]
    return folder / ("-".join(word for word in words if word) + ".json")


def write(record: dict, path: Path) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: Path) -> dict:
    """A record; a ValueError if its format is another one."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("format") != FORMAT:
        got = record.get("format")
        raise ValueError(f"{path}: expected a record of format {FORMAT}, got {got!r}; measure it again")
    return record
