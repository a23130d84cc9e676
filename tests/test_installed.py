"""The tests refuse to run on another fastda than their own; and their random numbers depend on nothing else."""

from __future__ import annotations

import random
from pathlib import Path

import installed
import numpy as np
import pytest
import seeds
import torch
from installed import complaint

from fastda.kernels import cpp, stamp

LEFT_OUT = cpp.Status(False, None, None, "absent: installed without kernels")


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository, and beside it an installed package of the same content."""
    root = tmp_path / "repository"
    for package in (root / "fastda", tmp_path / "fastda"):
        (package / "ops").mkdir(parents=True)
        (package / "ops" / "coral.py").write_text("loss = 1\n")
    (root / "csrc").mkdir()
    (root / "csrc" / "module.cpp").write_text("int module;\n")
    return root


def in_use(root: Path) -> cpp.Status:
    return cpp.Status(True, "_C.so", {"sources": stamp.sources_hash(root / "csrc")}, "")


def test_what_was_installed_from_these_sources_is_tested(root):
    assert complaint(in_use(root), root.parent / "fastda", root, installed=True) == ""


def test_an_install_without_kernels_is_tested_too(root):
    assert complaint(LEFT_OUT, root.parent / "fastda", root, installed=True) == ""


def test_nothing_installed(root):
    assert complaint(LEFT_OUT, root / "fastda", root, installed=False) == (
        f"fastda is not installed; install it in {root} with: pip install '.[test]'"
    )


def test_a_core_of_other_sources_in_use(root):
    status = in_use(root)
    (root / "csrc" / "module.cpp").write_text("int other;\n")
    message = complaint(status, root.parent / "fastda", root, installed=True)
    assert message.startswith("the installed compiled core is of other sources than those in csrc; in ")
    assert message.endswith(": pip install --no-deps --force-reinstall .")


def test_a_core_that_was_refused(root):
    reason = "not loaded: compiled from other sources than those in csrc; rebuild in / with: pip install ."
    status = cpp.Status(False, "_C.so", {"sources": "0"}, reason)
    assert complaint(status, root / "fastda", root, installed=True) == f"the compiled core is {reason}"


@pytest.mark.parametrize("change", ["edited", "new", "gone"])
def test_python_files_that_are_not_the_installed_ones(root, change):
    ops = root / "fastda" / "ops"
    file = ops / ("new.py" if change == "new" else "coral.py")
    file.unlink() if change == "gone" else file.write_text("loss = 2\n")
    message = complaint(in_use(root), root.parent / "fastda", root, installed=True)
    assert f" differs from the source folder in ops/{file.name}; in {root}: pip install" in message
    assert complaint(in_use(root), root / "fastda", root, installed=True) == ""


def test_the_session_stops(monkeypatch):
    installed.check()
    assert "compiled core" in installed.description()
    monkeypatch.setattr(cpp, "status", cpp.Status(False, "_C.so", {"sources": "0"}, "not loaded: because"))
    with pytest.raises(pytest.UsageError, match="^the compiled core is not loaded: because$"):
        installed.check()


# Seeds


def draw() -> tuple:
    return random.random(), np.random.random(), torch.rand(()).item()


def test_random_numbers_depend_on_the_test_alone(request, monkeypatch):
    first = draw()
    assert draw() != first
    seeds.seed(request.node.nodeid)
    assert draw() == first
    monkeypatch.setattr(seeds, "SEED", seeds.SEED + 1)
    seeds.seed(request.node.nodeid)
    assert draw() != first


@pytest.fixture(scope="module")
def shared() -> tuple:
    return draw()


def test_a_shared_fixture_has_random_numbers_of_its_own(request, shared):
    seeds.seed(f"{Path(__file__).relative_to(installed.ROOT).as_posix()} shared")
    assert draw() == shared
