"""fastda.patch: what it replaces and restores, what it refuses, and `fastda patch`."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import types

import fresh
import numpy as np
import pytest
import torch
from peer_libraries import MODULES, STAND_INS

import fastda
from fastda.patching import command
from fastda.patching.libraries import replacements_of

pytestmark = pytest.mark.usefixtures("one_thread")


def held(replacement):
    """What the library has in the place of a replacement."""
    value = sys.modules[replacement.module]
    for name in replacement.name.split("."):
        value = getattr(value, name)
    return value


def held_by(library):
    return [held(x) for x in replacements_of(library) if not x.since or _exists(x)]


def _exists(replacement) -> bool:
    return hasattr(sys.modules[replacement.module], replacement.name.partition(".")[0])


# Replacing and restoring


def test_a_patch_replaces_reports_and_is_taken_away(library):
    fastda.patch(library)
    fastda.unpatch(library)  # once, so that all modules are imported
    before = held_by(library)
    patched = fastda.patch(library)
    during = held_by(library)
    assert not any(x is y for x, y in zip(before, during))
    assert [x.__qualname__ for x in before] == [x.__qualname__ for x in during]
    assert [x.name for x in patched.replaced] == [x.path for x in replacements_of(library) if not x.since or _exists(x)]
    report = str(patched)
    assert report.startswith(f"{library} {patched.version}: {len(before)} function")
    assert all(x.name in report and hasattr(fastda, x.op) for x in patched.replaced)
    fastda.unpatch(library)
    assert all(x is y for x, y in zip(before, held_by(library)))


def test_a_block_is_patched_and_nothing_after_it(library):
    with fastda.patch(library) as outer:
        during = held_by(library)
        with fastda.patch(library) as inner:  # is patched: changes nothing, and takes nothing away
            assert inner.replaced == outer.replaced
        assert all(x is y for x, y in zip(during, held_by(library)))
    assert not any(x is y for x, y in zip(during, held_by(library)))


@pytest.fixture
def program():
    """A module that stands for the user's program."""
    module = types.ModuleType("a_program")
    sys.modules["a_program"] = module
    yield module
    del sys.modules["a_program"]


def test_names_imported_before_are_replaced_and_those_imported_since_restored(importing, program):
    importing("easyfsl")
    exec("from easyfsl.methods.utils import compute_prototypes as before", vars(program))
    original = program.before
    with fastda.patch("easyfsl") as patched:
        assert program.before is not original
        assert "a_program.before" in patched.replaced[0].elsewhere
        exec("from easyfsl.methods.utils import compute_prototypes as during", vars(program))
    assert program.before is program.during is original


def test_objects_that_were_made_before_use_the_replacement(importing):
    importing("learn2learn")
    module = sys.modules["learn2learn.nn.protonet"]
    classifier = module.PrototypicalClassifier()
    originals = classifier.distance, classifier._compute_prototypes
    with fastda.patch("learn2learn"):
        assert classifier.distance is module.PrototypicalClassifier.euclidean_distance is not originals[0]
        assert classifier._compute_prototypes is module.compute_prototypes is not originals[1]
        newer = module.PrototypicalClassifier()
    assert (classifier.distance, classifier._compute_prototypes) == originals
    assert (newer.distance, newer._compute_prototypes) == originals


def test_unpatch_without_a_name_takes_all_away(importing):
    importing("easyfsl"), importing("domainbed")
    before = held_by("easyfsl") + held_by("domainbed")
    fastda.patch("easyfsl"), fastda.patch("domainbed")
    fastda.unpatch()
    assert all(x is y for x, y in zip(before, held_by("easyfsl") + held_by("domainbed")))
    fastda.unpatch()
    fastda.unpatch("easyfsl")


def test_a_patch_leaves_the_programs_state_alone(library):
    """Random numbers, gradient mode, dtype, and the name that TLlib misses in NumPy."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), fastda.patch(library):
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.rand(4), expected)
    assert "float" not in vars(np)


def test_patched_functions_keep_name_signature_and_can_be_pickled(importing):
    importing("easyfsl")
    with fastda.patch("easyfsl"):
        function = held_by("easyfsl")[0]
        assert function.__name__ == "compute_prototypes" and function.__module__ == "easyfsl.methods.utils"
        assert pickle.loads(pickle.dumps(function)) is function


def test_backends_apply(importing, monkeypatch):
    importing("easyfsl")
    calls = []
    original = fastda.reference.pairwise_distance
    monkeypatch.setattr(fastda.reference, "pairwise_distance", lambda *x, **o: calls.append(o) or original(*x, **o))
    with fastda.patch("easyfsl"), fastda.use_backend("reference"):
        network = sys.modules["easyfsl.methods"].PrototypicalNetworks()
        network.process_support_set(torch.eye(2), torch.arange(2))
        network(torch.ones(3, 2))
    assert calls == [{"metric": "euclidean"}]


# What is refused


def another_scale(x, y):
    return (x - y).abs().sum() + 0 * (x + y).sum()


def another_signature(self, x, y, eps=1e-6):
    return x.sum() + y.sum()


def that_fails(self, x, y):
    raise ZeroDivisionError("no")


@pytest.mark.parametrize(
    ("function", "difference"),
    [
        (lambda self, x, y: another_scale(x[:1], y[:1]), "computes something else: other values or gradients, by "),
        (another_signature, "takes (self, x, y, eps=1e-06), expected (self, x, y)"),
        (that_fails, "raises ZeroDivisionError where values were expected: no"),
        (lambda self, x, y: x + y[:1], "gives torch.float64 of shape (5, 3), expected torch.float64 of shape ()"),
        (lambda self, x, y: (x.sum() + y.sum()).float(), "gives torch.float32 of shape (), expected torch.float64"),
        (None, "is no function, but of type NoneType"),
        (..., "is absent"),
    ],
)
def test_a_library_that_is_not_as_expected_is_named_and_left_alone(function, difference, importing, monkeypatch):
    importing("domainbed")
    owner = sys.modules["domainbed.algorithms"].AbstractMMD
    if function is ...:
        monkeypatch.delattr(owner, "mmd")
    else:
        monkeypatch.setattr(owner, "mmd", function)
    before = dict(vars(owner))
    with pytest.raises(RuntimeError) as raised:
        fastda.patch("domainbed")
    message = str(raised.value)
    assert f"domainbed.algorithms.AbstractMMD.mmd {difference}" in message
    assert "library: expected domainbed as fastda knows it" in message and "Nothing is changed" in message
    assert dict(vars(owner)) == before
    monkeypatch.undo()
    assert len(fastda.patch("domainbed").replaced) >= 1


def test_one_function_that_differs_keeps_all_others(importing, monkeypatch):
    importing("learn2learn")
    module = sys.modules["learn2learn.nn.protonet"]
    original = module.compute_prototypes
    wrong = staticmethod(lambda prototypes, queries: torch.cdist(queries, prototypes))
    monkeypatch.setattr(module.PrototypicalClassifier, "euclidean_distance", wrong)
    with pytest.raises(RuntimeError, match="PrototypicalClassifier.euclidean_distance computes something else"):
        fastda.patch("learn2learn")
    assert module.compute_prototypes is original


def test_an_edit_that_changes_no_result_is_accepted(importing, monkeypatch):
    importing("learn2learn")
    edited = staticmethod(lambda prototypes, queries: ((queries[:, None, :] - prototypes[None]) ** 2).sum(dim=2))
    monkeypatch.setattr(sys.modules["learn2learn.nn.protonet"].PrototypicalClassifier, "euclidean_distance", edited)
    assert len(fastda.patch("learn2learn").replaced) == 2


def test_libraries_that_are_unknown_or_not_installed(monkeypatch):
    with pytest.raises(ValueError, match="library: expected one of 'domainbed', .*, got 'sklearn'"):
        fastda.patch("sklearn")
    with pytest.raises(ValueError, match="library: expected one of"):
        fastda.unpatch("sklearn")
    monkeypatch.setitem(sys.modules, "tllib", None)
    with pytest.raises(ModuleNotFoundError, match="library: expected tllib to be installed, got none; install it"):
        fastda.patch("tllib")


# Of a program that cannot be edited


def run(tmp_path, *words: str, program: str = "", stand_ins: bool = True) -> subprocess.CompletedProcess:
    """A program, or the interpreter with one, beside a `train.py`; it imports stand-ins, whatever is installed."""
    (tmp_path / "train.py").write_text(program)
    path = [str(STAND_INS)] * stand_ins + [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    programs = [os.path.dirname(sys.executable), os.environ["PATH"]]
    environment = {"PYTHONPATH": os.pathsep.join(path), "PATH": os.pathsep.join(programs)}
    environment = {**os.environ, **environment}
    if words[0] != sys.executable:
        return fresh.python(*words, cwd=tmp_path, env=environment)
    return subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=environment)


def patching(*words: str) -> list[str]:
    """What `fastda patch` has the interpreter execute."""
    interpreter, *words = command.command_line([*words])
    assert interpreter == sys.executable
    return words


PROGRAM = """
import sys
from easyfsl.methods.utils import compute_prototypes
print(__name__, sys.argv, hasattr(compute_prototypes, "__wrapped__"), sys.path[0], sys.flags.quiet)
if __name__ == "__main__":
    raise SystemExit(3)
"""


def test_a_script_runs_as_it_would_and_is_patched_when_it_imports(tmp_path):
    done = run(
        tmp_path, sys.executable, *"-m fastda patch -- python -q -W ignore train.py --lr 0.1".split(), program=PROGRAM
    )
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"__main__ ['train.py', '--lr', '0.1'] True {tmp_path.resolve()} 1\n"
    assert re.match("fastda patch: easyfsl .*: 2 functions are computed by fastda", done.stderr)


def test_a_module_and_a_line_of_code_run_too(tmp_path):
    done = run(tmp_path, *patching("easyfsl", "--", sys.executable, "-m", "train", "--lr", "0.1"), program=PROGRAM)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(f"__main__ ['{tmp_path / 'train.py'}', '--lr', '0.1'] True")
    code = "import sys, domainbed.algorithms as a; print(sys.argv, hasattr(a.AbstractMMD.mmd, '__wrapped__'))"
    done = run(tmp_path, *patching("--", sys.executable, "-c", code, "x"))
    assert (done.returncode, done.stdout) == (0, "['-c', 'x'] True\n"), done.stderr


def test_only_libraries_that_are_named_are_patched_and_a_program_that_imports_none_is_told(tmp_path):
    done = run(tmp_path, *patching("domainbed", "--", "train.py"), program=PROGRAM)
    assert " False " in done.stdout
    assert done.stderr == "fastda patch: nothing was replaced: the program imported none of domainbed\n"


def test_a_library_whose_import_fails_is_what_the_program_is_told(tmp_path):
    (tmp_path / "domainbed").mkdir()
    (tmp_path / "domainbed" / "__init__.py").write_text("import a_module_that_is_not_there\n")
    done = run(tmp_path, *patching("--", "train.py"), program="import domainbed\n")
    assert done.returncode == 1
    assert "No module named 'a_module_that_is_not_there'" in done.stderr
    assert done.stderr.endswith("fastda patch: nothing was replaced: importing domainbed failed\n")


def test_a_package_that_imports_parts_of_itself_is_patched_when_it_is_whole(tmp_path):
    program = """
from tllib.alignment.dann import DomainAdversarialLoss, WarmStartGradientReverseLayer
for layer in (DomainAdversarialLoss, WarmStartGradientReverseLayer):
    print(hasattr(layer.forward, "__wrapped__"))
"""
    assert run(tmp_path, *patching("--", "train.py"), program=program).stdout == "True\nTrue\n"


@pytest.mark.parametrize("named", [True, False])
def test_a_library_that_differs_stops_the_program_only_where_it_was_named(named, tmp_path):
    (tmp_path / "domainbed").mkdir()
    (tmp_path / "domainbed/__init__.py").write_text("")
    (tmp_path / "domainbed/algorithms.py").write_text(
        "class AbstractMMD:\n    def mmd(self, x, y):\n        return x.sum() - y.sum()\n"
    )
    program = (
        "import domainbed.algorithms\nprint('went on', hasattr(domainbed.algorithms.AbstractMMD.mmd, '__wrapped__'))"
    )
    words = patching(*["domainbed"] * named, "--", "train.py")
    done = run(tmp_path, *words, program=program, stand_ins=False)
    assert "domainbed.algorithms.AbstractMMD.mmd computes something else" in done.stderr
    assert (done.returncode, done.stdout) == ((1, "") if named else (0, "went on False\n"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["python", "train.py"], "command: expected -- and a command, got 'python train.py'"),
        (["--"], "command: expected -- and a command, got '--'"),
        (["--", "python"], "command: expected a script, -m or -c after python, got none"),
        (["--", "python", "-X", "dev"], "command: expected a script, -m or -c after python, got none"),
        (
            ["--", "torchrun", "train.py"],
            "got 'torchrun'; run a launcher as: torchrun -m fastda patch -- python SCRIPT",
        ),
        (["sklearn", "--", "python", "train.py"], "LIBRARY: expected one of 'domainbed', "),
    ],
)
def test_wrong_commands(words, message):
    with pytest.raises(ValueError) as raised:
        command.command_line(words)
    assert message in str(raised.value)


def test_an_interpreter_with_its_options(tmp_path):
    assert command.command_line(["--", "a.py", "-m"]) == [sys.executable, "-m", "fastda.patching", "--", "a.py", "-m"]
    words = ["easyfsl", "tllib", "--", "python", "-u", "-X", "dev", "-Werror", "-mpkg.train", "--x"]
    expected = ["-u", "-X", "dev", "-Werror", "-m", "fastda.patching", "easyfsl", "tllib", "--", "-mpkg.train", "--x"]
    assert command.command_line(words)[1:] == expected
    other = tmp_path / "python3"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert command.command_line(["--", str(other), "-c", "pass"])[0] == str(other)


def test_importing_fastda_imports_no_library(tmp_path):
    code = "import sys, fastda; print([m for m in sys.modules if m.partition('.')[0] in fastda.patching.LIBRARIES])"
    assert fresh.python("-c", code, cwd=tmp_path).stdout == "[]\n"


@pytest.mark.slow
def test_a_patched_network_compiles_whole(importing):
    importing("easyfsl")
    network = sys.modules["easyfsl.methods"].PrototypicalNetworks()
    network.prototypes = torch.randn(3, 4)
    with fastda.patch("easyfsl"):
        samples = torch.randn(5, 4, requires_grad=True)
        compiled = torch.compile(network.l2_distance_to_prototypes, fullgraph=True)
        torch.testing.assert_close(compiled(samples), network.l2_distance_to_prototypes(samples))


def test_every_library_has_a_stand_in():
    assert MODULES.keys() == set(fastda.patching.LIBRARIES)
    assert all((STAND_INS / library / "__init__.py").is_file() for library in MODULES)
