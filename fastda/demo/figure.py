"""The figure: example images, accuracies, which digits suffer, and the features of both domains."""

from __future__ import annotations

import math
import statistics

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..intervals import interval
from ..threads import libraries_on_one_thread
from .data import NUM_CLASSES, Domains, photograph, studio_digits
from .model import DigitNetwork
from .report import Report

COLOURS = {"source-only": "#7f7f7f", "Deep CORAL": "#1f77b4", "DANN": "#e6862b", "upper bound": "#3a923a"}
STUDIO = "#4c4c4c"
TSNE_STEPS = 500


def draw(report: Report) -> Figure:
    """All panels. The canvas is Agg's own, so that no display is needed and pyplot's state is left alone."""
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=[2.3, 4.2, 4.4], hspace=0.03)
    figure.suptitle(headline(report), fontsize=14, fontweight="bold")
    draw_examples(top.subplots(), report.domains)
    accuracies, digits = middle.subplots(1, 2, width_ratios=[1, 1.35])
    draw_accuracies(accuracies, report)
    draw_digits(digits, report)
    panels = bottom.subplots(1, 3)
    bottom.suptitle(
        f"The penultimate layer on held-out images of both domains, embedded together by t-SNE, seed {report.seeds[0]}",
        fontsize=11,
    )
    for axes, (method, when) in zip(
        panels, (("source-only", "before"), ("Deep CORAL", "after"), ("DANN", "after"))
    ):
        draw_features(axes, f"{when} adaptation: {method}", report.networks[method], report.domains)
    bottom.legend(handles=feature_legend(), loc="outside lower center", ncols=12, frameon=False, handletextpad=0.1)
    return figure


def headline(report: Report) -> str:
    """What the figure says, in numbers."""

    def mean(method: str, quantity: str) -> str:
        return f"{100 * statistics.fmean(report.values(method, quantity)):.0f} %"

    return (
        f"{mean('source-only', 'source_accuracy')} right in the studio, "
        f"{mean('source-only', 'target_accuracy')} on phones; "
        f"without one phone label {mean('Deep CORAL', 'target_accuracy')} with Deep CORAL, "
        f"{mean('DANN', 'target_accuracy')} with DANN"
    )


def draw_examples(axes: Axes, domains: Domains) -> None:
    """Held-out target digits, one of each class: as they were in the studio, and as the network sees them."""
    labels = domains.target_test.labels
    chosen = [int((labels == digit).nonzero()[0]) for digit in range(NUM_CLASSES)]
    studio = studio_digits()[0][domains.target_test.index[chosen]]
    phone = domains.target_test.images[chosen].squeeze(1).numpy()
    rows = [np.hstack([np.pad(image, 1, constant_values=np.nan) for image in row]) for row in (studio, phone)]
    axes.imshow(np.vstack(rows), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    height = rows[0].shape[0]
    axes.set_yticks([height / 2, 1.5 * height], ["studio", "phone"], fontsize=11)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    axes.set_title("Held-out digits as scanned in the studio and as photographed with a phone", fontsize=11)


def draw_accuracies(axes: Axes, report: Report) -> None:
    """Held-out accuracy: on phone images a dot a seed, mean and 95 % interval; on studio images a dotted line."""
    methods, ticks = list(report.step_times), []
    for position, method in enumerate(methods):
        values = [100 * value for value in report.values(method, "target_accuracy")]
        mean, half = interval(values)
        dots = position - 0.18 + 0.16 * np.linspace(-1, 1, len(values)) if len(values) > 1 else [position - 0.18]
        axes.plot(dots, values, "o", color=COLOURS[method], alpha=0.6, markersize=6, markeredgewidth=0)
        bar = None if math.isnan(half) else half
        axes.errorbar(position + 0.1, mean, bar, fmt="D", color=COLOURS[method], capsize=6, linewidth=2, markersize=7)
        ticks.append(f"{method}\n{mean:.1f} %")
        studio = 100 * statistics.fmean(report.values(method, "source_accuracy"))
        axes.hlines(studio, position - 0.38, position + 0.38, color=STUDIO, linestyle=":", linewidth=1.8)
    axes.set_xticks(range(len(methods)), ticks, fontsize=10.5)
    axes.set_xlim(-0.5, len(methods) - 0.5)
    axes.set_ylim(top=108)
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
    axes.set_ylabel("accuracy on held-out images, %")
    seeds = len(report.seeds)
    axes.set_title("Accuracy on phone images" + (f", {seeds} seeds" if seeds > 1 else ""), fontsize=11)
    axes.legend(
        handles=[
            Line2D([], [], color=STUDIO, linestyle=":", linewidth=1.8, label="studio images"),
            Line2D([], [], color="grey", marker="o", linestyle="", markeredgewidth=0, label="one seed"),
            Line2D([], [], color="grey", marker="D", linestyle="-", label="mean, 95 % interval"),
        ],
        loc="upper center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def draw_digits(axes: Axes, report: Report) -> None:
    """Which digits suffer, source-only against adapted."""
    methods = ("source-only", "Deep CORAL", "DANN")
    width = 0.27
    for offset, method in enumerate(methods):
        mean = 100 * np.mean(report.values(method, "class_accuracy"), axis=0)
        place = np.arange(NUM_CLASSES) + (offset - 1) * width
        axes.bar(place, mean, width, color=COLOURS[method], alpha=0.75, label=method)
    axes.set_xticks(range(NUM_CLASSES))
    axes.set_xlabel("digit")
    axes.set_ylim(0, 118)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy on held-out phone images, %")
    axes.set_title("Which digits suffer (mean over the seeds)", fontsize=11)
    axes.legend(loc="upper center", ncols=3, frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


@torch.no_grad()
def draw_features(axes: Axes, title: str, network: DigitNetwork, domains: Domains) -> None:
    """Penultimate features of the held-out images, both domains embedded together in two dimensions by t-SNE."""
    from sklearn.manifold import TSNE

    parts = ((domains.source_test, "o"), (domains.target_test, "x"))
    features = torch.cat([network.features(part.images) for part, _ in parts]).numpy()
    with libraries_on_one_thread("the demo's figure", "demo"):
        embedded = TSNE(n_components=2, init="pca", max_iter=TSNE_STEPS, random_state=0).fit_transform(features)
    embedded = np.split(embedded, [len(domains.source_test)])
    for (x, y), (part, marker) in zip((points.T for points in embedded), parts):
        axes.scatter(x, y, c=part.labels, cmap="tab10", vmin=0, vmax=9, marker=marker, s=22, linewidths=0.9, alpha=0.75)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=11)


def feature_legend() -> list[Line2D]:
    domains = [
        Line2D([], [], color="black", marker="o", linestyle="", markersize=5, label="studio  "),
        Line2D([], [], color="black", marker="x", linestyle="", markersize=5, label="phone      digit:"),
    ]
    digits = [
        Line2D([], [], color=colormaps["tab10"](digit), marker="s", linestyle="", markersize=7, label=str(digit))
        for digit in range(NUM_CLASSES)
    ]
    return domains + digits
