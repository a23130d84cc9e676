"""Samples from files: every format gives the same, in chunks of any size; what cannot be read says why."""

from __future__ import annotations

import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastda.data_files import open_pair, open_samples
from fastda.data_files import samples as samples_module
from fastda.data_files import tables

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytest.importorskip("PIL", reason="Pillow is not installed")

import pyarrow
from PIL import Image
from pyarrow import parquet

NAMES = ["a", "b", "c"]
FEATURES = np.random.default_rng(0).normal(size=(57, 3)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 3, 57)
WORDS = np.array(["cat", "dog", "eel"])[LABELS]


def write_csv(path, features=FEATURES, labels=LABELS, names=NAMES, separator=",", decimal="."):
    rows = [[repr(float(x)).replace(".", decimal) for x in row] for row in features]
    if labels is not None:
        names, rows = [*names, "label"], [[*row, str(label)] for row, label in zip(rows, labels)]
    path.write_text("".join(separator.join(row) + "\n" for row in [names, *rows]))


def write_parquet(path, features=FEATURES, labels=LABELS, names=NAMES):
    columns = dict(zip(names, np.asarray(features).T))
    parquet.write_table(pyarrow.table(columns | ({} if labels is None else {"label": labels})), path)


def write_npz(path, **arrays):
    np.savez(path, **arrays)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same samples in every format."""
    folder = tmp_path_factory.mktemp("samples")
    write_npz(folder / "stored.npz", features=FEATURES, labels=LABELS)
    np.savez_compressed(folder / "compressed.npz", X=FEATURES, y=LABELS[:, None])
    doubles = np.asfortranarray(FEATURES.astype(np.float64))
    write_npz(folder / "columns first.npz", x=doubles, labels=LABELS.astype(float))
    write_npz(folder / "words.npz", features=FEATURES, labels=WORDS)
    write_npz(folder / "big endian.npz", features=FEATURES.astype(">f8"), labels=LABELS.astype(">i4"))
    np.save(folder / "array.npy", FEATURES)
    np.save(folder / "columns first.npy", np.asfortranarray(FEATURES))
    write_csv(folder / "table.csv")
    write_csv(folder / "words.csv", labels=WORDS)
    write_csv(folder / "semicolons.csv", separator=";", decimal=",")
    write_csv(folder / "tabs.csv", separator="\t")
    write_csv(folder / "floats.csv", labels=LABELS.astype(float))
    write_parquet(folder / "table.parquet")
    write_parquet(folder / "words.parquet", labels=pyarrow.array(WORDS.tolist()).dictionary_encode())
    return folder


FILES = (
    "stored.npz",
    "compressed.npz",
    "columns first.npz",
    "words.npz",
    "big endian.npz",
    "array.npy",
    "columns first.npy",
    "table.csv",
    "words.csv",
    "semicolons.csv",
    "tabs.csv",
    "floats.csv",
    "table.parquet",
    "words.parquet",
)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same(name, folder):
    samples = open_samples(folder / name)
    features, labels = samples.read()
    assert features.dtype == torch.float32 and np.array_equal(features.numpy(), FEATURES)
    assert (len(samples), samples.shape, samples.nbytes) == (57, (3,), FEATURES.nbytes)
    assert samples.feature_names == (tuple(NAMES) if name.endswith((".csv", ".parquet")) else ())
    if name.endswith(".npy"):
        assert labels is None and samples.class_names == () and samples.num_labelled == 0
    else:
        assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), LABELS)
        assert samples.class_names == (("cat", "dog", "eel") if name.startswith("words") else (0, 1, 2))
        assert samples.num_labelled == 57


@settings(max_examples=20)
@given(name=st.sampled_from(FILES), rows=st.integers(1, 80))
def test_chunks_of_any_size_are_the_whole(name, rows, folder):
    chunks = list(open_samples(folder / name).chunks(rows))
    assert [len(features) for features, _ in chunks[:-1]] == [rows] * (len(chunks) - 1)
    assert np.array_equal(torch.cat([features for features, _ in chunks]).numpy(), FEATURES)
    if not name.endswith(".npy"):
        assert np.array_equal(torch.cat([labels for _, labels in chunks]).numpy(), LABELS)


def test_a_part_is_drawn_in_order_and_with_its_labels(folder):
    samples = open_samples(folder / "stored.npz")
    features, labels = samples.draw(20, seed=3)
    rows = [np.flatnonzero((FEATURES == row).all(1)).item() for row in features.numpy()]
    assert len(rows) == 20 and rows == sorted(set(rows)) and np.array_equal(labels.numpy(), LABELS[rows])
    assert not torch.equal(features, samples.draw(20, seed=4)[0])
    assert len(samples.draw(57)[0]) == len(samples.draw(100)[0]) == 57


def test_a_compressed_archive_is_read_in_chunks(tmp_path):
    path, total = tmp_path / "large.npz", 40_000 * 128 * 4
    np.savez_compressed(path, features=np.zeros((40_000, 128), np.float32))
    samples = open_samples(path)
    tracemalloc.start()
    for chunk, _ in samples.chunks(1000):
        assert len(chunk) == 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < total / 8


def test_what_does_not_fit_into_memory_is_refused_before_it_is_tried(folder, monkeypatch):
    monkeypatch.setattr(samples_module, "available_memory", lambda: 500)
    samples = open_samples(folder / "stored.npz")
    with pytest.raises(ValueError, match="expected samples that fit into memory, got 57 of shape .* take 0.0 MiB to"):
        samples.read()
    assert len(samples.draw(20)[0]) == 20 and sum(len(features) for features, _ in samples.chunks(10)) == 57


def test_the_memory_that_is_there():
    from fastda.data_files.memory import _of_the_container, available_memory

    if hasattr(os, "sysconf"):
        assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert _of_the_container(Path("/no such folder")) is None


def test_a_containers_limit_counts(tmp_path):
    from fastda.data_files.memory import _of_the_container

    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert _of_the_container(tmp_path) == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert _of_the_container(tmp_path) is None


# Labels


@pytest.mark.parametrize("suffix", ["npz", "csv", "parquet"])
def test_some_labels_are_unknown(suffix, tmp_path):
    path = tmp_path / f"some.{suffix}"
    if suffix == "npz":
        write_npz(path, x=FEATURES[:4], y=np.array([7.0, np.nan, 5, -1]))
    elif suffix == "csv":  # as pandas writes whole numbers of which some are missing
        write_csv(path, FEATURES[:4], ["7.0", "", "5.0", "-1.0"])
    else:
        write_parquet(path, FEATURES[:4], pyarrow.array([7, None, 5, -1]))
    samples = open_samples(path)
    assert samples.class_names == (5, 7) and samples.labels.tolist() == [1, -1, 0, -1] and samples.num_labelled == 2


def test_the_sources_classes_are_imposed(folder):
    samples = open_samples(folder / "words.csv", class_names=("eel", "owl", "dog", "cat"))
    assert samples.class_names == ("eel", "owl", "dog", "cat")
    assert [samples.class_names[label] for label in samples.labels] == WORDS.tolist()
    with pytest.raises(ValueError, match="words.csv, column 'label': expected labels among .* 'cat', got 'dog', 'eel'"):
        open_samples(folder / "words.csv", class_names=("cat",))


def test_the_column_of_labels_has_any_name(tmp_path):
    write_csv(tmp_path / "a.csv", np.c_[FEATURES, LABELS], None, [*NAMES, "species"])
    write_npz(tmp_path / "a.npz", x=FEATURES, species=WORDS, labels=LABELS)
    for suffix, classes in ((".csv", (0, 1, 2)), (".npz", ("cat", "dog", "eel"))):
        samples = open_samples(tmp_path / f"a{suffix}", label="species")
        assert samples.shape == (3,) and samples.class_names == classes
    with pytest.raises(ValueError, match="a.npz: expected the labels under 'kind', got 'x', 'species', 'labels'"):
        open_samples(tmp_path / "a.npz", label="kind")


# Images


def picture(path, mode="RGB", size=(6, 4), value=None):
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], channels) if channels > 1 else (size[1], size[0])
    pixels = np.random.default_rng(len(path.name)).integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels if value is None else np.full(shape, value, np.uint8)).save(path)
    return pixels


def test_a_folder_for_each_class(tmp_path):
    pixels = picture(tmp_path / "dog" / "b.png"), picture(tmp_path / "cat" / "deeper" / "a.PNG")
    picture(tmp_path / "unknown.png")
    (tmp_path / "notes.txt").write_text("no image")
    picture(tmp_path / ".hidden" / "a.png")
    samples = open_samples(tmp_path)
    assert samples.shape == (3, 4, 6)
    assert samples.class_names == ("cat", "dog") and samples.labels.tolist() == [-1, 0, 1]
    images, _ = samples.read()
    for image, expected in zip(images[1:], reversed(pixels)):
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1) / 255)


def test_images_without_classes_are_grey_where_all_are(tmp_path):
    pixels = picture(tmp_path / "a.png", "L")
    samples = open_samples(tmp_path)
    assert samples.shape == (1, 4, 6) and samples.labels is None
    assert torch.equal(samples.read()[0][0, 0], torch.from_numpy(pixels) / 255)
    assert open_samples(tmp_path, channels=3).read()[0].shape == (1, 3, 4, 6)
    picture(tmp_path / "b.png")
    assert open_samples(tmp_path).shape == (3, 4, 6)


def test_sixteen_bits_are_kept(tmp_path):
    values = np.array([[0, 1, 65535], [256, 40000, 7]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    image = open_samples(tmp_path).read()[0]
    np.testing.assert_allclose(image[0, 0], values / 65535, atol=1e-7)


def test_photographs_are_upright(tmp_path):
    image = Image.new("L", (6, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "lying.jpg", exif=exif)
    assert open_samples(tmp_path).shape == (1, 6, 4) == open_samples(tmp_path).read()[0].shape[1:]


def test_images_are_resized_where_that_is_asked_for(tmp_path):
    picture(tmp_path / "a.png", value=100)
    picture(tmp_path / "b.png", size=(9, 9), value=200)
    with pytest.raises(ValueError, match=r"one size, got 6×4 pixels in a.png and 9×9 in b.png; .* \(--image-size 64\)"):
        open_samples(tmp_path)
    images, _ = open_samples(tmp_path, image_size=(5, 7)).read()
    assert images.shape == (2, 3, 5, 7)
    np.testing.assert_allclose(images[:, 0, 0, 0], np.array([100, 200]) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 5, 6), (1, 5, 6)), ((2, 3, 5, 6), (3, 5, 6)), ((2, 5, 6, 3), (3, 5, 6)), ((2, 5, 6, 1), (1, 5, 6))],
)
def test_arrays_of_images(shape, expected, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_npz(tmp_path / "a.npz", images=pixels)
    np.save(tmp_path / "a.npy", pixels)
    channels_first = np.moveaxis(pixels, 3, 1) if shape[-1] in (1, 3) else pixels
    for name in ("a.npz", "a.npy"):
        samples = open_samples(tmp_path / name)
        assert samples.shape == expected
        np.testing.assert_array_equal(samples.read()[0], channels_first.reshape(2, *expected).astype(np.float32) / 255)


# Two domains


def test_a_pair_agrees_on_classes_and_columns(tmp_path, folder):
    write_csv(tmp_path / "target.csv", FEATURES[:5, [2, 0, 1]], ["2", "", "", "1", "1"], ["c", "a", "b"])
    source, target = open_pair(folder / "table.parquet", tmp_path / "target.csv")
    assert source.class_names == target.class_names == (0, 1, 2) and target.labels.tolist() == [2, -1, -1, 1, 1]
    assert target.feature_names == ("a", "b", "c") and np.array_equal(target.read()[0].numpy(), FEATURES[:5])


def test_a_grey_domain_and_one_in_colour(tmp_path):
    for name, mode in (("grey", "L"), ("colour", "RGB")):
        for kind in ("cat", "dog"):
            picture(tmp_path / name / kind / "a.png", mode)
    for names in (("grey", "colour"), ("colour", "grey")):
        source, target = open_pair(*(tmp_path / name for name in names))
        assert source.shape == target.shape == (3, 4, 6)
        assert source.read()[0].shape == target.read()[0].shape


def test_pairs_that_do_not_go_together(tmp_path, folder):
    write_npz(tmp_path / "one class.npz", x=FEATURES, y=np.zeros(57, int))
    write_npz(tmp_path / "some.npz", x=FEATURES, y=np.where(LABELS == 1, -1, LABELS))
    write_npz(tmp_path / "other.npz", x=FEATURES, y=LABELS + 2)
    write_npz(tmp_path / "apart.npz", x=FEATURES, y=LABELS + 5)
    np.save(tmp_path / "four.npy", np.zeros((57, 4)))
    write_csv(tmp_path / "renamed.csv", names=["a", "b", "d"])
    stored = folder / "stored.npz"
    for source, target, message in (
        (folder / "array.npy", stored, "array.npy: expected a label of each sample, got none, under 'label'"),
        (tmp_path / "one class.npz", stored, "one class.npz: expected labels of at least two classes, got 0 alone"),
        (tmp_path / "some.npz", stored, r"some.npz: expected a label of each sample, got \d+ of 57 without"),
        (stored, tmp_path / "other.npz", "other.npz, 'y': expected labels among .*classes, 0, 1, 2, got 3, 4 too"),
        (stored, tmp_path / "four.npy", "four.npy: expected features as in .*stored.npz, 3 features, got 4 features"),
        (folder / "table.csv", tmp_path / "renamed.csv", "expected a column for each feature of the source, .* 'c'"),
    ):
        with pytest.raises(ValueError, match=message):
            open_pair(source, target)
    assert open_pair(stored, tmp_path / "other.npz", labelled=False)[1].class_names == (2, 3, 4)
    with pytest.raises(ValueError, match="apart.npz: expected labels of the classes of .*, 0, 1, 2, got 5, 6"):
        open_pair(stored, tmp_path / "apart.npz", labelled=False)


# Bad input


class Harmful:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_nothing_is_unpickled(tmp_path):
    made = tmp_path / "made by a pickle"
    objects = np.empty(57, dtype=object)
    objects[:] = Harmful(made)
    write_npz(tmp_path / "features.npz", features=objects)
    write_npz(tmp_path / "labels.npz", features=FEATURES, labels=objects)
    np.save(tmp_path / "array.npy", objects)
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Harmful(made)))
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Harmful(made)))
    for name in ("features.npz", "labels.npz", "array.npy", "pickle.npz", "pickle.npy"):
        with pytest.raises(ValueError, match=rf"{name}.*: expected plain numbers, got pickled Python objects"):
            open_samples(tmp_path / name)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.npz")
    with pytest.raises(ValueError, match="model.npz: expected arrays as numpy.savez writes them, got .*data.pkl"):
        open_samples(tmp_path / "model.npz")
    assert not made.exists()


def with_value(row, column, value):
    features = FEATURES.copy()
    features[row, column] = value
    return features


BAD = {
    "missing": ("a.npz", lambda path: None, "expected .npz, .*, or a folder of images, got nothing of that name"),
    "ending": ("a.txt", lambda path: path.write_text("1"), "expected .npz, .*, got the ending '.txt'"),
    **{f"empty .{s}": (f"a.{s}", Path.touch, "got an empty file") for s in ("npz", "npy", "csv", "parquet")},
    "no array": ("a.npz", lambda path: zipfile.ZipFile(path, "w").close(), "expected arrays .*, got nothing"),
    "other keys": ("a.npz", lambda path: np.savez(path, FEATURES), "the features under one of .* got 'arr_0'"),
    "two keys": ("a.npz", lambda path: write_npz(path, x=FEATURES, X=FEATURES), "one of .*, got 'x', 'X'"),
    "fewer labels": ("a.npz", lambda path: write_npz(path, x=FEATURES, y=[1]), r"expected 57 labels, .* shape \(1,\)"),
    "flat": ("a.npz", lambda path: write_npz(path, x=LABELS), "expected samples × features, .* got shape"),
    "text features": ("a.npz", lambda path: write_npz(path, x=WORDS[:, None]), "features that are numbers, got <U3"),
    "complex": ("a.npy", lambda path: np.save(path, 1j * FEATURES), "features that are numbers, got complex64"),
    "float labels": (
        "a.npz",
        lambda path: write_npz(path, x=FEATURES, y=LABELS + 0.25),
        r"'y': expected class labels, whole numbers or text, got \d.25 at sample 0",
    ),
    "float label column": (
        "a.csv",
        lambda path: write_csv(path, labels=LABELS + 0.25),
        r"column 'label': expected class labels, .* got \d.25 at sample 0",
    ),
    "no sample": ("a.npy", lambda path: np.save(path, FEATURES[:0]), "expected at least one sample, got none"),
    "NaN": ("a.npz", lambda path: write_npz(path, x=with_value(5, 1, np.nan)), "got nan at sample 5, feature 1"),
    "Inf": ("a.csv", lambda path: write_csv(path, with_value(6, 2, np.inf)), "got inf at sample 6, column 'c'"),
    "empty cell": ("a.csv", lambda path: path.write_text("a,label\n1,0\n,1\n"), "got nan at sample 1, column 'a'"),
    "too large": ("a.npy", lambda path: np.save(path, [[1.0, 1e300]]), "in float32, got inf at sample 0, feature 1"),
    "header alone": ("a.csv", lambda path: path.write_text("a,label\n"), "got no sample"),
    "header, no end of line": ("a.csv", lambda path: path.write_text("a,label"), "got no sample"),
    "no header": ("a.csv", lambda path: path.write_text("1.5,2\n2.5,3\n"), "expected the names .* got numbers, '1.5'"),
    "index": ("a.csv", lambda path: path.write_text(",a\n0,1\n"), r"got none for column 1; .* index=False"),
    "same names": ("a.csv", lambda path: path.write_text("a,a\n0,1\n"), "its own name, got 'a' twice"),
    "column of text": (
        "a.csv",
        lambda path: path.write_text("a,sex,label\n1,m,0\n2,f,1\n"),
        "expected columns of numbers beside 'label', got 'sex' of string; .*--label",
    ),
    "text in parquet": (
        "a.parquet",
        lambda path: write_parquet(path, np.c_[WORDS, WORDS], None, ["u", "v"]),
        "got 'u', 'v' of string",
    ),
    "label with a capital": ("a.csv", lambda path: path.write_text("a,Label\n1,0\n"), "got one named 'Label'.*--label"),
    "labels alone": ("a.csv", lambda path: path.write_text("label\n1\n"), "columns of features, got 'label' alone"),
    "a line cut off": ("a.csv", lambda path: path.write_text("a,b,label\n1,2,0\n1,2"), "Expected 3 columns, got 2"),
    "UTF-16": ("a.csv", lambda path: path.write_bytes("a,label\n1,0\n".encode("utf-16")), "expected text in UTF-8"),
    "Latin-1": ("a.csv", lambda path: path.write_bytes("a,label\n1,\xe4\n".encode("latin-1")), "invalid UTF8 data"),
    "no rows": ("a.parquet", lambda path: write_parquet(path, FEATURES[:0], None), "at least one row, got none"),
    "no images": ("a", Path.mkdir, "expected images .* got none"),
    "no image": ("a", lambda path: (path.mkdir(), (path / "b.png").write_text("x")), "b.png: expected an image that"),
    "an empty image": ("a", lambda path: (path.mkdir(), (path / "b.png").touch()), "b.png: .*got an empty file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_that_names_the_file(case, tmp_path):
    name, make, message = BAD[case]
    make(tmp_path / name)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        open_samples(tmp_path / name).read()
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path / name)) and "\n" not in sentence
    assert ": expected " in sentence and ", got " in sentence and ";" in sentence


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".csv")])
@pytest.mark.parametrize("share", [0.99, 0.5, 0.02])
def test_a_truncated_file_is_refused(name, share, folder, tmp_path):
    whole, path = (folder / name).read_bytes(), tmp_path / name
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="truncated|damaged|pyarrow cannot read|something else"):
        open_samples(path).read()


def test_a_damaged_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", features=FEATURES)
    damaged = bytearray((tmp_path / "a.npz").read_bytes())
    damaged[400] ^= 1
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"truncated or damaged file \(Bad CRC-32"):
        open_samples(tmp_path / "a.npz").read()


def test_a_table_of_many_blocks(tmp_path, monkeypatch):
    """Numbers that begin as whole ones go on as others; what is no number is found in the last block too."""
    monkeypatch.setattr(tables, "BLOCK_BYTES", 500)
    path, values = tmp_path / "a.csv", [*range(300), 0.5]
    path.write_text("a,label\n" + "".join(f"{value},{value > 9:d}\n" for value in values))
    samples = open_samples(path)
    assert len(list(samples.blocks(1))) > 3
    assert samples.read()[0].flatten().tolist() == values and samples.labels.sum() == 290
    with open(path, "a") as file:
        file.write("x,1\n")
    with pytest.raises(ValueError, match="a.csv: .*pyarrow cannot read .*invalid value 'x'"):
        open_samples(path).read()


def test_an_image_cut_off_is_refused(tmp_path):
    picture(tmp_path / "a.png", size=(60, 60))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="a.png: expected an image that can be read, got image file is truncated"):
        open_samples(tmp_path).read()


def test_a_size_is_for_images(folder):
    wrong = ((16, "stored.npz: expected a folder of images"), ((1, 2, 3), "a side or"), (0, "at least 1"))
    for image_size, message in wrong:
        with pytest.raises(ValueError, match=message):
            open_samples(folder / "stored.npz", image_size=image_size)


@pytest.mark.parametrize(("name", "module", "library"), [("table.csv", "pyarrow", "pyarrow"), ("", "PIL", "Pillow")])
def test_a_missing_library_is_named(name, module, library, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    picture_folder = tmp_path / "images"
    picture_folder.mkdir()
    (picture_folder / "a.png").write_bytes(b"any")
    path = folder / name if name else picture_folder
    with pytest.raises(ModuleNotFoundError, match=rf"expected {library} to be .*: ?pip install|{library}.*pip install"):
        open_samples(path)
