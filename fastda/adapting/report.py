"""The report of before and after, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..version import __version__
from .choice import Choice
from .measure import Accuracy, Measurement
from .settings import Settings
from .task import Task

MOST_CLASSES = 50  # that are listed


@dataclass(frozen=True)
class Report:
    """What was done, why, and what came of it.

    Attributes:
        names: of the source and the target.
        settings: what was asked for.
        choice: what was done, and why.
        before, after: what was measured.
        classes: their names.
        num_source, num_held_out, num_target, num_known, num_measured: samples: of the source, of it those that no
            training saw; of the target, of it those whose label training saw, and those whose label was measured on.
        shape: of a sample.
    """

    names: tuple[str, str]
    settings: Settings
    choice: Choice
    before: Measurement
    after: Measurement
    classes: tuple
    num_source: int
    num_held_out: int
    num_target: int
    num_known: int
    num_measured: int
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls,
        task: Task,
        settings: Settings,
        choice: Choice,
        before: Measurement,
        after: Measurement,
        names: tuple[str, str],
    ) -> Report:
        return cls(
            names=names,
            settings=settings,
            choice=choice,
            before=before,
            after=after,
            classes=task.classes,
            num_source=len(task.source),
            num_held_out=int(task.held_out.sum()),
            num_target=len(task.target),
            num_known=task.num_known,
            num_measured=task.num_measured,
            shape=task.shape,
        )

    def to_json(self) -> str:
        """All numbers; shares from 0 to 1."""
        content = {
            "version": __version__,
            "source": self.names[0],
            "target": self.names[1],
            "settings": self.settings.to_dict(),
            "choice": self.choice.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "classes": list(self.classes),
            "samples": {
                "source": self.num_source,
                "held out of the source": self.num_held_out,
                "target": self.num_target,
                "target labels seen": self.num_known,
                "target labels measured on": self.num_measured,
            },
            "shape": list(self.shape),
        }
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """What `to_json` wrote."""
        content = json.loads(text)
        samples, choice = content["samples"], content["choice"]
        if choice["class_weights"] is not None:
            choice["class_weights"] = tuple(choice["class_weights"])
        return cls(
            names=(content["source"], content["target"]),
            settings=Settings(**content["settings"]),
            choice=Choice(**choice),
            before=Measurement.from_dict(content["before"]),
            after=Measurement.from_dict(content["after"]),
            classes=tuple(content["classes"]),
            num_source=samples["source"],
            num_held_out=samples["held out of the source"],
            num_target=samples["target"],
            num_known=samples["target labels seen"],
            num_measured=samples["target labels measured on"],
            shape=tuple(content["shape"]),
        )

    def to_markdown(self) -> str:
        """For reading."""
        return "\n\n".join(
            [
                f"# {self.names[0]} → {self.names[1]}",
                self._data(),
                f"**Done:** {self.choice.title}.",
                self._reason(),
                "## Before and after",
                _table(("", "before", "after"), self._rows(), right=(False, True, True)),
                self._caution(),
                "## What is predicted",
                self._classes(),
                *self._next(),
            ]
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"Done: {self.choice.title}.", self._reason(), ""]
        rows = [("", "before", "after"), *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines += [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}" for a, b, c in rows]
        return "\n".join([*lines, "", self._caution()])

    def _data(self) -> str:
        sample = f"{self.shape[0]} features" if len(self.shape) == 1 else " × ".join(map(str, self.shape)) + " pixels"
        seen = f", {self.num_known} of them with a label that training saw" if self.num_known else ""
        return (
            f"{self.num_source} source samples of {len(self.classes)} classes, of which no training saw "
            f"{self.num_held_out}; {self.num_target} target samples{seen}; {sample} each. Seed {self.settings.seed}."
        )

    def _reason(self) -> str:
        found = f"Found: {self.choice.found}. " if self.choice.found else ""
        return f"{found}Why: {self.choice.reason}."

    def _rows(self) -> list[tuple[str, str, str]]:
        before, after = self.before, self.after
        rows = []
        if after.target_accuracy is not None:
            count = after.target_accuracy.count
            right = [_accuracy(m.target_accuracy) for m in (before, after)]
            rows.append((f"right on the target, % ({count} labels)", *right))
        sure = [f"{100 * m.target_confidence:.1f}" for m in (before, after)]
        rows.append(("confidence on the target, %", *sure))
        if after.source_accuracy is not None:
            count = after.source_accuracy.count
            right = [_accuracy(m.source_accuracy) for m in (before, after)]
            rows.append((f"right on the source, % ({count} held out)", *right))
        if after.distances is not None and before.distances is not None:
            names = {"proxy A-distance": "proxy_a_distance", "MMD²": "mmd_squared", "CORAL": "coral"}
            for name, quantity in names.items():
                values = [f"{getattr(m.distances, quantity):.3g}" for m in (before, after)]
                rows.append((f"distance of the features: {name}", *values))
        return rows

    def _caution(self) -> str:
        if self.after.target_accuracy is None:
            return (
                "No target label is known that training did not see, so that nobody knows whether more is right than "
                "before: confidence says how sure the model is, not how right. Label a hundred samples, and pass them "
                "as --target-labels."
            )
        lost = self.after.target_accuracy.share < self.before.target_accuracy.share
        if lost:
            return "Less is right than before: keep the model as it was (--method source-only), or try another method."
        return "In brackets: 95 % intervals. Training saw none of the labels that this is measured on."

    def _classes(self) -> str:
        order = sorted(range(len(self.classes)), key=lambda i: -self.after.predicted[i])
        rows = [
            (str(self.classes[i]), str(self.before.predicted[i]), str(self.after.predicted[i]))
            for i in sorted(order[:MOST_CLASSES])
        ]
        table = _table(("class", "samples before", "samples after"), rows, right=(False, True, True))
        left = len(self.classes) - len(rows)
        return table + (f"\n\n{left} classes that are predicted less often are left out." if left else "")

    def _next(self) -> list[str]:
        if not self.choice.next_step:
            return []
        return ["## If that is not enough", f"{self.choice.next_step}."]


def _accuracy(found: Accuracy) -> str:
    return f"{100 * found.share:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]], right: tuple[bool, ...]) -> str:
    lines = [headings, tuple("---:" if r else "---" for r in right), *rows]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
