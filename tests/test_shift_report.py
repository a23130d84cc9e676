"""The report: its table with rich and without, its figure, its JSON; written whole or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
import torch

from fastda.shift import diagnose
from fastda.shift.known_shifts import make

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def report():
    """Of a label shift and a concept drift, with target labels."""
    known = make("label and concept", 0)
    torch.set_num_threads(1)
    return diagnose(known.source, known.target, known.source_labels, known.target_labels, progress=False)


@pytest.fixture(scope="module")
def without_labels():
    x = np.random.default_rng(0).standard_normal((60, 2))
    return diagnose(x[:30], x[30:], feature_names=["age", "[weight]"], progress=False)


def numbers(report) -> list[str]:
    """What every form of the report has to say."""
    shift = report.label_shift
    return [
        "Label shift",
        "oncept drift",
        f"{100 * report.concept.excess:.1f}",
        f"{report.proxy_a_distance.distance:.2f}",
        f"{100 * report.confidence.target:.1f}",
        *(f"{100 * frequency:.1f}" for frequency in shift.target_frequencies),
        *(f"{low:.1f} to {high:.1f}" for low, high in zip(100 * shift.low, 100 * shift.high)),
        *(test.name for test in report.tests),
        *(report.features.names[j] for j in report.features.different[:5]),
        report.recommendation.title,
    ]


@pytest.mark.parametrize("rich", [True, False])
def test_the_table_says_it_all(report, rich, monkeypatch):
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for text in (report.table(), str(report)):
        flat = " ".join(text.split())
        for part in numbers(report):
            assert part in flat, part
        assert ("───" in text) == rich
    file = io.StringIO()
    report.print(file)
    assert report.recommendation.title in " ".join(file.getvalue().split())


@pytest.mark.parametrize("rich", [True, False])
def test_without_a_shift(without_labels, rich, monkeypatch):
    """Names with brackets are no markup of rich's."""
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    text = str(without_labels)
    assert text.startswith("No shift found (false alarms at most 5 %).")
    assert "Class frequencies" not in text and "leave the model as it is" in text
    assert without_labels.features.names == ("age", "[weight]")


def test_every_warning_is_shown():
    known = make("covariate: noise", 0)
    report = diagnose(known.source, known.target, known.source_labels, progress=False)
    flat = " ".join(str(report).split())
    assert report.warnings and all(f"Warning: {warning}." in flat for warning in report.warnings)


def test_class_frequencies_are_shown_only_where_they_hold():
    """Black-box estimation presupposes that p(x | y) is the same, which covariate shift is not."""
    from fastda.shift.figure import draw

    for name, given, shown in (
        ("covariate: noise", False, False),
        ("covariate: noise", True, True),  # counted
        ("label: three rare classes", False, True),
        ("none", False, True),
    ):
        known = make(name, 0)
        labels = known.target_labels if given else None
        report = diagnose(known.source, known.target, known.source_labels, labels, progress=False)
        assert report.kinds == known.kinds and report.frequencies_hold == shown
        assert ("Class frequencies" in str(report)) == shown
        assert report.to_dict()["label_shift"]["frequencies_hold"] == shown
        assert len(draw(report).axes) == (3 if shown else 2)


def test_no_accuracy_is_expected_of_a_classifier_that_is_surer_where_it_was_never_trained():
    known = make("covariate: phone", 0)
    report = diagnose(known.source, known.target, known.source_labels, progress=False)
    assert report.confidence.drop < 0 and not report.accuracy_falls
    assert "accuracy expected" not in str(report) and f"{100 * report.confidence.source_accuracy:.1f}" in str(report)
    surer = dataclasses.replace(report.confidence, drop=0.1)
    assert "accuracy expected" in str(dataclasses.replace(report, confidence=surer))


def test_the_json_has_every_number(report, tmp_path):
    path = report.save(tmp_path / "report.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found == json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))
    assert found["kinds"] == ["label", "concept"] and found["summary"] == report.summary
    assert found["label_shift"]["weights"] == report.label_shift.weights.tolist()
    assert found["label_shift"]["changed"] == list(report.label_shift.changed)
    assert [test["p_value"] for test in found["tests"]] == [test.p_value for test in report.tests]
    assert found["mmd"].keys() == {"squared", "p_value", "bandwidth", "permutations"}
    assert found["recommendation"]["method"] == report.recommendation.method
    assert found["recommendation"]["steps"][-1] == report.recommendation.method
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_null_in_json():
    known = make("covariate: noise", 0)
    report = diagnose(known.source, known.target, known.source_labels, known.target_labels, progress=False)
    assert np.isnan(report.concept.p_value)
    assert json.loads(report.to_json())["concept"]["p_value"] is None


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ""])
def test_the_figure(report, without_labels, suffix, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml", "": b"\x89PNG"}
    for some in (report, without_labels):
        path = some.plot(tmp_path / f"figure{suffix}")
        assert path.read_bytes().startswith(starts[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_figure_shows(report, without_labels):
    from fastda.shift.figure import draw

    classes, features, sureness = draw(report).axes
    heights = [bar.get_height() for bar in classes.patches]
    np.testing.assert_allclose(heights[10:], 100 * report.label_shift.target_frequencies)
    largest = features.get_yticklabels()[-1].get_text()
    assert largest == report.features.names[report.features.statistics.argmax()]
    confidence = report.confidence
    assert f"{100 * confidence.source:.1f} → {100 * confidence.target:.1f} %" in sureness.get_title()
    assert len(draw(without_labels).axes) == 1


def test_what_cannot_be_written_is_refused(report, tmp_path):
    for write in (report.save, report.plot):
        with pytest.raises(ValueError, match="path: expected a file in a folder that exists and is writable"):
            write(tmp_path / "no folder" / "file.png")
    with pytest.raises(ValueError, match=r"path: expected a suffix of .*png.*, got '.doc'"):
        report.plot(tmp_path / "figure.doc")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_one_sentence_says_what_to_do(report, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "fastda.shift.figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    with pytest.raises(ModuleNotFoundError, match=r"plot needs matplotlib, .*: pip install 'fastda-kernels\[shift\]'"):
        report.plot(tmp_path / "figure.png")
