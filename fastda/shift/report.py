"""What a diagnosis found: as a table, a figure, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..files import check_writable, write_atomically
from .advice import Recommendation, recommend

if TYPE_CHECKING:
    from .distances import CORALDistance, ProxyADistance
    from .feature_tests import FeatureTests
    from .label_shift import LabelShift
    from .mmd import MMD
    from .reweighting import ConceptDrift

LARGEST_TABLE = 12  # classes or features that are listed
WIDTH = 110  # characters of a table where standard output is no terminal


@dataclass(frozen=True)
class Test:
    """One question to the data.

    Attributes:
        name, question: what is tested.
        statistic: how large the difference is, in the test's own measure.
        p_value: of this test by itself.
        adjusted: times the number of tests (Bonferroni).
        rejected: whether `adjusted` is at most alpha: the answer is that something differs.
    """

    __test__ = False  # not for pytest

    name: str
    question: str
    statistic: float
    p_value: float
    adjusted: float = math.nan
    rejected: bool = False


@dataclass(frozen=True)
class Confidence:
    """How sure the classifier is. Shares from 0 to 1.

    Attributes:
        source, target: mean probability of the predicted class.
        drop: of the one to the other.
        source_accuracy: on source samples that the classifier was not trained on.
        expected_target_accuracy: were it to drop as much as the confidence (Guillory et al., Predicting with confidence
            on unseen distributions, ICCV 2021).
    """

    source: float
    target: float
    drop: float
    source_accuracy: float
    expected_target_accuracy: float


@dataclass(frozen=True)
class Section:
    """A table of the report: cells are text, `right` says which columns are numbers."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[bool, ...]
    note: str = ""


@dataclass(frozen=True, eq=False)
class ShiftReport:
    """What :func:`fastda.shift.diagnose` found. `print(report)` shows it, `rich` shows it better.

    Attributes:
        kinds: "covariate", "label", "concept", those that were found, in this order; () for no shift.
        tests: the questions, with what came out.
        proxy_a_distance, mmd, coral, features: how far apart, and in what; of standardised features.
        label_shift: class frequencies; None without source labels. Where `frequencies_hold` is False, the target's are
            what label shift alone would have given, and no table shows them.
        concept: the unexplained error; None without target labels.
        confidence: its drop; None without source labels.
        warnings: what could not be seen.
        num_source, num_target, num_features, num_labelled, num_unlabelled: of the data; the last two of the target's.
        alpha: probability of a false alarm.
        situation: arguments of :func:`fastda.recommend` beyond those that the report knows, or other than them.
    """

    kinds: tuple[str, ...]
    tests: tuple[Test, ...]
    proxy_a_distance: ProxyADistance
    mmd: MMD
    coral: CORALDistance
    features: FeatureTests
    label_shift: LabelShift | None
    concept: ConceptDrift | None
    confidence: Confidence | None
    warnings: tuple[str, ...]
    num_source: int
    num_target: int
    num_features: int
    num_labelled: int
    num_unlabelled: int
    alpha: float
    situation: dict = dataclasses.field(default_factory=dict)

    @property
    def frequencies_hold(self) -> bool:
        """The target's class frequencies are counted, or estimated where p(x | y) is the same in both domains."""
        if self.label_shift is None:
            return False
        return self.num_labelled == self.num_target or "label" in self.kinds or not self.kinds

    @property
    def accuracy_falls(self) -> bool:
        """Accuracy can be told from confidence: there is no shift of inputs that makes the classifier surer."""
        return self.confidence is not None and ("covariate" not in self.kinds or self.confidence.drop > 0)

    @property
    def coral_is_blind(self) -> bool:
        """There is a covariate shift, and no measurable difference of the covariances."""
        return "covariate" in self.kinds and self.coral.p_value > self.alpha

    @property
    def summary(self) -> str:
        """What was found, in a sentence or two."""
        if not self.kinds:
            return f"no shift found (false alarms at most {100 * self.alpha:g} %)"
        texts = {
            "covariate": "covariate shift: the inputs, p(x), are not what they were",
            "label": "label shift: the classes, p(y), occur with other frequencies",
            "concept": "concept drift: the same inputs have other labels, p(y | x)",
        }
        if "label" in self.kinds:
            texts["label"] += f" ({self._most_changed()})"
        if "concept" in self.kinds:
            texts["concept"] += (
                f", {100 * self.concept.excess:.1f} points more errors than the shift of inputs explains"
            )
        return "; ".join(texts[kind] for kind in self.kinds)

    def _most_changed(self, most: int = 3) -> str:
        """Classes and their frequencies, those first whose weight is farthest from 1."""
        shift = self.label_shift
        order = np.argsort(-np.abs(np.log(np.maximum(shift.weights, 1e-3))), kind="stable")
        changed = [j for j in order if shift.classes[j] in shift.changed] or order[:1]
        texts = [
            f"{shift.classes[j]}: {100 * shift.source_frequencies[j]:.1f} → {100 * shift.target_frequencies[j]:.1f} %"
            for j in changed[:most]
        ]
        return ", ".join(texts) + (", …" if len(changed) > most else "")

    @property
    def recommendation(self) -> Recommendation:
        """What to do about it."""
        case = {"labelled": self.num_labelled, "unlabelled": self.num_unlabelled, "shift": self}
        return recommend(**case | self.situation)

    def table(self, width: int = WIDTH) -> str:
        """All of it as text: rich's tables where rich is installed, plain ones elsewhere."""
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            return self._plain()
        console = Console(width=width, color_system=None, file=open(os.devnull, "w"), highlight=False)
        with console.file, console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def __str__(self) -> str:
        return self.table()

    def __rich_console__(self, console, options):
        from rich import box
        from rich.table import Table
        from rich.text import Text

        yield Text(self._heading(), style="bold")
        for section in self._sections():
            yield Text(f"\n{section.title}", style="bold")
            table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
            for heading, right in zip(section.headings, section.right):
                table.add_column(heading, justify="right" if right else "left")
            for row in section.rows:
                table.add_row(*map(Text, row))
            yield table
            if section.note:
                yield Text(section.note)
        yield Text(f"\n{self._ending()}")

    def _plain(self) -> str:
        """Without rich."""
        parts = [self._heading()]
        for section in self._sections():
            cells = [section.headings, *section.rows]
            widths = [max(len(row[i]) for row in cells) for i in range(len(section.headings))]
            lines = [
                "  ".join(
                    cell.rjust(width) if right else cell.ljust(width)
                    for cell, width, right in zip(row, widths, section.right)
                ).rstrip()
                for row in cells
            ]
            lines.insert(1, "  ".join("-" * width for width in widths))
            parts.append("\n".join([section.title, *lines, *([section.note] if section.note else [])]))
        return "\n\n".join([*parts, self._ending()])

    def print(self, file=None) -> None:
        """To standard output, or another text file: with rich's colours and width where rich is installed."""
        file = sys.stdout if file is None else file
        try:
            from rich.console import Console
        except ModuleNotFoundError:
            file.write(self._plain() + "\n")
            return
        console = Console(file=file, highlight=False)
        console.width = console.width if console.is_terminal else WIDTH
        console.print(self)

    def _heading(self) -> str:
        labelled = f", {self.num_labelled} of them labelled" if self.num_labelled else ""
        return (
            f"{self.summary[0].upper()}{self.summary[1:]}.\n"
            f"{self.num_source} source samples, {self.num_target} of the target{labelled}; "
            f"{self.num_features} features."
        )

    def _sections(self) -> list[Section]:
        sections = [self._tests(), self._distances()]
        if self.frequencies_hold:
            sections.append(self._classes())
        if self.features.different:
            sections.append(self._features())
        return sections

    def _tests(self) -> Section:
        rows = [
            (
                t.name,
                t.question,
                f"{t.statistic:.3g}",
                f"{t.p_value:.2g}",
                f"{t.adjusted:.2g}",
                "yes" if t.rejected else "",
            )
            for t in self.tests
        ]
        return Section(
            "Tests",
            ("test", "question", "statistic", "p", "adjusted", "differs"),
            tuple(rows),
            (False, False, True, True, True, False),
            f"Adjusted for their number (Bonferroni): one false alarm among all of them in {1 / self.alpha:.0f} data "
            "sets at "
            "most.",
        )

    def _distances(self) -> Section:
        distance, rows = self.proxy_a_distance, []
        rows.append(
            (
                "proxy A-distance",
                f"{distance.distance:.2f}",
                f"0 alike, 2 apart; {distance.low:.2f} to {distance.high:.2f}",
            )
        )
        rows.append(("MMD²", f"{self.mmd.squared:.2g}", f"Gaussian kernel, width {self.mmd.bandwidth:.3g}"))
        rows.append(("CORAL", f"{self.coral.distance:.2g}", f"covariances; p = {self.coral.p_value:.2g}"))
        if self.confidence is not None:
            c = self.confidence
            rows.append(("confidence, %", f"{100 * c.target:.1f}", f"{100 * c.source:.1f} on the source"))
            if self.accuracy_falls:
                rows.append(
                    (
                        "accuracy expected, %",
                        f"{100 * c.expected_target_accuracy:.1f}",
                        f"if it falls as confidence does, from {100 * c.source_accuracy:.1f}",
                    )
                )
            else:
                words = "on the source; surer still of other inputs, it tells nothing of them"
                rows.append(("accuracy, %", f"{100 * c.source_accuracy:.1f}", words))
        if self.concept is not None:
            c = self.concept
            rows.append(
                (
                    "error on labelled target, %",
                    f"{100 * c.target_error:.1f}",
                    f"{100 * c.source_error:.1f} on the source",
                )
            )
            if not c.unsettled:
                rows.append(
                    (
                        "error unexplained, points",
                        f"{100 * c.excess:.1f}",
                        f"{100 * c.low:.1f} to {100 * c.high:.1f}; explained {100 * c.reweighted_error:.1f} %, by "
                        f"{c.effective_samples:.0f} effective source samples",
                    )
                )
        return Section("How far apart", ("measure", "value", ""), tuple(rows), (False, True, False))

    def _classes(self) -> Section:
        shift = self.label_shift
        order = np.argsort(-np.abs(np.log(np.maximum(shift.weights, 1e-3))), kind="stable")[:LARGEST_TABLE]
        rows = [
            (
                str(shift.classes[j]),
                f"{100 * shift.source_frequencies[j]:.1f}",
                f"{100 * shift.target_frequencies[j]:.1f}",
                f"{100 * shift.low[j]:.1f} to {100 * shift.high[j]:.1f}",
                f"{shift.weights[j]:.2f}",
                "yes" if shift.classes[j] in shift.changed else "",
            )
            for j in sorted(order.tolist())
        ]
        left = len(shift.classes) - len(rows)
        note = f"{left} classes that changed less are left out. " if left else ""
        if "covariate" in self.kinds and self.num_labelled < self.num_target:
            note += "Estimated as if p(x | y) were the same in both domains, which it is not quite."
        return Section(
            "Class frequencies, %",
            ("class", "source", "target", f"{100 * shift.level:g} % interval", "weight", "changed"),
            tuple(rows),
            (False, True, True, True, True, False),
            note.strip(),
        )

    def _features(self) -> Section:
        found = self.features
        rows = [
            (found.names[j], f"{found.statistics[j]:.2f}", f"{found.adjusted[j]:.1g}")
            for j in found.different[:LARGEST_TABLE]
        ]
        return Section(
            f"Features that differ: {len(found.different)} of {self.num_features}",
            ("feature", "distance", "adjusted p"),
            tuple(rows),
            (False, True, True),
            "Kolmogorov-Smirnov distance, 0 to 1; the false discovery rate is controlled (Benjamini-Hochberg).",
        )

    def _ending(self) -> str:
        lines = [f"Warning: {warning}." for warning in self.warnings]
        advice = self.recommendation
        lines.append(f"Recommended: {advice.title}.")
        lines.append(f"{advice.reason[0].upper()}{advice.reason[1:]}. Gain to expect: {advice.gain}.")
        if advice.evidence:
            lines.append(f"Measured {advice.evidence}.")
        if advice.disagreement:
            lines.append(f"The two rules disagree: {advice.disagreement}.")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        """Numbers, strings, lists and dictionaries; NaN is None."""
        fields = {field.name: _plain_value(getattr(self, field.name)) for field in dataclasses.fields(self)}
        fields["mmd"].pop("null")
        fields["summary"] = self.summary
        if self.label_shift is not None:
            fields["label_shift"]["changed"] = _plain_value(self.label_shift.changed)
            fields["label_shift"]["frequencies_hold"] = self.frequencies_hold
        fields["recommendation"] = self.recommendation.to_dict() | {
            "steps": [s.method for s in self.recommendation.steps]
        }
        return _plain_value(fields)

    def to_json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False)

    def save(self, path: str | os.PathLike) -> Path:
        """Write the JSON, whole or not at all; returns where.

        Raises:
            ValueError: a folder that does not exist or cannot be written to.
        """
        path = Path(path)
        check_writable("path", path)
        write_atomically(path, lambda file: file.write(self.to_json().encode() + b"\n"))
        return path

    def plot(self, path: str | os.PathLike) -> Path:
        """Draw classes, features and tests, whole or not at all; returns where.

        Args:
            path: its suffix says what is written: .png, .pdf, .svg; PNG without one.

        Raises:
            ValueError: a folder that does not exist or cannot be written to; a suffix that matplotlib does not know.
            ModuleNotFoundError: matplotlib is missing: `pip install 'fastda-kernels[shift]'`.
        """
        try:
            from .figure import draw, formats
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "plot needs matplotlib, which is not installed: pip install 'fastda-kernels[shift]'", name="matplotlib"
            ) from error
        path = Path(path)
        check_writable("path", path)
        suffix = path.suffix.lower().lstrip(".") or "png"
        if suffix not in formats():
            raise ValueError(
                f"path: expected a suffix of {', '.join(formats())}, got {path.suffix!r}; choose one of them"
            )
        figure = draw(self)
        write_atomically(path, lambda file: figure.savefig(file, format=suffix, dpi=150))
        return path


def _plain_value(value):
    """For JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain_value(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy and torch
        return _plain_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
