"""`fastda patch`: run a program of another library on fastda's ops, without editing it."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..reference import checks
from .libraries import LIBRARIES

WITH_VALUE = ("-W", "-X", "--check-hash-based-pycs")  # options of Python whose value is a word of its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "fastda patch [LIBRARY ...] -- python [OPTION ...] (SCRIPT | -m MODULE | -c CODE) [ARGUMENT ...]"
    parser.description = (
        "Run a Python program that uses another library, and let fastda compute what that library computes.\n"
        f"LIBRARY: {', '.join(LIBRARIES)}; by default all of them.\n"
        "Each is patched when the program imports it; standard error says what was replaced. One that is named and\n"
        "is not as expected stops the program with the reason; of the others a message says so, and they stay as\n"
        "they are. The program runs in the interpreter that is named, in which fastda has to be installed. Those\n"
        "that it starts in turn are not patched: give the launcher fastda's command, as in the last example."
    )
    parser.epilog = (
        "examples:\n  fastda patch -- python train.py\n"
        "  fastda patch easyfsl -- python -m experiments.train --epochs 10\n"
        "  torchrun --nproc-per-node 2 -m fastda patch -- python train.py"
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    command = command_line(args.words)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)  # signals and exit code are the program's own
    return subprocess.call(command)


def command_line(words: list[str]) -> list[str]:
    """The same interpreter, options and program, with fastda between them."""
    if "--" not in words or words[-1] == "--":
        raise ValueError(
            f"command: expected -- and a command, got {' '.join(words)!r}; as in: fastda patch -- python a.py"
        )
    split = words.index("--")
    libraries, (python, *rest) = words[:split], words[split + 1 :]
    for library in libraries:
        checks.option("LIBRARY", library, LIBRARIES)
    if python.endswith(".py"):
        python, rest = sys.executable, [python, *rest]
    interpreter = shutil.which(python)
    if not interpreter or not Path(interpreter).name.startswith("python"):
        raise ValueError(
            f"command: expected a Python interpreter after --, got {python!r}; "
            f"run a launcher as: {Path(python).name} -m fastda patch -- python SCRIPT"
        )
    if Path(interpreter).parent == Path(sys.executable).parent:
        interpreter = sys.executable
    options = _options(rest)
    if len(rest) == len(options):
        raise ValueError(f"command: expected a script, -m or -c after {python}, got none; fastda patches no prompt")
    return [interpreter, *options, "-m", __package__, *libraries, "--", *rest[len(options) :]]


def _options(words: list[str]) -> list[str]:
    """Those of Python, which come before the program."""
    options = []
    for word in words:
        has_value = bool(options) and options[-1] in WITH_VALUE
        if not has_value and (not word.startswith("-") or word.startswith(("-m", "-c"))):
            break
        options.append(word)
    return options
