"""The libraries' own tests of the parts that fastda replaces: what passes without the patch passes with it.

easyfsl and torchmeta install their tests with them; learn2learn's prototypical classifier has a check of its own at the
foot of its module. Tests that are not installed, pytorch-adapt's and learn2learn's others, are run from a checkout
whose path is in FASTDA_PEER_TESTS_<LIBRARY>.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from peer_libraries import MODULES, imported, is_installed

import fastda

HERE = Path(__file__).parent
TESTS = {
    "easyfsl": ["tests/methods"],
    "torchmeta": ["tests/utils/test_prototype.py"],
    "learn2learn": ["tests/unit/algorithms/maml_test.py", "tests/unit/nn"],
    "pytorch_adapt": ["tests/layers", "tests/hooks"],
}
LEAST = {"easyfsl": 30, "torchmeta": 3, "learn2learn": 20, "pytorch_adapt": 2}
"""How many have to pass at least, so that a suite that was not found is no success."""


def outcomes(library: str, where: Path, patched: bool) -> dict[str, str]:
    """Of each of its tests: passed, failed, ..."""
    words = [sys.executable, "-m", "pytest", "-rA", "--tb=no", "-p", "peer_plugin", "-p", "no:cacheprovider"]
    words += ["-o", "python_files=*_test.py test_*.py", "--color=no", *TESTS[library]]
    path = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PEER": library, "PEER_PATCHED": str(int(patched)), "PYTHONPATH": os.pathsep.join(path)}
    environment |= {"TEST_DEVICE": "cpu", "PYTHONSAFEPATH": "1"}  # the first is pytorch-adapt's
    done = subprocess.run(words, cwd=where, capture_output=True, text=True, env={**os.environ, **environment})
    if patched:
        assert f"{library}: patched" in done.stdout, done.stdout + done.stderr
    lines = (line.split(" - ")[0].split(" ", 1) for line in done.stdout.splitlines() if "::" in line and " " in line)
    return {test.strip(): word for word, test in lines if word in ("PASSED", "FAILED", "ERROR")}


@pytest.mark.parametrize("library", TESTS)
def test_what_passes_without_the_patch_passes_with_it(library):
    if not is_installed(library):
        pytest.skip(f"{library} is not installed")
    variable = f"FASTDA_PEER_TESTS_{library.upper()}"
    where = Path(os.environ.get(variable, Path(find_spec(library).origin).parent))
    if not all((where / test).exists() for test in TESTS[library]):
        pytest.skip(f"{where} has no {' and '.join(TESTS[library])}: set {variable} to a checkout of {library}")
    before, after = (outcomes(library, where, patched) for patched in (False, True))
    passed = [test for test, outcome in before.items() if outcome == "PASSED"]
    print(f"{library}: {len(passed)} of {len(before)} tests pass without the patch")
    assert len(passed) >= LEAST[library]
    assert [test for test in passed if after.get(test) != "PASSED"] == []


def test_learn2learns_own_check():
    """What stands under `if __name__ == "__main__"` in its module, in the module as it is patched."""
    if not is_installed("learn2learn"):
        pytest.skip("learn2learn is not installed")
    with imported("learn2learn"), fastda.patch("learn2learn"):
        module = importlib.import_module(MODULES["learn2learn"])
        tree = ast.parse(inspect.getsource(module))
        checks = [x for x in tree.body if isinstance(x, ast.If) and "__main__" in ast.unparse(x.test)]
        assert len(checks) == 1
        tree.body = checks[0].body
        exec(compile(tree, module.__file__, "exec"), dict(vars(module)))
