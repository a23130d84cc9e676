"""From records to tables and plots: `python bench/report.py [RECORD.json ...] --output FOLDER`.

Writes, for each record, `<record>.md` (every side, misses marked), `<record>-summary.md` (the README's short table)
and the plots `<record>-<topic>-time.png`, `<record>-<topic>-memory.png`, `<record>-<sweep>.png`,
`<record>-ratios.png` and `<record>-limits.png`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastda.benchmarks import machine, tables
from fastda.benchmarks import record as records
from fastda.benchmarks.baselines import FUSED

RESULTS = Path(__file__).parent / "results"
REACHED, MISSED, UNJUDGED = "#2a7f62", "#c4513d", "#8a8f98"
SWEPT = {"reference": MISSED, "careful": UNJUDGED}
LEAST_POINTS = 2


def rows_with_all_threads(record: dict) -> list[dict]:
    return [case for case in record["cases"] if case["threads"] == max(record["threads"])]


def elements(case: dict) -> int:
    """How large a case is: the number of feature values that go in."""
    sizes = case["sizes"]
    if "samples" in sizes:
        return sizes.get("batch", 1) * sizes["samples"] * sizes.get("features", 1)
    support = sizes["classes"] * sizes.get("shots", 1)
    return sizes.get("episodes", 1) * (support + sizes.get("queries", 0)) * sizes["features"]


def plot_against_size(cases: Sequence[dict], topic: str, quantity: str, path: Path) -> bool:
    """Time or peak memory of each side against the size of the input, both axes logarithmic.

    Points only: cases of one size differ in shape, and a line through them would show a trend that is none.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for name, side in case["sides"].items():
            if case["topic"] != topic or case["phase"] != "both" or "times" not in side:
                continue
            value = side["times"]["both"]["median"] * 1e3 if quantity == "time" else side["memory"]["peak"] / 2**20
            if value > 0:
                lines.setdefault(name, []).append((elements(case), value))
    if len({point for line in lines.values() for point, _ in line}) < LEAST_POINTS:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        ours = name == FUSED
        axes.plot(
            *zip(*sorted(points)),
            linestyle="",
            marker="D" if ours else "o",
            markersize=7 if ours else 4,
            color=REACHED if ours else None,
            zorder=3 if ours else 2,
            label="fastda" if ours else name,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="input features (samples × features)",
        ylabel="forward + backward, ms" if quantity == "time" else "peak memory, MiB",
        title=topic.replace("_", " "),
    )
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def plot_sweep(sweep: dict, path: Path) -> bool:
    """Time against the size that grows, both axes logarithmic, so that a power of the size is a straight line."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in sweep["cases"]:
        for name, side in case["sides"].items():
            if "times" in side:
                milliseconds = side["times"][case["phase"]]["median"] * 1e3
                lines.setdefault(name, []).append((case["sizes"][sweep["axis"]], milliseconds))
    if not lines or max(map(len, lines.values())) < LEAST_POINTS:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in lines.items():
        ours = name == FUSED
        factor = sweep["growth"].get(name)
        growth = f": slope {math.log2(factor):.2f}, ×{factor:.2f} a doubling" if factor else ""
        axes.plot(
            *zip(*points),
            marker="D" if ours else "o",
            markersize=7 if ours else 4,
            color=REACHED if ours else SWEPT.get(name),
            zorder=3 if ours else 2,
            label=f"{'fastda' if ours else name}{growth}",
        )
    sizes = sorted({size for points in lines.values() for size, _ in points})
    axes.axvspan(max(sizes[0], sweep["growth_from"]), sizes[-1], color="black", alpha=0.04, linewidth=0)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"{sweep['axis']} (shaded: where the slope is fitted)",
        ylabel="forward + backward, ms",
        title=f"{sweep['name']}, {sweep['threads']} threads",
    )
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.grid(True, which="major", linewidth=0.4)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def plot_ratios(cases: Sequence[dict], path: Path) -> bool:
    """Best baseline over fastda, a bar a case; red where a figure to reach is missed."""
    rows = [(case, case["ratios"][case["phase"]]) for case in cases if case["phase"] in case["ratios"]]
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.3 * len(rows)), layout="constrained")
    for place, (case, ratio) in enumerate(reversed(rows)):
        verdicts = [outcome["reached"] for outcome in case["figures"]]
        colour = MISSED if False in verdicts else REACHED if True in verdicts else UNJUDGED
        axes.barh(place, ratio["ratio"] - 1, left=1, color=colour, height=0.7)
        text = f" {ratio['ratio']:.2g}× {ratio['against']}"
        axes.annotate(text, (max(ratio["ratio"], 1), place), va="center", fontsize="x-small")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [case["name"] for case, _ in reversed(rows)], fontsize="x-small")
    axes.set(xscale="log", xlabel="time of the best baseline / time of fastda (red: a figure to reach is missed)")
    axes.margins(x=0.4)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def plot_limits(cases: Sequence[dict], path: Path) -> bool:
    """The share of the machine's limit that fastda reaches, a bar a case."""
    rows = [case for case in cases if "share_of_limit" in case]
    if not rows:
        return False
    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.3 * len(rows)), layout="constrained")
    shares = [100 * case["share_of_limit"] for case in reversed(rows)]
    axes.barh(range(len(rows)), shares, color=REACHED, height=0.7)
    for place, share in enumerate(shares):
        axes.annotate(f" {share:.0f} %", (share, place), va="center", fontsize="x-small")
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [case["name"] for case in reversed(rows)], fontsize="x-small")
    axes.set(
        xlim=(0, max(*shares, 100) * 1.08),
        xlabel="share of what the machine's matrix product and copy allow, % (beyond 100: it fits into caches)",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def report(path: Path, folder: Path) -> list[Path]:
    """Write everything about one record; the files."""
    record = records.read(path)
    folder.mkdir(parents=True, exist_ok=True)
    long, short = folder / f"{path.stem}.md", folder / f"{path.stem}-summary.md"
    long.write_text(tables.page(record), encoding="utf-8")
    short.write_text(f"{tables.short_table(record)}\n\n{tables.heading(record)}\n", encoding="utf-8")
    written = [long, short]
    cases = rows_with_all_threads(record)
    for topic in dict.fromkeys(case["topic"] for case in cases):
        for quantity in ("time", "memory"):
            plot = folder / f"{path.stem}-{topic}-{quantity}.png"
            if plot_against_size(cases, topic, quantity, plot):
                written.append(plot)
    for sweep in record.get("sweeps", ()):
        plot = folder / f"{path.stem}-{machine.slug(sweep['name'])}.png"
        if plot_sweep(sweep, plot):
            written.append(plot)
    for name, plot_bars in (("ratios", plot_ratios), ("limits", plot_limits)):
        bars = folder / f"{path.stem}-{name}.png"
        if plot_bars(cases, bars):
            written.append(bars)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python bench/report.py", description=__doc__.partition("\n")[0])
    parser.add_argument("records", type=Path, nargs="*", help="default: all in bench/results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of tables and plots")
    options = parser.parse_args(arguments)
    paths = options.records or sorted(RESULTS.glob("*.json"))
    if not paths:
        print(f"records: none in {RESULTS}; make one with python -m fastda.benchmarks", file=sys.stderr)
        return 2
    for path in paths:
        for file in report(path, options.output):
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
