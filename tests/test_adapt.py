"""`fastda adapt`: every method on a shift that it can undo, what is written, and what is refused."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
from adapting_data import NAMES, QUICK, call, clouds, gain, images, predictions, report, write_clouds

from fastda.adapting import adapt, load_model
from fastda.adapting.folder import RESULTS

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The present folder, with source.npz, target.npz and labelled.npz."""
    write_clouds(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def test_from_files_to_an_adapted_model(folder, capsys):
    assert call("adapt", "source.npz", "target.npz", "--target-labels", "labelled.npz", "--out", "adapted", *QUICK) == 0
    out = folder / "adapted"
    assert {p.name for p in out.iterdir()} == {"run.json", *RESULTS}

    found = report(out)
    assert found["choice"]["recommended"] and found["choice"]["method"] == "coral"
    assert found["choice"]["diagnosis"]["kinds"] == ["covariate"]
    before, after = gain(out)
    assert before < 0.75 and after > 0.9
    assert found["after"]["distances"]["mmd_squared"] < found["before"]["distances"]["mmd_squared"]

    rows, labels = predictions(out / "predictions.csv"), np.load("labelled.npz")["labels"]
    assert [int(row["row"]) for row in rows] == list(range(180))
    assert np.mean([row["label"] == label for row, label in zip(rows, labels)]) == pytest.approx(after)
    mean = np.mean([float(row["confidence"]) for row in rows])
    assert mean == pytest.approx(found["after"]["target_confidence"], abs=1e-5)

    printed = capsys.readouterr().out
    markdown = (out / "report.md").read_text(encoding="utf-8")
    for text in (printed, markdown):
        assert "Deep CORAL" in text and "covariate shift" in text and f"{100 * after:.1f}" in text
    for name in ("model.safetensors", "predictions.csv", "report.md"):
        assert f"Wrote adapted/{name}" in printed


@pytest.mark.parametrize("method", ["coral", "dann", "prototypes"])
def test_unsupervised_methods_undo_a_shift(method):
    source, labels, target, target_labels = clouds()
    if method != "coral":  # moved rather than sheared: then every sample can be right again
        target = source[::-1].copy() + np.float32([1.2, 0, 0])
        target_labels = labels[::-1].copy()
    options = {"method": method, "epochs": 25, "batch_size": 30}
    found = adapt(*tensors(source, labels, target), measured_labels=target_labels, **options)
    before, after = found.report.before.target_accuracy.share, found.report.after.target_accuracy.share
    assert after > before + 0.1 and after > 0.85, (before, after)


@pytest.mark.parametrize("method", ["feature-extraction", "top-layers", "finetune", "prototypes", "coral", "dann"])
def test_known_target_labels_count(method):
    """The classes change places, which nothing but labels can show; a fifth of these is held out to measure on."""
    source, labels, target, target_labels = clouds()
    target_labels = (target_labels + 1) % 3
    some = np.where(np.arange(180) < 150, target_labels, -1)
    found = adapt(*tensors(source, labels, target, some), method=method, epochs=60, batch_size=30)
    assert found.report.num_known == 120 and found.report.num_measured == 30
    before, after = found.report.before.target_accuracy.share, found.report.after.target_accuracy.share
    assert after > before + 0.2, (before, after)


def test_label_shift_is_corrected_without_training():
    source, labels, _, _ = clouds(600)
    source = source + 0.25 * np.random.default_rng(1).normal(size=source.shape).astype(np.float32)
    chosen = np.flatnonzero((labels != 0) | (np.arange(600) % 10 == 0))
    found = adapt(
        *tensors(source, labels, source[chosen]), measured_labels=labels[chosen], method="auto", epochs=20
    )
    assert found.report.choice.method == "reweight" and found.report.choice.diagnosis["kinds"] == ["label"]
    weights = found.model.log_weights.exp()
    assert weights[0] < 0.5 < 1 < weights[1:].min()
    assert found.report.after.target_accuracy.share >= found.report.before.target_accuracy.share


def test_no_shift_leaves_the_model_as_it_is():
    source, labels, _, _ = clouds(300)
    found = adapt(*tensors(source[:150], labels[:150], source[150:]), epochs=5)
    assert found.report.choice.method == "source-only" and found.report.before == found.report.after


def test_images(tmp_path):
    source, labels, target, target_labels = images()
    found = adapt(
        *tensors(source, labels, target), measured_labels=target_labels, method="coral", epochs=40, batch_size=30,
        out=tmp_path / "out",
    )  # fmt: skip
    assert found.report.after.source_accuracy.share > 0.8
    assert found.report.after.target_accuracy.share > found.report.before.target_accuracy.share
    assert torch.equal(load_model(tmp_path / "out").logits(torch.from_numpy(target)), found.logits)


@pytest.mark.parametrize("method", ["source-only", "reweight", "prototypes", "coral"])
def test_a_model_is_the_same_after_it_was_saved(tmp_path, method):
    source, labels, target, _ = clouds(60)
    found = adapt(*tensors(source, labels, target), method=method, epochs=3, classes=NAMES, out=tmp_path / "out")
    model = load_model(tmp_path / "out" / "model.safetensors")
    assert (model.classes, model.method, model.shape) == (NAMES, method, (3,))
    assert torch.equal(model.logits(torch.from_numpy(target)), found.logits)
    assert model.predict(torch.from_numpy(source[:6])) == found.model.predict(torch.from_numpy(source[:6]))


def test_labels_are_seen_by_training_or_measured_on_but_never_both(folder):
    assert call("adapt", "source.npz", "labelled.npz", "--method", "prototypes", "--out", "some", "--epochs", 2) == 0
    samples = report(folder / "some")["samples"]
    assert (samples["target labels seen"], samples["target labels measured on"]) == (144, 36)
    arguments = ("adapt", "source.npz", "labelled.npz", "--measure-only", "--method", "prototypes", "--epochs", 2)
    assert call(*arguments, "--out", "none") == 0
    samples = report(folder / "none")["samples"]
    assert (samples["target labels seen"], samples["target labels measured on"]) == (0, 180)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "coral", "dann", "prototypes"])
def test_the_demo_s_shift_is_half_undone_at_least(tmp_path, method):
    """As somebody would who tries it for the first time, on files."""
    assert call("demo", "--write-data", tmp_path / "shift") == 0
    files = [tmp_path / "shift" / name for name in ("source.npz", "target.npz", "target_labels.npz")]
    arguments = (*files[:2], "--target-labels", files[2], "--method", method, "--out", tmp_path / "out")
    assert call("adapt", *arguments) == 0
    before, after = gain(tmp_path / "out")
    source = report(tmp_path / "out")["before"]["source_accuracy"]["share"]
    assert after - before > 0.5 * (source - before) > 0.05, (before, after, source)


# Runs that are killed


@pytest.mark.parametrize("kills", [3, pytest.param(15, marks=pytest.mark.slow)])
def test_killed_runs_go_on_to_the_same_result(tmp_path, kills):
    """To the bit, wherever they are killed: model, predictions and report."""
    seed = random.randrange(10**6)
    run = fresh.python(TESTS / "adapting_to_kill.py", tmp_path, kills, seed, cwd=TESTS)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["resumed"] >= 1 and found["same"], f"seed {seed}: {found}"


def test_a_finished_run_is_not_repeated(folder, capsys):
    arguments = ("adapt", "source.npz", "target.npz", "--method", "coral", "--out", "adapted", *QUICK)
    assert call(*arguments) == 0
    first = capsys.readouterr()
    model = folder / "adapted" / "model.safetensors"
    written = model.stat().st_mtime_ns
    assert call(*arguments) == 0
    again = capsys.readouterr()
    assert again.out == first.out and "finished" in again.err and model.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--seed", "1"), "seed = 0, not 1"),
        (("--method", "dann"), "method = 'coral', not 'dann'"),
        (("--measure-only",), None),
    ],
)
def test_another_run_is_refused(folder, capsys, changed, says):
    arguments = ("adapt", "source.npz", "target.npz", "--method", "coral", "--out", "adapted", "--epochs", "2")
    assert call(*arguments) == 0
    before = {p.name: p.read_bytes() for p in (folder / "adapted").iterdir()}
    capsys.readouterr()
    code = call(*arguments, *changed)
    error = capsys.readouterr().err
    if says is None:  # without labels there is nothing that it changes
        assert code == 0
    else:
        assert code == 1 and says in error and "choose another folder" in error
    assert {p.name: p.read_bytes() for p in (folder / "adapted").iterdir()} == before


def test_other_data_are_refused(folder, capsys):
    arguments = ("adapt", "source.npz", "target.npz", "--method", "source-only", "--out", "adapted", "--epochs", "1")
    assert call(*arguments) == 0
    np.savez("target.npz", features=clouds(seed=1)[2])
    assert call(*arguments) == 1
    assert "whose run has other data" in capsys.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("target.npz", "target.npz"), "target.npz: expected a label of each sample, got none"),
        (("source.npz", "narrow.npz"), "narrow.npz: expected features as in source.npz, 3 features, got 2 features"),
        (("one.npz", "target.npz"), "one.npz: expected labels of at least two classes, got 'ash' alone"),
        (("absent.npz", "target.npz"), "absent.npz: expected"),
        (("empty.npz", "target.npz"), "empty.npz: expected samples, got an empty file"),
        (("pickled.npz", "target.npz"), "never loaded"),
        (("half.npz", "target.npz"), "half.npz: expected a whole archive"),
        (("source.npz", "nan.npz"), "nan.npz: expected finite numbers in float32, got nan at sample 5"),
        (("source.npz", "few.npz"), "method: expected at least 20 samples of each domain"),
        (("source.npz", "target.npz", "--method", "finetune"), "method: expected target labels to train on"),
        (("source.npz", "target.npz", "--target-labels", "target.npz"), "target.npz: expected the labels under one of"),
        (("source.npz", "target.npz", "--target-labels", "source_part.npz"), "each of the 180 samples, got 30"),
        (("source.npz", "target.npz", "--epochs", "0"), "epochs: expected"),
        (("source.npz", "target.npz", "--learning-rate", "-1"), "learning_rate: expected"),
        (("source.npz", "target.npz", "--learning-rate", "1e30", "--epochs", "3"), "lower the rate"),
        (("source.npz", "target.npz", "--device", "abacus"), "device: expected"),
        (("source.npz", "target.npz", "--network", "networks"), "expected PACKAGE.MODULE:FUNCTION"),
        (("source.npz", "target.npz", "--network", "no_such_module:make"), "'no_such_module' could not be imported"),
        (("source.npz", "target.npz", "--network", "networks:mlq"), "near it are mlp"),
        (("source.npz", "target.npz", "--network", "networks:fails"), "failed with RuntimeError: not today"),
        (("source.npz", "target.npz", "--network", "networks:number"), "expected a torch.nn.Module"),
        (("source.npz", "target.npz", "--network", "networks:two_outputs"), "a last linear layer of 3 outputs"),
        (("source.npz", "target.npz", "--network", "networks:softmax_last"), "to come last in the model"),
        (("source.npz", "target.npz", "--network", "networks:wide_input"), "failed on inputs of shape (2, 3)"),
        (("source.npz", "target.npz", "--network", "networks:pair"), "expected logits of shape (2, 3)"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(folder, capsys, monkeypatch, arguments, says):
    source, labels, target, _ = clouds()
    np.savez("narrow.npz", features=target[:, :2])
    np.savez("one.npz", features=source, labels=np.full(180, "ash"))
    np.savez("few.npz", features=target[:10])
    np.savez("source_part.npz", features=source[:30], labels=np.array(NAMES)[labels[:30]])
    np.savez("pickled.npz", features=source, labels=np.array([*NAMES] * 60, dtype=object))
    np.savez("nan.npz", features=np.where(np.arange(180)[:, None] == 5, np.nan, target))
    Path("empty.npz").touch()
    Path("half.npz").write_bytes(Path("source.npz").read_bytes()[:1000])
    Path("networks.py").write_text(NETWORKS)
    monkeypatch.delitem(sys.modules, "networks", raising=False)
    monkeypatch.syspath_prepend(folder)
    there = set(folder.iterdir()) - {folder / "__pycache__"}
    assert call("adapt", *arguments, "--out", "adapted") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("fastda adapt: error: ") and says in error
    assert set(folder.iterdir()) - {folder / "__pycache__"} == there


NETWORKS = """
import torch
from torch import nn

def mlp(input_shape, num_classes):
    return nn.Sequential(nn.Linear(*input_shape, 16), nn.ReLU(), nn.Linear(16, num_classes))

def fails(input_shape, num_classes):
    raise RuntimeError("not today")

def number(input_shape, num_classes):
    return 3

def two_outputs(input_shape, num_classes):
    return nn.Sequential(nn.Linear(*input_shape, 16), nn.ReLU(), nn.Linear(16, 2))

def softmax_last(input_shape, num_classes):
    return nn.Sequential(nn.Linear(*input_shape, num_classes), nn.Softmax(1))

def wide_input(input_shape, num_classes):
    return nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, num_classes))

def pair(input_shape, num_classes):
    return nn.Linear(*input_shape, 4), nn.Linear(4, 2)
"""


def test_a_network_of_ones_own(folder, capsys, monkeypatch):
    Path("own_networks.py").write_text(NETWORKS)
    arguments = ("source.npz", "target.npz", "--target-labels", "labelled.npz", "--method", "coral", *QUICK)
    assert call("adapt", *arguments, "--network", "own_networks:mlp", "--out", "adapted") == 0
    before, after = gain(folder / "adapted")
    assert after > before + 0.1
    with pytest.raises(ValueError, match="pass --network own_networks:mlp if you trust that code"):
        load_model("adapted")  # no code that a file names is run
    assert load_model("adapted", network="own_networks:mlp").shape == (3,)


@pytest.mark.parametrize("what", ["a file", "other files", "no folder above"])
def test_a_folder_that_is_something_else_is_refused(folder, capsys, what):
    out = folder / "adapted"
    if what == "a file":
        out.write_text("mine")
    elif what == "other files":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    else:
        out = folder / "no" / "adapted"
    assert call("adapt", "source.npz", "target.npz", "--out", out) == 1
    error = capsys.readouterr().err
    assert "out: expected" in error and "choose another" in error
    assert not (out / "run.json").exists()
