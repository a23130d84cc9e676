"""Python programs in processes of their own, forked from one that has imported torch and nothing else.

Importing torch takes most of the time of a short program. Where nothing can be forked, the interpreter is started.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

FORKS = hasattr(os, "fork")


def python(*words: object, cwd: Path | str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """What `python WORD ...` does and prints; the words are a script, -m MODULE or -c CODE, and arguments.

    Args:
        cwd: the folder that it runs in.
        env: all environment variables; by default those of this process. What torch reads while it is imported has no
            effect.
    """
    env = dict(os.environ if env is None else env)
    words = tuple(map(str, words))
    if not FORKS:
        return subprocess.run([sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = server()
        process.stdin.write(json.dumps([words, os.fspath(cwd), env, files]) + "\n")
        process.stdin.flush()
        code = process.stdout.readline()
        if not code:
            raise RuntimeError(f"the process that programs are forked from ended with {process.wait()}")
        texts = [Path(file).read_text(encoding="utf-8") for file in files]
    return subprocess.CompletedProcess([sys.executable, *words], int(code), *texts)


@cache
def server() -> subprocess.Popen:
    """Started at the first call; it ends when this process does, whose end of the pipe is closed then."""
    return subprocess.Popen(
        [sys.executable, __file__], cwd=tempfile.gettempdir(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def serve() -> list[str]:
    """Fork for each line that comes; returns in the forked process, with the words of the program that it is."""
    import torch  # noqa: F401

    assert "fastda" not in sys.modules
    gc.freeze()  # what is imported is not looked through when a program ends
    for line in sys.stdin:
        words, cwd, env, files = json.loads(line)
        child = os.fork()
        if child == 0:
            for descriptor, file in ((1, files[0]), (2, files[1])):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.chdir(cwd)
            os.environ.clear()
            os.environ.update(env)
            return words
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os._exit(0)


def become(words: list[str]) -> None:
    """As `python WORD ...` does: modules are looked for beside a script, else in the working folder."""
    first, *rest = words
    beside = os.path.dirname(os.path.realpath(first)) if first not in ("-c", "-m") else ""
    sys.path[:1] = [beside, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if first == "-m":
        module, *arguments = rest
        sys.path[0], sys.argv = os.getcwd(), ["-m", *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    become(serve())
