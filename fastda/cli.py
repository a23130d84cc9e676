"""The command `fastda`.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> int`, the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .version import __version__


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Attributes:
        module: where its `add_arguments` and `run` are; imported only when the subcommand is called.
        summary: one line for `fastda --help`.
        example: a command line that runs.
        extra: the extra of the distribution that installs what it imports; empty if it needs none.
    """

    module: str
    summary: str
    example: str
    extra: str = ""


COMMANDS = {
    "adapt": Command(
        module="fastda.adapting.command",
        summary="adapt a classifier from labelled data of your own to data without labels, or with some",
        example="fastda demo --write-data shift && fastda adapt shift/source.npz shift/target.npz --out adapted",
        extra="adapt",
    ),
    "bench": Command(
        module="fastda.benchmarks.command",
        summary="measure the ops on this machine against plain and hand-written PyTorch, in under a minute",
        example="fastda bench",
    ),
    "demo": Command(
        module="fastda.demo.command",
        summary="adapt a digit classifier to photographs without labels, and show what that recovers",
        example="fastda demo",
        extra="demo",
    ),
    "diagnose": Command(
        module="fastda.shift.command",
        summary="tell what kind of shift lies between two files of samples, and what to do about it",
        example="fastda demo --write-data shift && fastda diagnose shift/source.npz shift/target.npz",
        extra="shift",
    ),
    "doctor": Command(
        module="fastda.doctor",
        summary="show versions, the compiled core, and which backend serves which op, and why",
        example="fastda doctor",
    ),
    "patch": Command(
        module="fastda.patching.command",
        summary="run a program that uses another library, such as easyfsl, on fastda's ops",
        example="fastda patch -- python train.py",
    ),
    "predict": Command(
        module="fastda.adapting.predict_command",
        summary="classify samples with a model that fastda adapt wrote",
        example="fastda predict adapted shift/target_test.npz --out predictions.csv  # after fastda adapt's example",
        extra="adapt",
    ),
    "sinusoid": Command(
        module="fastda.fewshot.sinusoid_command",
        summary="learn to learn sine curves with MAML: the paper's experiment, with a figure of the fits",
        example="fastda sinusoid --shots 10 --iterations 3000",
        extra="fewshot",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    called = argv[0] if argv and argv[0] in COMMANDS else None
    try:
        module = importlib.import_module(COMMANDS[called].module) if called else None
        args = parser(called, module).parse_args(argv)
        return module.run(args)
    except ModuleNotFoundError as error:
        if "pip install" in str(error):  # it says itself what to do
            return fail(f"fastda {called}: error: {error}")
        missing = (error.name or "").partition(".")[0]
        if not called or not COMMANDS[called].extra or missing in ("", "fastda"):
            raise
        extra = COMMANDS[called].extra
        return fail(f"fastda {called} needs {missing}, which is not installed: pip install 'fastda-kernels[{extra}]'")
    except BrokenPipeError:  # fastda doctor | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError) as error:
        return fail(f"fastda {called}: error: {error}")
    except KeyboardInterrupt:
        return fail(f"fastda {called}: interrupted", exit_code=130)


def fail(sentence: str, exit_code: int = 1) -> int:
    print(sentence, file=sys.stderr)
    return exit_code


def parser(called: str | None, module) -> argparse.ArgumentParser:
    """The argument parser; only the subcommand that is called, whose module is given, has its arguments."""
    top = argparse.ArgumentParser(
        prog="fastda",
        description="Domain adaptation and few-shot learning in PyTorch with fused kernels.",
        epilog="example: fastda doctor",
    )
    top.add_argument("--version", action="version", version=f"fastda {__version__}")
    subcommands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subcommands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=f"example: {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == called:
            module.add_arguments(subparser)
    return top
