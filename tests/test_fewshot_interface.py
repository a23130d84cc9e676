"""Importing `fastda.fewshot` is light; the examples of methods run (those of what it exports: test_public_modules)."""

from __future__ import annotations

import doctest
import json

import fresh
from installed import EXTRAS

from fastda.fewshot import EpisodeSampler


def test_the_example_of_take_runs():
    (test,) = doctest.DocTestFinder(recurse=False).find(EpisodeSampler.take, "take", globs={})
    assert test.examples
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test).failed == 0


IMPORT = """
import json, sys, torch
before = set(sys.modules)
import fastda
early = "fastda.fewshot" in sys.modules
import fastda.fewshot
print(json.dumps([early, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_importing_it_brings_nothing_that_an_extra_installs(tmp_path):
    run = fresh.python("-c", IMPORT, cwd=tmp_path)
    run.check_returncode()
    early, imported = json.loads(run.stdout)
    assert not early and "fastda" in imported
    assert not set(imported) & EXTRAS
