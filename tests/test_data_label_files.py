"""Labels from a file of their own."""

from __future__ import annotations

import numpy as np
import pytest

from fastda.data_files import open_labels

NAMES = ("cat", "dog")
EXPECTED = [1, -1, 0, 1]
VALUES = ["dog", "", "cat", "dog"]


def opened(path, **options):
    return open_labels(path, **{"count": 4, "class_names": NAMES} | options).tolist()


@pytest.mark.parametrize("key", ["labels", "label", "y"])
@pytest.mark.parametrize("beside", [{}, {"features": np.zeros((4, 2))}])
def test_npz(tmp_path, key, beside):
    np.savez(tmp_path / "a.npz", **{key: np.array(VALUES)}, **beside)
    assert opened(tmp_path / "a.npz") == EXPECTED
    np.savez(tmp_path / "b.npz", **{"animal": np.array(VALUES)}, **beside)
    assert opened(tmp_path / "b.npz", label="animal") == EXPECTED


def test_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.array(VALUES))
    assert opened(tmp_path / "a.npy") == EXPECTED
    np.save(tmp_path / "b.npy", np.array([7.0, np.nan, 3, 7]))
    assert opened(tmp_path / "b.npy", class_names=(3, 7)) == EXPECTED


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables(tmp_path, beside, suffix):
    pandas = pytest.importorskip("pandas", reason="writes the tables")
    pytest.importorskip("pyarrow", reason="reads the tables")
    columns = {"label": VALUES} | ({"width": [1.0, 2, 3, 4]} if beside else {"name": list("abcd")})
    table, path = pandas.DataFrame(columns), tmp_path / f"a.{suffix}"
    table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    assert opened(path) == EXPECTED
    with pytest.raises(ValueError, match=r"a column 'animal' of labels, got 'label'.*--label"):
        opened(path, label="animal")


def test_folder_of_images(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="writes the images")
    for name, count in (("cat", 1), ("dog", 2)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("L", (4, 4)).save(tmp_path / name / f"{number}.png")
    assert opened(tmp_path, count=3) == [0, 1, 1]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (["dog", "cat"], "a label for each of the 4 samples, got 2"),
        (["dog", "cat", "fox", ""], "among the source's classes, 'cat', 'dog', got 'fox'"),
        ([""] * 4, "expected labels, got none that is known"),
        (np.array(VALUES, dtype=object), "never loaded"),
        ([0.5, 1, 2, 3], "whole numbers or text, got 0.5"),
    ],
)
@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_what_is_no_labels(tmp_path, values, says, suffix):
    path = tmp_path / f"a.{suffix}"
    np.save(path, values) if suffix == "npy" else np.savez(path, labels=values)
    with pytest.raises(ValueError, match=says):
        opened(path)


@pytest.mark.parametrize("suffix", ["npz", "npy"])
def test_truncated(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    np.save(path, VALUES) if suffix == "npy" else np.savez(path, labels=VALUES)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        opened(path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="got nothing of that name"):
        opened(tmp_path / "a.npz")
    (tmp_path / "a.txt").write_text("cat")
    with pytest.raises(ValueError, match=r"got the ending '.txt'"):
        opened(tmp_path / "a.txt")
