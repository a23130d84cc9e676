"""`fastda diagnose` on files, typed as a new user would; `fastda demo --write-data`, which makes some."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from fastda import cli, recommend
from fastda.data_files import open_pair
from fastda.demo.data import make_domains
from fastda.demo.export import FILES
from fastda.shift import command
from fastda.shift.known_shifts import make

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def diagnose(*arguments, capsys) -> str:
    """What is printed, in one line; the exit code has to be 0."""
    code = cli.main(["diagnose", *map(str, arguments)])
    output = capsys.readouterr()
    assert code == 0, output.err
    return " ".join(output.out.split())


def refused(*arguments, capsys) -> str:
    """The one sentence that is printed where the exit code is 1; nothing is written."""
    before = sorted(Path().rglob("*"))
    assert cli.main(["diagnose", *map(str, arguments)]) == 1
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("fastda diagnose: error: ") and output.err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return output.err


def write(name: str, seed: int = 0, labelled: int | None = 0):
    """A known shift as source.npz and target.npz, which has so many labels; None for all."""
    known = make(name, seed)
    labels = known.target_labels.copy()
    labels[len(labels) if labelled is None else labelled :] = -1
    np.savez("source.npz", features=known.source, labels=known.source_labels)
    np.savez("target.npz", features=known.target, **({} if labelled == 0 else {"labels": labels}))
    return known


def test_the_example_runs_as_typed(capsys):
    """In a fresh folder: the demo's shift, written to files, is a covariate shift, against which adaptation helps."""
    for part in cli.COMMANDS["diagnose"].example.split("&&"):
        assert cli.main(shlex.split(part)[1:]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Covariate shift: the inputs, p(x), are not what they were." in text
    assert "label shift:" not in text and "Class frequencies" not in text
    assert "Recommended: unsupervised adaptation with Deep CORAL." in text
    assert "DeepCORAL(feature_extractor, label_predictor" in text
    assert text.endswith("In one command: fastda adapt shift/source.npz shift/target.npz --out adapted")
    assert "574 source samples, 573 of the target; 256 features." in text and "pixel 0, 0" in text


def test_the_demos_data_are_what_it_trains_on(capsys):
    assert cli.main(["demo", "--write-data", "new/folder"]) == 0
    output, folder = capsys.readouterr().out, Path("new/folder")
    assert all(f"Wrote new/folder/{name}: " in output for name in FILES)
    assert output.splitlines()[-1] == "Next: fastda diagnose new/folder/source.npz new/folder/target.npz"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    domains = make_domains(0)
    for name, part in zip(("source", "target", "target_test"), ("source_train", "target_train", "target_test")):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            assert np.array_equal(arrays["images"], getattr(domains, part).images)
            assert ("labels" in arrays) == (name != "target")
            if name != "target":
                assert np.array_equal(arrays["labels"], getattr(domains, part).labels)
    with np.load(folder / "target_labels.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["labels"], domains.target_train.labels)


def test_a_folder_that_cannot_be_made_is_refused(capsys):
    Path("file").write_text("in the way")
    assert cli.main(["demo", "--write-data", "file"]) == 1
    error = capsys.readouterr().err
    assert "--write-data: expected a folder that can be made or written to, got 'file'" in error
    assert error.count("\n") == 1 and Path("file").read_text() == "in the way"


def test_label_shift_shows_the_classes_that_changed(capsys):
    known = write("label: three rare classes")
    text = diagnose("source.npz", "target.npz", "--figure", "a.png", "--json", "a.json", capsys=capsys)
    assert text.startswith("Label shift: ") and "Class frequencies, %" in text
    assert "Recommended: correct the predictions for the new class frequencies." in text
    assert text.endswith("Wrote a.png Wrote a.json")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("a.json").read_text())
    assert found["kinds"] == ["label"] and found["recommendation"]["method"] == "reweight"
    sizes = found["num_source"], found["num_target"], found["num_labelled"]
    assert sizes == (len(known.source), len(known.target), 0)


def test_known_target_labels_show_concept_drift(capsys):
    write("concept: relabelled", labelled=None)
    text = diagnose("source.npz", "target.npz", capsys=capsys)
    assert text.startswith("Concept drift: ") and "500 of the target, 500 of them labelled" in text


def test_every_format_gives_the_same_diagnosis(capsys):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow
    from pyarrow import csv, parquet

    known = write("label: three rare classes")
    words = np.array([f"digit {label}" for label in known.source_labels])
    columns = {f"feature {j}": known.source[:, j] for j in range(64)}
    csv.write_csv(pyarrow.table(columns | {"digit": words}), "source.csv")
    parquet.write_table(pyarrow.table({f"feature {j}": known.target[:, j] for j in range(64)}), "target.parquet")
    diagnose("source.npz", "target.npz", "--json", "a.json", capsys=capsys)
    text = diagnose("source.csv", "target.parquet", "--label", "digit", "--json", "b.json", capsys=capsys)
    assert "(digit 8: 10.0 → 0.0 %" in text
    a, b = (json.loads(Path(name).read_text()) for name in ("a.json", "b.json"))
    assert [a[key] for key in ("kinds", "tests", "features")] == [b[key] for key in ("kinds", "tests", "features")]
    assert a["label_shift"]["target_frequencies"] == b["label_shift"]["target_frequencies"]


def test_folders_of_images(capsys):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from PIL import Image

    random = np.random.default_rng(0)
    for domain, brightness in (("studio", 60), ("phone", 120)):
        for kind in range(2):
            for i in range(30):
                folder = Path(domain, f"kind {kind}") if domain == "studio" else Path(domain)
                folder.mkdir(parents=True, exist_ok=True)
                pixels = random.normal(brightness, 20, (40, 4, 3))
                pixels[:, : 2 * (1 + kind)] += 40
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{kind} {i}.png")
    text = diagnose("studio", "phone", capsys=capsys)
    assert text.startswith("Covariate shift: ") and "192 features" in text
    assert "averages over 16×4 parts are looked at" in text and "red " in text


def test_the_advice_is_for_the_situation_given(capsys):
    write("covariate: noise", labelled=60)
    diagnose("source.npz", "target.npz", "--json", "a.json", "--labelled-per-class", 120, capsys=capsys)
    found = json.loads(Path("a.json").read_text())
    assert (found["num_labelled"], found["num_unlabelled"]) == (60, 440)
    assert found["recommendation"]["reason"].startswith("120 labelled samples a class are enough for the top layers")

    source, _ = open_pair("source.npz", "target.npz")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def advice(*arguments):
        args = parser.parse_args(["source.npz", "target.npz", *map(str, arguments)])
        return recommend(**{"labelled": 60, "unlabelled": 440, "num_classes": 10} | command.the_situation(args, source))

    assert advice().method == "few-shot"  # six a class
    assert advice("--labelled-per-class", 2000).method == "finetune"
    assert advice("--labelled", 0, "--unlabelled", 7).method == "coral"
    assert "and 7 have none" in advice("--labelled", 0, "--unlabelled", 7).reason
    assert advice("--labelled", 150).method == "coral+finetune"
    assert advice("--labelled", 150, "--domains", "similar").method == "feature-extraction"
    assert "a little noise on the features" in str(advice("--labelled", 150))
    assert "colour jitter" in str(advice("--labelled", 150, "--modality", "images"))
    assert "multilingual" in advice("--labelled", 20_000, "--scenario", "English -> French text").code
    with pytest.raises(SystemExit):
        advice("--labelled", 1, "--labelled-per-class", 1)


def test_without_source_labels(capsys):
    known = make("covariate: noise", 0)
    np.save("source.npy", known.source)
    np.save("target.npy", known.target)
    text = diagnose("source.npy", "target.npy", capsys=capsys)
    assert "Covariate shift" in text and "without source labels" in text
    assert "Recommended: the model as it is. Without labelled source samples" in text
    error = refused("source.npy", "target.npy", "--labelled-per-class", 5, capsys=capsys)
    assert "--labelled-per-class: expected labels in source.npy" in error


def test_of_many_samples_a_random_part_is_looked_at(capsys):
    """And threads and random states of the program are left as they were."""
    write("covariate: noise")
    torch.set_num_threads(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    text = diagnose("source.npz", "target.npz", "--max-samples", 400, "--json", "a.json", capsys=capsys)
    assert "790 source samples, 500 of the target" in text
    assert "of 790 source samples a random 400 are looked at; --max-samples takes more" in text
    assert json.loads(Path("a.json").read_text())["num_target"] == 500
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert torch.equal(before[0], torch.get_rng_state()) and np.array_equal(before[1], np.random.get_state()[1])


def test_classes_that_only_the_target_has_are_a_warning(capsys):
    known = make("none", 0)
    np.savez("source.npz", x=known.source[known.source_labels < 9], y=known.source_labels[known.source_labels < 9])
    np.savez("target.npz", x=known.target, y=known.target_labels)
    text = diagnose("source.npz", "target.npz", capsys=capsys)
    assert "Warning: the target has a class that the source has not: 9;" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no.npz", "target.npz"), "no.npz: expected .npz, .npy, .csv"),
        (("source.npz", "few.npy"), "few.npy: expected at least 20 samples, got 3"),
        (("source.npz", "narrow.npy"), "narrow.npy: expected features as in source.npz, 64 features, got 5 features"),
        (("one.npz", "target.npz"), "one.npz: expected labels of at least two classes, got 4 alone"),
        (("source.npz", "nan.npy"), "nan.npy: expected finite numbers in float32, got nan at sample 3, feature 9"),
        (("source.npz", "target.npz", "--figure", "no/a.png"), "--figure: expected a file in a folder that exists"),
        (("source.npz", "target.npz", "--figure", "a.doc"), "--figure: expected a suffix of "),
        (("source.npz", "target.npz", "--json", "."), "--json: expected a file in a folder that exists"),
        (("source.npz", "target.npz", "--labelled", "-1"), "--labelled: expected at least 0, got -1"),
        (("source.npz", "target.npz", "--max-samples", "5"), "--max-samples: expected at least 20, got 5"),
        (("source.npz", "target.npz", "--alpha", "0"), "--alpha: expected a number above 0"),
        (("source.npz", "target.npz", "--image-size", "8"), "source.npz: expected a folder of images"),
        (("rare.npz", "target.npz"), "rare.npz: expected at least 2 samples of each of the 10 classes, got fewer of 4"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(arguments, message, capsys):
    known = write("none")
    labels = known.source_labels
    rows = (labels != 4) | (np.arange(len(labels)) == np.flatnonzero(labels == 4)[0])
    np.savez("one.npz", x=known.source, y=np.full(len(labels), 4))
    np.savez("rare.npz", x=known.source[rows], y=labels[rows])
    np.save("few.npy", known.target[:3])
    np.save("narrow.npy", known.target[:, :5])
    known.target[3, 9] = np.nan
    np.save("nan.npy", known.target)
    assert message in refused(*arguments, capsys=capsys)


def test_an_interrupt_leaves_nothing_behind(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    write("none")
    monkeypatch.setattr(command, "diagnose", interrupted)
    assert cli.main(["diagnose", "source.npz", "target.npz", "--json", "a.json", "--figure", "a.png"]) == 130
    assert capsys.readouterr() == ("", "fastda diagnose: interrupted\n")
    assert sorted(path.name for path in Path().iterdir()) == ["source.npz", "target.npz"]
