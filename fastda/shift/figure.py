"""The figure of a report: which classes, which features, and how sure the classifier is."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .report import ShiftReport

SOURCE, TARGET, DIFFERENT = "#7f7f7f", "#1f77b4", "#e6862b"
MOST_CLASSES, MOST_FEATURES = 30, 15


def formats() -> tuple[str, ...]:
    """Suffixes that can be written."""
    return tuple(sorted(FigureCanvasAgg.get_supported_filetypes()))


def draw(report: ShiftReport) -> Figure:
    """Panels for what there is. The canvas is Agg's own, so that no display is needed."""
    panels = [draw_features]
    if report.confidence is not None:
        panels = [draw_features, draw_sureness]
    if report.frequencies_hold:
        panels.insert(0, draw_classes)
    figure = Figure(figsize=(5.2 * len(panels), 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrapped(f"{report.summary[0].upper()}{report.summary[1:]}", 52 * len(panels)), fontsize=12)
    widths = {draw_classes: 1.4, draw_features: 1.2, draw_sureness: 0.8}
    ratios = [widths[panel] for panel in panels]
    for panel, axes in zip(panels, figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]):
        panel(axes, report)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_classes(axes: Axes, report: ShiftReport) -> None:
    """Frequencies of both domains, the target's with intervals."""
    shift = report.label_shift
    chosen = np.argsort(-np.abs(shift.target_frequencies - shift.source_frequencies), kind="stable")[:MOST_CLASSES]
    chosen = np.sort(chosen)
    place, estimate = np.arange(len(chosen)), 100 * shift.target_frequencies[chosen]
    axes.bar(place - 0.2, 100 * shift.source_frequencies[chosen], 0.4, color=SOURCE, label="source")
    colours = [DIFFERENT if shift.classes[j] in shift.changed else TARGET for j in chosen]
    spread = [estimate - 100 * shift.low[chosen], 100 * shift.high[chosen] - estimate]
    axes.bar(place + 0.2, estimate, 0.4, color=colours, yerr=spread, ecolor="black", capsize=3, label="target")
    axes.set_xticks(place, [str(shift.classes[j]) for j in chosen], rotation=90 if len(chosen) > 12 else 0)
    axes.set_xlabel("class")
    axes.set_ylabel("frequency, %")
    estimated = "" if report.num_labelled == report.num_target else "estimated, "
    axes.set_title(f"Classes: source grey; target, {estimated}95 % interval,\norange where it has changed", fontsize=10)


def draw_features(axes: Axes, report: ShiftReport) -> None:
    """The features with the largest distance, those that differ in orange."""
    found = report.features
    chosen = np.argsort(-found.statistics, kind="stable")[:MOST_FEATURES][::-1]
    different = set(found.different)
    axes.barh(
        [found.names[j] for j in chosen],
        found.statistics[chosen],
        color=[DIFFERENT if j in different else SOURCE for j in chosen],
    )
    axes.set_xlim(0, 1)
    axes.set_xlabel("Kolmogorov-Smirnov distance")
    axes.set_title(
        f"Features: {len(different)} of {report.num_features} differ,\norange; the {len(chosen)} farthest", fontsize=10
    )


def draw_sureness(axes: Axes, report: ShiftReport) -> None:
    """Confidence and accuracy on both domains."""
    sure = report.confidence
    bars = [("source\nconfidence", sure.source, SOURCE), ("target\nconfidence", sure.target, TARGET)]
    bars.append(("source\naccuracy", sure.source_accuracy, SOURCE))
    if report.concept is not None:
        bars.append(("target\naccuracy", 1 - report.concept.target_error, TARGET))
    elif report.accuracy_falls:
        bars.append(("target\nexpected", sure.expected_target_accuracy, TARGET))
    drawn = axes.bar([name for name, *_ in bars], [100 * value for _, value, _ in bars], color=[c for *_, c in bars])
    axes.bar_label(drawn, fmt="%.0f")
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylim(0, 105)
    axes.set_ylabel("%")
    axes.set_title(f"Confidence: {100 * sure.source:.1f} → {100 * sure.target:.1f} %", fontsize=10)


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
