"""`process_group`: values and gradients of two and three processes against one process on the whole batch.

The processes run everything once, and write what they found; the tests read it.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ops_under_test import BY_NAME, Draw, each_module
from process_group import CALLS, COLUMN, FEATURES, SIZES, STEPS, derivatives, on_process, share, step, whole_batch
from processes import run_in_processes
from tolerance import random_like
from torch.testing import assert_close

import fastda.reference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(on_process, str(folder), count=3)
    return folder


@pytest.fixture(params=SIZES, ids=lambda world: f"{world} processes")
def processes(request, folder):
    """What each of the processes found."""
    return [torch.load(folder / f"{rank} of {request.param}.pt") for rank in range(request.param)]


@each_module
@pytest.mark.parametrize("name", CALLS)
def test_values_and_derivatives(processes, module, name):
    """The value is the whole batch's on each process. The gradients of a process are its share of the whole batch's,
    times the number of processes, so that their mean over the processes is the gradient of one."""
    world = len(processes)
    op, whole = BY_NAME[name.split()[0]].of(module), whole_batch(world, name)
    directions = {key: random_like(x.double(), 1) for key, x in whole.items()}
    expected = derivatives(lambda **tensors: op(**tensors, **CALLS[name]), whole, directions)
    for rank, found in enumerate(processes):
        found = found[module.__name__, name]
        assert found.keys() == expected.keys()
        assert_close(found["value"], expected["value"])
        for key in expected.keys() - {"value"}:
            mine = share(world, rank, key.rpartition(" of ")[2], expected[key])
            assert_close(found[key], world * mine, msg=lambda text, key=key: f"{key}: {text}")


@each_module
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_is_that_of_one_process(processes, module, name):
    whole, parameter = whole_batch(len(processes), "coral_loss"), Draw(dtype=torch.float64).normal(FEATURES, 3)
    expected = step(module, name, parameter, whole["source"], whole["target"], None)
    for found in processes:
        assert_close(found[module.__name__, f"step of {name}"], expected)


@each_module
def test_too_few_samples_in_all_processes_together(processes, module):
    for found in processes:
        message = "source: expected at least 2 samples (correction + 1), got 1;"
        assert found[module.__name__, "error"].startswith(message)


def test_an_accumulator_across_processes_has_the_samples_of_all(processes):
    world = len(processes)
    x = whole_batch(world, "class_means")["support"]
    counts = [sizes[COLUMN["support"]] for sizes in SIZES[world]]
    for count, found in zip(counts, (found["accumulator"] for found in processes)):
        assert found["mine"]["count"] == count  # which it may go on with
        assert found["unused"].keys() == {"count"} and found["unused"]["count"] == 0
        message = "process_group: expected one shape and dtype of the moments on all processes, got shapes [(4,), (5,)]"
        assert found["error"].startswith(message)
        for whole in (found["whole"], found["again"]):
            assert whole["count"] == len(x)
            assert_close(whole["mean"], x.mean(0), rtol=1e-12, atol=1e-12)
            assert_close(whole["scatter"] / len(x), fastda.reference.covariance(x, correction=0), rtol=0, atol=1e-12)
            assert all(torch.equal(whole[key], processes[0]["accumulator"]["whole"][key]) for key in whole)


@each_module
@pytest.mark.parametrize("name", ["coral_loss", "class_means", "prototypical_loss"])
def test_transforms_are_refused_by_name(module, name, tmp_path):
    arguments = BY_NAME[name].arguments()
    (key, x), *_ = BY_NAME[name].differentiable(arguments).items()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:

        def function(x):
            return BY_NAME[name].of(module)(**arguments | {key: x}, process_group=dist.group.WORLD).sum()

        with pytest.raises(RuntimeError, match="^process_group: .*torch.func"):
            torch.func.grad(function)(x)
        with pytest.raises(RuntimeError, match="process_group: .*torch.compile"):
            torch.compile(function, fullgraph=True, backend="eager")(x)
    finally:
        dist.destroy_process_group()
