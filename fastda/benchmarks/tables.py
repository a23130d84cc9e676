"""Records as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

from .baselines import FUSED

MISSING = "–"
BUSY = 0.5  # load a core


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(table: str) -> str:
    """A table of this module for a terminal: columns as wide as their widest cell, numbers at the right."""
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    head, _, *body = rows
    widths = [max(map(len, column)) for column in zip(head, *body)]
    lines = [head, ["─" * width for width in widths], *body]
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]).rstrip()
        for first, *others in lines
    )


def duration(seconds: float) -> str:
    """Three digits, in µs or ms."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def size(count: int) -> str:
    """Bytes in KiB, MiB or GiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 2**10:.3g} KiB"


def _median(side: dict, phase: str) -> float | None:
    return side["times"][phase]["median"] if phase in side.get("times", {}) else None


def _time(side: dict, phase: str) -> str:
    seconds = _median(side, phase)
    return MISSING if seconds is None else duration(seconds)


def _ratio(value: float) -> str:
    return f"{value:.3g}×"


def is_busy(record: dict) -> bool:
    """Whether the machine had other work when the measuring began."""
    return record["load_before"] is not None and record["load_before"] > BUSY * record["cores"]


def revision(record: dict) -> str:
    """Of the sources, as the end of a list of what was measured; empty where it is not known."""
    git = record["git"]
    return f", revision {git['revision'][:12]}{' with changes' if git['changed'] else ''}" if git else ""


def heading(record: dict) -> str:
    """Machine, date and versions in one line."""
    device = record["gpu"] or f"{record['processor']}, {record['cores']} cores"
    busy = " Other processes were running: the times are not to be relied on." if is_busy(record) else ""
    cut = "" if record["complete"] else " Cut short: not all cases are here."
    dry = " Dry run with tiny sizes: no figure here means anything." if record["dry_run"] else ""
    return f"{device}; {record['date'][:10]}; PyTorch {record['versions']['torch']}{revision(record)}.{busy}{cut}{dry}"


def short_table(record: dict) -> str:
    """One line a case, with all cores: what a reader of the README wants to know."""
    rows = []
    for case in record["cases"]:
        if case["threads"] != max(record["threads"]):
            continue
        phase, sides = case["phase"], case["sides"]
        reference, ratio = _median(sides["reference"], phase), case["ratios"].get(phase)
        fused = _median(sides[FUSED], phase)
        rows.append(
            [
                case["name"] + (" (forward)" if phase == "forward" else ""),
                _time(sides[FUSED], phase),
                _time(sides["reference"], phase),
                f"{_time(sides[ratio['against']], phase)} ({ratio['against']})" if ratio else MISSING,
                _ratio(reference / fused) if reference and fused else MISSING,
                _ratio(ratio["ratio"]) if ratio else MISSING,
            ]
        )
    head = ["case, forward + backward", "fastda", "plain PyTorch", "best other", "against plain", "against best"]
    return _table(head, rows)


def _figure(figure: dict) -> str:
    if figure["value"] is None:
        return f"{figure['figure']}: not measured"
    measured = f"{figure['figure']}: {figure['value']:.3g}"
    if interval := figure.get("interval"):  # earlier records have none
        measured += " ({:.3g} to {:.3g})".format(*interval)
    return measured + ("" if figure["reached"] else " **missed**")


def figures_table(record: dict) -> str:
    """Every figure to reach, with the misses marked."""
    rows = []
    for case in record["cases"]:
        share = case.get("share_of_limit")
        rows.append(
            [
                case["name"],
                str(case["threads"]),
                f"{share:.0%}" if share is not None else MISSING,
                "<br>".join(map(_figure, case["figures"])) or MISSING,
            ]
        )
    for group in record["groups"]:
        rows.append([f"geometric mean: {group['group']}", str(group["threads"]), MISSING, _figure(group)])
    return _table(["case", "threads", "share of the limit", "figure to reach: measured"], rows)


def long_table(record: dict) -> str:
    """Every side of every case: three times, quartiles of the whole, memory; and why a side has no time."""
    rows = []
    for case in record["cases"]:
        for name, side in case["sides"].items():
            line = [case["name"], str(case["threads"]), name]
            if "times" not in side:
                rows.append([*line, side["reason"].replace("|", "\\|"), "", "", "", "", ""])
                continue
            whole = side["times"]["both"]
            rows.append(
                [
                    *line,
                    *(_time(side, phase) for phase in ("forward", "backward", "both")),
                    f"{duration(whole['lower_quartile'])} to {duration(whole['upper_quartile'])}",
                    size(side["memory"]["peak"]),
                    size(side["memory"]["extra"]),
                ]
            )
    head = ["case", "threads", "side", "forward", "backward", "both", "quartiles", "peak memory", "of it extra"]
    return _table(head, rows)


def sweep_table(sweep: dict) -> str:
    """Time against size, a column a side; the last line says by what factor it grows when the size doubles."""
    sides = list(sweep["cases"][0]["sides"]) if sweep["cases"] else []
    rows = [
        [str(case["sizes"][sweep["axis"]]), *(_time(case["sides"][side], case["phase"]) for side in sides)]
        for case in sweep["cases"]
    ]
    growth = (_ratio(sweep["growth"][side]) if side in sweep["growth"] else MISSING for side in sides)
    rows.append([f"a doubling, from {sweep['growth_from']} on", *growth])
    return _table([f"{sweep['name']}; {sweep['axis']}", *sides], rows)


def limits_line(record: dict) -> str:
    """The machine's ceilings."""
    parts = []
    for threads, limit in record["limits"].items():
        rates = limit["flops"].items()
        products = ", ".join(f"{dtype} matrix product {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates)
        parts.append(f"{threads} thread(s): {products}, copy {limit['bandwidth'] / 1e9:.1f} GB/s (read + written)")
    return "; ".join(parts) + "."


def page(record: dict) -> str:
    """The whole record as one Markdown page."""
    serving = _table(
        ["op", "device", "backend", "why"],
        [[row["op"], row["device"], row["backend"], row["reason"] or ""] for row in record["serving"]],
    )
    return "\n\n".join(
        [
            f"# {record['machine']}, {record['date'][:10]}",
            heading(record),
            f"Limits, measured: {limits_line(record)} Cases that fit into caches may exceed 100 % of them.",
            "Peak memory is what a call allocates beyond its arguments; “extra” leaves results and gradients out too.",
            "## Against the figures to reach",
            figures_table(record),
            "## Summary",
            short_table(record),
            "## All sides",
            long_table(record),
            *(f"## Time against {sweep['axis']}\n\n{sweep_table(sweep)}" for sweep in record.get("sweeps", ())),
            "## Which backend served which op",
            serving,
        ]
    ) + "\n"
