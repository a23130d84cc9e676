"""Two processes share tasks and episodes, and get what one process gets."""

from __future__ import annotations

import fewshot_process as process
import pytest
import torch
from processes import run_in_processes
from torch import nn
from torch.testing import assert_close

from fastda.fewshot import PrototypicalNetwork, evaluate_episodes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(process.on_process, str(folder), count=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("shares", process.SHARES, ids=str)
def test_loss_and_gradient_are_those_of_all_tasks(found, shares):
    whole = process.everything(slice(None), None)
    for one in found:
        assert one[str(shares)].keys() == whole.keys()
        for name, expected in whole.items():
            assert_close(one[str(shares)][name], expected, rtol=1e-10, atol=1e-12)


def test_training_gives_the_parameters_of_one_process(found):
    expected = process.train(None)
    for one in found:
        assert_close(one["trained"], expected, rtol=1e-9, atol=1e-10)
    assert_close(found[0]["trained"], found[1]["trained"], rtol=0, atol=0)
    assert not torch.equal(expected["0.weight"], process.network()[0].weight)


def test_accuracy_is_that_of_all_episodes(found):
    accuracy = evaluate_episodes(PrototypicalNetwork(nn.Identity()), process.sampler().take(process.FEATURES))
    for one in found:
        assert one["accuracy"] == pytest.approx([accuracy.mean, accuracy.half_width])
