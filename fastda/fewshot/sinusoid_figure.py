"""The figure of `fastda sinusoid`: fits before and after adaptation, and the error after each step."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .sinusoid import METHODS, TEST_STEPS, NewTasks

COLOURS = {"MAML": "#1f77b4", "first-order MAML": "#e6862b", "pretraining": "#7f7f7f"}
FITTED = ("MAML", "pretraining")
LINES = ((0, ":", "before"), (1, "--", "after 1 step"), (10, "-", "after 10 steps"))
CURVES = (0, 1, 2)  # of the test tasks


def draw(learners: dict, errors: dict, tasks: NewTasks) -> Figure:
    """All panels. The canvas is Agg's own, so that no display is needed and pyplot's state is left alone."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    fits, curve = figure.subfigures(1, 2, width_ratios=[3, 1.5])
    rows = fits.subplots(len(FITTED), len(CURVES), sharex=True, sharey=True)
    height = 1.4 * float(tasks.query_values[list(CURVES)].abs().max())  # a fit that diverges leaves the panel
    rows[0][0].set_ylim(-height, height)
    for axes, method in zip(rows, FITTED):
        predictions = {
            steps: learners[method].predict(
                *(x[: len(CURVES)] for x in (tasks.support, tasks.support_values, tasks.queries)), steps
            )
            for steps, _, _ in LINES
        }
        for number, panel in zip(CURVES, axes):
            draw_fit(panel, method, number, predictions, tasks)
    fits.legend(*rows[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    shots = tasks.support.shape[1]
    fits.suptitle(f"New curves from {shots} points: {FITTED[0]} above, {FITTED[1]} below", fontsize=12)
    draw_errors(curve.subplots(), errors, len(tasks.support))
    return figure


def draw_fit(axes: Axes, method: str, number: int, predictions: dict, tasks: NewTasks) -> None:
    """One curve, its support points, and what the network makes of them."""
    x = tasks.queries[number, :, 0]
    axes.plot(x, tasks.query_values[number, :, 0], color="#c03030", linewidth=1.2, label="the curve")
    axes.plot(
        tasks.support[number, :, 0],
        tasks.support_values[number, :, 0],
        "^",
        color="#7030a0",
        markersize=8,
        label="support",
    )
    for steps, style, label in LINES:
        axes.plot(x, predictions[steps][number, :, 0], style, color=COLOURS[method], linewidth=1.6, label=label)
    axes.grid(alpha=0.2)


def draw_errors(axes: Axes, errors: dict, count: int) -> None:
    for method in METHODS:
        error = errors[method]
        axes.plot(TEST_STEPS, error.median, marker="o", color=COLOURS[method], label=method)
    axes.set_xlabel("gradient steps on the support")
    axes.set_ylabel("squared error, median over curves")
    axes.set_ylim(bottom=0)
    axes.set_xticks(TEST_STEPS)
    axes.set_title(f"{count} new curves", fontsize=12)
    axes.grid(alpha=0.2)
    axes.legend()
