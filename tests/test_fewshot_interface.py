"""What `fastda.fewshot` exports is documented, its examples run, and importing it is light."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys

import pytest

import fastda.fewshot
from fastda.fewshot import EpisodeSampler

EXPORTED = [getattr(fastda.fewshot, name) for name in fastda.fewshot.__all__]
WITHOUT_EXAMPLE = {"Episode", "EpisodeAccuracy"}  # what others return


@pytest.mark.parametrize("exported", EXPORTED, ids=lambda x: x.__name__)
def test_documentation(exported):
    text = inspect.getdoc(exported)
    assert ("Example" in text) != (exported.__name__ in WITHOUT_EXAMPLE)
    described = text.partition("Args:")[2] or text.partition("Attributes:")[2]
    for argument in inspect.signature(exported).parameters:
        assert f"{argument}" in described, f"{argument} is not described"


@pytest.mark.parametrize("exported", [*EXPORTED, EpisodeSampler.take], ids=lambda x: x.__name__)
def test_examples_run(exported):
    for test in doctest.DocTestFinder(recurse=False).find(exported, exported.__name__, globs={}):
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
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, capture_output=True, text=True, check=True)
    early, imported = json.loads(run.stdout)
    assert not early and "fastda" in imported
    assert not set(imported) & {"triton", "sklearn", "scipy", "matplotlib", "tqdm", "rich"}
