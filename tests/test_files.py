"""Files are written whole or not at all."""

from __future__ import annotations

import os

import pytest

from fastda.files import check_writable, write_atomically


def test_the_whole_file_is_there(tmp_path):
    path = tmp_path / "numbers.json"
    for content in (b"[1]", b"[2, 3]"):
        write_atomically(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_refused_beforehand(tmp_path, monkeypatch):
    check_writable("--figure", None)
    check_writable("--figure", tmp_path / "a.png")
    for path in (tmp_path, tmp_path / "no folder" / "a.png"):
        with pytest.raises(ValueError, match="--figure: expected a file in a folder that exists and is writable, got"):
            check_writable("--figure", path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="--figure: .*; choose another"):
        check_writable("--figure", tmp_path / "a.png")
