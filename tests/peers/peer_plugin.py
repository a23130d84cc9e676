"""A plugin of pytest for a library's own tests: imports the library, without torchvision if need be, and patches it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import fastda
from fastda.benchmarks.peers import import_peer, torchvision_stand_in

LIBRARY, PATCHED = os.environ["PEER"], os.environ["PEER_PATCHED"] == "1"
MODULES = {  # what its tests import
    "easyfsl": ["easyfsl.methods", "easyfsl.modules", "easyfsl.datasets"],
    "learn2learn": ["learn2learn"],
    "pytorch_adapt": ["pytorch_adapt.layers", "pytorch_adapt.hooks", "pytorch_adapt.containers"],
    "torchmeta": ["torchmeta.utils.prototype"],
}
for module in MODULES[LIBRARY]:
    import_peer(module)
if PATCHED:
    fastda.patch(LIBRARY)
stand_in = ExitStack()  # until the end of the run, for what the tests import
stand_in.enter_context(torchvision_stand_in())


def pytest_unconfigure(config) -> None:
    stand_in.close()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    """easyfsl's photographs are in its repository alone; elsewhere its tests get random images."""
    if fixturedef.argname != "example_few_shot_classification_task" or Path("easyfsl/tests/methods/resources").is_dir():
        return None
    images = torch.rand(5, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    task = images[:3], torch.tensor([0, 0, 1]), images[3:]
    fixturedef.cached_result = task, fixturedef.cache_key(request), None
    return task


def pytest_report_header() -> str:
    return f"{LIBRARY}: {'patched' if PATCHED else 'as it is'}"
