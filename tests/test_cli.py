"""The command `fastda`: its help, its errors, and `fastda doctor`."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shlex
import subprocess
import sys

import fresh
import pytest
from installed import EXTRAS

import fastda.reference
from fastda import backend, cli, doctor
from fastda.kernels import cpp
from fastda.version import __version__

pytestmark = pytest.mark.usefixtures("one_thread")


def test_help_names_every_command_and_an_example(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    assert "example: fastda doctor" in text


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert cli.COMMANDS[name].example in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_example_is_a_call_of_its_command(name):
    """Every part of it parses, and one is of the command itself; that it runs is in the command's own tests."""
    called = []
    for part in cli.COMMANDS[name].example.split("&&"):
        program, *arguments = shlex.split(part, comments=True)
        assert program == "fastda"
        called.append(arguments[0])
        module = importlib.import_module(cli.COMMANDS[arguments[0]].module)
        assert cli.parser(arguments[0], module).parse_args(arguments)
    assert name in called


def test_python_m_fastda(tmp_path):
    run = subprocess.run([sys.executable, "-m", "fastda", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"fastda {__version__}\n")


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["doctor", "--no-such-option"]])
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "usage: fastda" in capsys.readouterr().err


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a subcommand `try` of a few lines of Python."""

    def make(imports: str = "", run: str = "return 0") -> None:
        module = tmp_path / "command_to_try.py"
        module.write_text(f"{imports}\ndef add_arguments(parser): pass\ndef run(args):\n    {run}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "command_to_try", raising=False)
        monkeypatch.setitem(cli.COMMANDS, "try", cli.Command("command_to_try", "try it", "fastda try", extra="demo"))

    return make


def test_the_exit_code_is_the_commands(command):
    command(run="return 3")
    assert cli.main(["try"]) == 3


@pytest.mark.parametrize("where", ["imports", "run"])
def test_a_missing_extra_is_one_sentence(where, command, capsys):
    command(**{where: "import no_such_package.submodule"})
    assert cli.main(["try"]) == 1
    sentence = "fastda try needs no_such_package, which is not installed: pip install 'fastda-kernels[demo]'\n"
    assert capsys.readouterr().err == sentence


def test_an_error_that_says_what_to_install_is_left_as_it_is(command, capsys):
    command(run="raise ModuleNotFoundError('a.csv: pip install pyarrow', name='pyarrow')")
    assert cli.main(["try"]) == 1
    assert capsys.readouterr().err == "fastda try: error: a.csv: pip install pyarrow\n"


def test_a_module_missing_from_fastda_itself_is_no_missing_extra(command):
    command(imports="import fastda.no_such_module")
    with pytest.raises(ModuleNotFoundError):
        cli.main(["try"])


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise ValueError('seeds: expected at least 1, got 0')", "seeds: expected at least 1, got 0"),
        ("open('/nonexistent/figure.png')", "No such file or directory: '/nonexistent/figure.png'"),
    ],
)
def test_bad_input_is_one_sentence(failure, message, command, capsys):
    command(run=failure)
    assert cli.main(["try"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastda try: error: ") and error.endswith(f"{message}\n")
    assert error.count("\n") == 1


def test_an_interrupt_is_no_traceback(command, capsys):
    command(run="raise KeyboardInterrupt")
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "fastda try: interrupted\n"


# doctor


@pytest.fixture
def table(capsys, monkeypatch):
    """The rows of doctor's table: op, device, backend, reason."""
    monkeypatch.delenv("FASTDA_BACKEND", raising=False)
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(lines) if line.split()[:3] == ["op", "device", "backend"])
    rows = itertools.takewhile(bool, lines[header + 1 :])  # below an empty line stand the notes
    return [line.split(maxsplit=3) for line in rows]


def test_doctor_says_what_serves_every_op_on_the_cpu(table):
    assert {op for op, device, *_ in table if device == "cpu"} == set(fastda.reference.__all__)


def test_doctor_says_why_the_reference_serves(table):
    assert all(len(row) == 4 for row in table if row[2] == "reference")


@pytest.mark.compiled_core
def test_doctor_shows_the_compiled_core_in_use(table):
    assert {"coral_loss", "prototypical_loss", "gradient_reversal"} <= {row[0] for row in table if row[2] == "cpp"}


def test_doctor_shows_versions_and_stamp(capsys):
    cli.main(["doctor"])
    text = capsys.readouterr().out
    for word in ("fastda", "Python", "torch", "CUDA", "triton", "GPU", "compiled core", "backend"):
        assert f"\n{word} " in f"\n{text}"
    assert (cpp.status.path if cpp.status.available else cpp.status.reason) in text
    assert all(str(value) in text for value in (cpp.status.stamp or {}).values() if value)


def test_doctor_says_a_long_reason_once():
    long = "triton was asked for, and cannot be had: there is no CUDA device; to run on the CPU, set a switch"
    longer = f"{long} before Triton is imported"
    rows = [("a", "cpp", ""), ("b", "reference", "asked for"), ("c", "none", longer), ("d", "none", long)]
    services = [backend.OpService(op, device, name, why) for op, name, why in rows for device in ("cpu", "cuda")]
    text = doctor.table(services)
    assert text.count(longer) == 1 and text.count(long) == 2
    assert text.count("asked for") == 4  # twice in a row, twice in a note
    body, notes = text.split("\n\n")
    assert [line.split()[-1] for line in body.splitlines()[-4:]] == ["[1]", "[1]", "[2]", "[2]"]
    assert notes.splitlines() == [f"[1] {longer}", f"[2] {long}"]
    assert "\n\n" not in doctor.table(services[:4])


def test_doctor_fails_where_the_backend_asked_for_cannot_serve(tmp_path):
    environment = {**os.environ, "FASTDA_BACKEND": "no-such-backend"}
    run = fresh.python("-m", "fastda", "doctor", cwd=tmp_path, env=environment)
    assert run.returncode == 1
    assert run.stderr.startswith("fastda doctor: FASTDA_BACKEND: expected one of ")
    assert run.stderr.count("\n") == 1


DOCTOR = """
import json, sys, torch
before = set(sys.modules)
from fastda import cli
cli.main(["doctor"])
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_doctor_imports_nothing_that_an_extra_installs(tmp_path):
    run = fresh.python("-c", DOCTOR, cwd=tmp_path)
    run.check_returncode()
    imported = {module.partition(".")[0] for module in json.loads(run.stdout.splitlines()[-1])}
    assert "fastda" in imported
    assert not imported & EXTRAS
