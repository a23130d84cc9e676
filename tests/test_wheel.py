"""A wheel carries the compiled core to another environment, and says what to do where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment with this one's packages, in which a wheel of these sources is installed; its interpreter."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = [*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(built, check=True, cwd=folder)
    (wheel,) = folder.glob("fastda_kernels-*.whl")
    assert "-none-any" not in wheel.name
    venv.create(folder / "venv", symlinks=True)
    base = {"base": str(folder / "venv"), "platbase": str(folder / "venv")}
    paths = sysconfig.get_paths("venv", vars=base)
    packages = Path(paths["platlib"])
    others = {path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")}
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))  # torch; after the wheel's own folder
    subprocess.run([*pip, "install", "--no-deps", "--target", str(packages), str(wheel)], check=True, cwd=folder)
    return Path(paths["scripts"], Path(sys.executable).name)


CALL = """
import json, torch, fastda
from fastda.kernels.cpp import status
loss = fastda.coral_loss(torch.eye(4), 2 * torch.eye(4))
print(json.dumps([fastda.__file__, status.available, status.path, status.reason, loss.item()]))
"""


def call(interpreter: Path, cwd: Path) -> tuple[list, str]:
    """What an op does there, and what is said on standard error."""
    done = subprocess.run([interpreter, "-I", "-c", CALL], cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout), done.stderr


def test_it_works_in_another_environment_with_the_same_torch(environment, tmp_path):
    (file, available, path, reason, loss), said = call(environment, tmp_path)
    assert Path(file).is_relative_to(environment.parents[1])
    assert available, reason
    assert Path(path).parent == Path(file).parent
    assert loss == pytest.approx(3 / 64)  # the covariances are C and 4C with C = (1 − ¼)/3, and ‖3C‖² = 3
    assert said == ""


def test_with_another_torch_it_is_not_loaded_and_says_what_to_do(environment, tmp_path):
    (file, *_), _ = call(environment, tmp_path)
    stamp = Path(file).with_name("_C.json")
    content = json.loads(stamp.read_text())
    stamp.write_text(json.dumps(content | {"torch": "2.11.0"}))
    try:
        (_, available, _, reason, loss), said = call(environment, tmp_path)
    finally:
        stamp.write_text(json.dumps(content))
    assert not available and loss == pytest.approx(3 / 64)
    assert reason.startswith("not loaded: compiled for torch 2.11.0, running torch ")
    assert reason.endswith("rebuild in fastda's source folder with: pip install --no-deps --force-reinstall .")
    assert "coral_loss runs as plain PyTorch on cpu: the compiled core is not loaded: compiled for torch 2.11.0" in said
