"""Packaging: which torch the build finds, when the compiled core is loaded, and what importing fastda costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import fresh
import pytest
from installed import EXTRAS

import fastda
import fastda.version
from fastda.kernels import cpp, stamp

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    run = fresh.python("-c", code, cwd=cwd)
    run.check_returncode()
    return run


@pytest.fixture
def core_that_cannot_be_loaded(tmp_path):
    """A package folder with a fitting stamp, and a library on which any attempt to load it would fail."""
    package, csrc = tmp_path / "fastda", tmp_path / "csrc"
    package.mkdir()
    (package / f"_C{EXTENSION_SUFFIXES[0]}").write_text("not a library")
    write_stamp(package, **cpp.expected(csrc))
    return package


def write_stamp(package: Path, **content) -> None:
    (package / stamp.FILE).write_text(json.dumps(content))


# The compiled core and its stamp


def test_a_fitting_stamp_leads_to_loading(core_that_cannot_be_loaded, tmp_path):
    status = cpp.load(core_that_cannot_be_loaded, tmp_path / "csrc", [])
    assert not status.available
    assert status.reason.startswith("not loadable: ")


@pytest.mark.parametrize(
    ("field", "built"),
    [
        ("torch", "2.11.0"),
        ("torch", "2.13.1+cpu"),
        ("torch", "2.13.0+cu999"),
        ("cuda", "99.9"),
        ("fastda", "0.0.1"),
        ("python", "cpython-39"),
    ],
)
def test_a_library_built_for_something_else_is_not_loaded(core_that_cannot_be_loaded, tmp_path, field, built):
    csrc = tmp_path / "csrc"
    running = cpp.expected(csrc)
    assert running[field] != built
    write_stamp(core_that_cannot_be_loaded, **running | {field: built})
    status = cpp.load(core_that_cannot_be_loaded, csrc, [])
    assert not status.available
    assert status.stamp[field] == built
    assert status.reason == (
        f"not loaded: compiled for {field} {built}, running {field} {running[field]}; "
        "rebuild in fastda's source folder with: pip install --no-deps --force-reinstall ."
    )


def test_from_a_source_folder_the_installed_library_is_found(core_that_cannot_be_loaded, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "csrc").mkdir(parents=True)
    assert cpp.find(checkout / "fastda", checkout / "csrc", ["", str(tmp_path)]) == core_that_cannot_be_loaded
    assert cpp.find(tmp_path / "elsewhere" / "fastda", tmp_path / "no csrc", [str(tmp_path)]) is None


def test_a_library_of_other_sources_is_not_loaded_from_a_source_folder(core_that_cannot_be_loaded, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "csrc").mkdir(parents=True)
    source = checkout / "csrc" / "module.cpp"
    source.write_text("int before;")
    write_stamp(core_that_cannot_be_loaded, **cpp.expected(checkout / "csrc"))
    where = checkout / "fastda", checkout / "csrc", [str(tmp_path)]
    assert cpp.load(*where).reason.startswith("not loadable: ")
    source.write_text("int after;")
    assert cpp.load(*where).reason == (
        "not loaded: compiled from other sources than those in csrc; "
        f"rebuild in {checkout} with: pip install --no-deps --force-reinstall ."
    )
    core_that_cannot_be_loaded.rename(checkout / "fastda")  # an editable install
    assert cpp.load(*where).reason.endswith("pip install --no-deps --force-reinstall -e .")


def test_where_there_is_no_library_the_reason_names_the_cure(tmp_path):
    installed = cpp.load(tmp_path / "fastda", tmp_path / "csrc", [])
    assert installed == cpp.Status(
        False, None, None, "absent: installed without kernels (FASTDA_NO_KERNELS=1 at install); reinstall without it"
    )
    (tmp_path / "csrc").mkdir()
    checkout = cpp.load(tmp_path / "fastda", tmp_path / "csrc", [])
    assert checkout.reason.startswith("not built: fastda runs from its source folder")
    assert checkout.reason.endswith(f"build it in {tmp_path} with: pip install .")


def test_a_library_that_is_gone(core_that_cannot_be_loaded, tmp_path):
    (core_that_cannot_be_loaded / f"_C{EXTENSION_SUFFIXES[0]}").unlink()
    status = cpp.load(core_that_cannot_be_loaded, tmp_path / "csrc", [])
    assert status.path is None
    assert "has its stamp but no library; rebuild in" in status.reason


# The installed package

@pytest.mark.compiled_core
def test_the_stamp_says_what_the_library_says():
    assert cpp.status.available, cpp.status.reason
    info = cpp.library.build_info()
    shared = ("fastda", "torch", "cuda")
    assert {key: info[key] for key in shared} == {key: cpp.status.stamp[key] for key in shared}
    assert cpp.status.stamp.keys() == {"fastda", "torch", "cuda", "python", "compiler", "CUDA kernels", "sources"}
    assert (cpp.status.stamp["CUDA kernels"] == "built") == ("cuda" in cpp.devices)


def test_the_tests_run_against_the_installed_package():
    editable = cpp.status.path is not None and Path(cpp.status.path).parent == ROOT / "fastda"
    assert editable or Path(fastda.__file__).parents[1] != ROOT, "run pytest, not python -m pytest"


def test_one_version_everywhere():
    assert importlib.metadata.version("fastda-kernels") == fastda.version.__version__


@pytest.mark.compiled_core
def test_from_the_repository_the_installed_library_is_loaded():
    code = "import fastda, json; from fastda.kernels import cpp; print(json.dumps([fastda.__file__, vars(cpp.status)]))"
    file, status = json.loads(run_python(code, cwd=ROOT).stdout)
    assert Path(file).parents[1] == ROOT
    assert status["available"], status["reason"]
    assert status["path"] == cpp.status.path


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import fastda
seconds = time.process_time() - start
import json
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def test_import_is_quick_silent_and_light(tmp_path):
    for _ in range(3):  # on a busy machine once may take longer
        run = run_python(IMPORT, cwd=tmp_path)
        assert run.stderr == ""
        seconds, modules = json.loads(run.stdout)  # which fails if import prints anything
        if seconds < 0.3:
            break
    assert seconds < 0.3
    imported = {module.partition(".")[0] for module in modules}
    assert "fastda" in imported
    assert not imported & EXTRAS
    assert "torch._dynamo" not in modules


# The build backend


@pytest.fixture
def build_backend():
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc" / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreter(tmp_path, monkeypatch, build_backend):
    """An interpreter without packages, seen from an isolated build environment; returns its site-packages."""
    venv.create(tmp_path / "venv", symlinks=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    monkeypatch.setattr(sys, "executable", str(Path(paths["scripts"], Path(sys.executable).name)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(build_backend, "torch_here", lambda: None)
    monkeypatch.setattr(build_backend, "check_compiler", lambda: None)
    return Path(paths["purelib"])


def install_torch(site_packages: Path, version: str) -> None:
    metadata = site_packages / f"torch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


def test_the_build_uses_the_torch_of_the_interpreter(build_backend, interpreter):
    install_torch(interpreter, "2.13.0+cpu")
    assert build_backend.get_requires_for_build_wheel() == ["ninja"]
    assert sys.path[-1] == str(interpreter), "it must come after the build environment's setuptools"


@pytest.mark.parametrize("version", [None, "2.4.1"])
def test_the_build_asks_for_torch_where_there_is_none_that_will_do(build_backend, interpreter, version):
    if version:
        install_torch(interpreter, version)
    assert build_backend.get_requires_for_build_wheel() == ["ninja", "torch>=2.11"]
    assert str(interpreter) not in sys.path
    with pytest.raises(SystemExit, match="found no torch>=2.11; pip install torch first"):
        build_backend.build_wheel("dist")


def test_versions_compare_as_numbers(build_backend):
    assert build_backend.is_recent("2.11.0a0+git1234")
    assert build_backend.is_recent("3.0")
    assert not build_backend.is_recent("2.9.1+cu128")


@pytest.mark.skipif(sys.platform == "win32", reason="setuptools looks for MSVC itself")
def test_without_a_compiler_one_sentence_says_what_to_do(build_backend, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++ -m64")
    monkeypatch.delenv("FASTDA_NO_KERNELS", raising=False)
    with pytest.raises(SystemExit) as stopped:
        build_backend.get_requires_for_build_wheel()
    message = str(stopped.value)
    assert "no C++ compiler found (looked for /nonexistent/c++, which CXX names)" in message
    assert "apt install g++" in message
    assert "FASTDA_NO_KERNELS=1" in message
    assert "\n" not in message


def test_cuda_that_is_asked_for_and_cannot_be_built_is_an_error():
    environment = os.environ | {"FASTDA_FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    environment.pop("FASTDA_NO_KERNELS", None)
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "fastda cannot compile its kernels for CUDA, which FASTDA_FORCE_CUDA=1 asks for: " in done.stderr
    assert "is built without CUDA" in done.stderr or "no CUDA toolkit found (CUDA_HOME is /nonexistent)" in done.stderr


def test_without_kernels_neither_compiler_nor_torch_is_needed(build_backend, interpreter, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("FASTDA_NO_KERNELS", "1")
    assert build_backend.get_requires_for_build_wheel() == []
