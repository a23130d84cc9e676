"""`fastda predict`: what it says of samples, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from adapting_data import NAMES, call, clouds, images, predictions, write_clouds

from fastda.adapting import adapt

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with source.npz, target.npz, labelled.npz and a model, adapted."""
    folder = tmp_path_factory.mktemp("model")
    write_clouds(folder)
    arguments = ("--method", "prototypes", "--epochs", "20", "--out", folder / "adapted")
    assert call("adapt", folder / "source.npz", folder / "target.npz", *arguments) == 0
    return folder


def test_the_same_as_adapt_wrote(model, tmp_path, capsys):
    assert call("predict", model / "adapted", model / "target.npz", "--out", tmp_path / "predictions.csv") == 0
    assert (tmp_path / "predictions.csv").read_bytes() == (model / "adapted" / "predictions.csv").read_bytes()
    printed = capsys.readouterr().out
    rows = predictions(tmp_path / "predictions.csv")
    for name in NAMES:
        own = [float(row["confidence"]) for row in rows if row["label"] == name]
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert line.split()[1:] == [str(len(own)), f"{100 * len(own) / 180:.1f}", f"{100 * np.mean(own):.1f}"]
    assert printed.splitlines()[len(NAMES) + 1].split()[:3] == ["all", "180", "100.0"]


def test_labels_say_how_many_are_right(model, capsys):
    assert call("predict", model / "adapted" / "model.safetensors", model / "labelled.npz") == 0
    printed = capsys.readouterr().out
    labels = np.load(model / "labelled.npz")["labels"]
    right = np.mean([r["label"] == y for r, y in zip(predictions(model / "adapted" / "predictions.csv"), labels)])
    assert f"right: {100 * right:.1f} % of 180 labelled samples" in printed


def test_labels_that_the_model_does_not_know_are_wrong(model, tmp_path, capsys):
    features = np.load(model / "target.npz")["features"]
    np.savez(tmp_path / "oaks.npz", features=features, labels=np.where(np.arange(180) < 45, "oak", ""))
    assert call("predict", model / "adapted", tmp_path / "oaks.npz") == 0
    assert "right: 0.0 % of 45 labelled samples" in capsys.readouterr().out


def test_chunk_by_chunk(model, tmp_path, monkeypatch):
    """The file is never in memory as a whole, and the answers are those of the whole."""
    from fastda.data_files import Samples, samples

    monkeypatch.setattr(samples, "CHUNK_BYTES", 7 * 3 * 4)  # seven rows
    monkeypatch.setattr(Samples, "read", lambda self: pytest.fail("read as a whole"))
    assert call("predict", model / "adapted", model / "target.npz", "--out", tmp_path / "predictions.csv") == 0
    got, expected = (predictions(folder / "predictions.csv") for folder in (tmp_path, model / "adapted"))
    assert [row["label"] for row in got] == [row["label"] for row in expected]
    confidences = [[float(row["confidence"]) for row in rows] for rows in (got, expected)]
    np.testing.assert_allclose(*confidences, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("adapted", "narrow.npz"), "which the model was made for, got (2,); take the same features"),
        (("adapted", "images.npz"), "images.npz: expected samples of shape (3,), 3 features"),
        (("absent", "target.npz"), "absent: expected a model that fastda adapt wrote, got no such file"),
        (("target.npz", "target.npz"), "target.npz: expected a model that fastda adapt wrote, got a file that is no"),
        (("foreign.safetensors", "target.npz"), "foreign.safetensors: expected a model that fastda adapt wrote, of"),
        (("truncated.safetensors", "target.npz"), "truncated.safetensors: expected a model that fastda adapt wrote"),
        (("adapted", "nan.npz"), "nan.npz: expected finite numbers"),
        (("adapted", "target.npz", "--network", "os:getcwd"), "expected network=None"),
        (("adapted", "target.npz", "--device", "abacus"), "device: expected"),
    ],
)
def test_bad_input_is_a_sentence_and_nothing_is_written(model, capsys, monkeypatch, arguments, says):
    from safetensors.torch import save_file

    monkeypatch.chdir(model)
    features = np.load("target.npz")["features"]
    np.savez("narrow.npz", features=features[:, :2])
    np.savez("images.npz", images=images()[0])
    np.savez("nan.npz", features=np.where(np.arange(180)[:, None] == 179, np.nan, features))
    save_file({"weight": torch.zeros(2)}, "foreign.safetensors")
    whole = (model / "adapted" / "model.safetensors").read_bytes()
    (model / "truncated.safetensors").write_bytes(whole[:-10])
    assert call("predict", *arguments, "--out", "predictions.csv") == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("fastda predict: error: ") and says in error
    assert not list(model.glob("*predictions.csv*"))


def test_out_is_checked_first(model, tmp_path, capsys):
    assert call("predict", model / "adapted", model / "target.npz", "--out", tmp_path / "no" / "predictions.csv") == 1
    assert "--out: expected a file in a folder that exists" in capsys.readouterr().err


def test_integers_stay_integers(tmp_path):
    x, y = torch.randn(40, 2), torch.arange(40) % 2 * 7
    found = adapt(x + y[:, None], y, x + y[:, None], method="source-only", epochs=5, out=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert found.model.classes == (0, 7) and written["classes"] == [0, 7]
    assert set(found.model.predict(x)) <= {0, 7}


def test_columns_go_by_name(tmp_path, capsys):
    """A table with its columns in another order, and others beside them, is the same table."""
    pandas = pytest.importorskip("pandas", reason="writes the tables")
    pytest.importorskip("pyarrow", reason="reads the tables")
    source, labels, target, _ = clouds(60)
    table = pandas.DataFrame(target, columns=["length", "width", "weight"])
    table.to_csv(tmp_path / "target.csv", index=False)
    table.assign(age=1.0)[["age", "weight", "length", "width"]].to_csv(tmp_path / "mixed.csv", index=False)
    table[["weight", "length"]].to_csv(tmp_path / "narrow.csv", index=False)
    table = pandas.DataFrame(source, columns=["length", "width", "weight"]).assign(tree=np.array(NAMES)[labels])
    table.to_csv(tmp_path / "source.csv", index=False)
    arguments = (tmp_path / "source.csv", tmp_path / "target.csv", "--label", "tree", "--method", "prototypes")
    assert call("adapt", *arguments, "--epochs", 5, "--out", tmp_path / "adapted") == 0
    assert call("predict", tmp_path / "adapted", tmp_path / "mixed.csv", "--out", tmp_path / "predictions.csv") == 0
    assert (tmp_path / "predictions.csv").read_text() == (tmp_path / "adapted" / "predictions.csv").read_text()
    assert call("predict", tmp_path / "adapted", tmp_path / "narrow.csv") == 1
    assert "a column for each feature of the source, got none named 'width'" in capsys.readouterr().err


def test_folders_of_images(tmp_path, capsys):
    """With a folder for each class in the source; those to classify are larger, and in colour."""
    Image = pytest.importorskip("PIL.Image", reason="writes the images")
    source, labels, target, _ = images(60)
    for folder, pictures, names in (
        ("source", source, np.array(NAMES)[labels]),
        ("target", target, [""] * len(target)),
    ):
        for number, (picture, name) in enumerate(zip(pictures, names)):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            pixels = (255 * picture[0].clip(0, 1)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / name / f"{number:03}.png")
    (tmp_path / "large").mkdir()
    for path in (tmp_path / "target").iterdir():
        Image.open(path).resize((16, 16), Image.Resampling.NEAREST).convert("RGB").save(tmp_path / "large" / path.name)
    out = tmp_path / "adapted"
    arguments = (tmp_path / "source", tmp_path / "target", "--method", "source-only", "--epochs", 20)
    assert call("adapt", *arguments, "--out", out) == 0
    assert call("predict", out, tmp_path / "large", "--image-size", 8, "--out", tmp_path / "predictions.csv") == 0
    assert call("predict", out, tmp_path / "large") == 1
    assert "got (1, 16, 16); resize the images (--image-size 8)" in capsys.readouterr().err
    got, expected = (predictions(path / "predictions.csv") for path in (tmp_path, out))
    assert len({row["label"] for row in expected}) > 1
    assert np.mean([a["label"] == b["label"] for a, b in zip(got, expected)]) > 0.9
