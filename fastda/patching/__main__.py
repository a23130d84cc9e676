"""`python -m fastda.patching [LIBRARY ...] -- PROGRAM`: what `fastda patch` starts, and runs the program in."""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections.abc import Sequence

from .imports import when_imported
from .libraries import LIBRARIES, patch


def main(words: Sequence[str]) -> None:
    split = words.index("--")
    named, (program, *arguments) = words[:split], words[split + 1 :]
    libraries = named or LIBRARIES
    seen: list[str] = []
    failed: list[str] = []

    def report(library: str) -> None:
        seen.append(library)
        try:
            say(patch(library))
        except RuntimeError as error:
            if named:
                raise
            say(error)

    def conclude() -> None:
        if failed and not seen:
            say(f"nothing was replaced: importing {', '.join(dict.fromkeys(failed))} failed")
        elif not seen:
            say(f"nothing was replaced: the program imported none of {', '.join(libraries)}")

    when_imported(libraries, report, failed.append)
    atexit.register(conclude)
    execute(program, arguments)


def say(message: object) -> None:
    print(f"fastda patch: {message}", file=sys.stderr, flush=True)


def execute(program: str, arguments: list[str]) -> None:
    """As `python PROGRAM ARGUMENT ...` does."""
    if program.startswith(("-m", "-c")):
        option, attached = program[:2], program[2:]
        value, *arguments = [attached, *arguments] if attached else arguments
        sys.argv = [option, *arguments]
        if option == "-m":
            runpy.run_module(value, run_name="__main__", alter_sys=True)
        else:
            exec(compile(value, "<string>", "exec"), vars(sys.modules["__main__"]))
        return
    sys.argv = [program, *arguments]
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(program))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
