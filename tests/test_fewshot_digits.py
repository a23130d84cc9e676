"""New digits from a few examples."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch import nn

from fastda.fewshot import PrototypicalNetwork, digits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def novel():
    return digits.only(digits.load(), digits.NOVEL)


@pytest.fixture(scope="module")
def base():
    return digits.in_eight_orientations(digits.only(digits.load(), digits.BASE))


def test_base_and_novel_classes_share_no_image(base, novel):
    assert base.labels.unique().tolist() == list(range(40)) and novel.labels.unique().tolist() == list(digits.NOVEL)
    assert len(base.labels) + 8 * len(novel.labels) == 8 * 1797
    assert base.images.shape[1:] == novel.images.shape[1:] == (1, 8, 8)
    one = base.labels.div(8, rounding_mode="floor") == 4
    orientations = [base.images[one & (base.labels % 8 == i)][0] for i in range(8)]
    assert len({tuple(x.flatten().tolist()) for x in orientations}) == 8
    assert all(torch.equal(x.flatten().sort().values, orientations[0].flatten().sort().values) for x in orientations)


def test_a_short_training_beats_pixels(base, novel, monkeypatch):
    """Also: five shots are answered with more confidence than one."""
    monkeypatch.setattr(digits, "WIDTH", 16)
    monkeypatch.setattr(digits, "TEST_EPISODES", 300)
    network = digits.train(base, "sqeuclidean", seed=0, steps=60)
    one, five = (digits.evaluate(network, novel, shots, seed=0) for shots in (1, 5))
    pixels = digits.evaluate(PrototypicalNetwork(nn.Flatten()), novel, 5, seed=0)
    assert len(five.accuracies) == 300
    assert five.mean - five.half_width > pixels.mean + pixels.half_width
    assert five.confidence > one.confidence


@pytest.mark.slow
def test_accuracies_are_reached(base, novel):
    """Mean of three seeds; raw pixels give 72 and 89 %."""
    networks = [digits.train(base, "sqeuclidean", seed) for seed in range(3)]
    one, five = ([digits.evaluate(network, novel, k, seed) for seed, network in enumerate(networks)] for k in (1, 5))
    assert fmean(x.mean for x in one) >= 0.775
    assert fmean(x.mean for x in five) >= 0.92
    assert fmean(x.confidence for x in five) > fmean(x.confidence for x in one)


def test_seeds_that_are_none_are_refused(capsys):
    with pytest.raises(SystemExit):
        digits.main(["--seeds", "0"])
    assert "--seeds: expected at least 1, got 0" in capsys.readouterr().err


def test_the_command_prints_the_table(monkeypatch, capsys):
    monkeypatch.setattr(digits, "STEPS", 2)
    monkeypatch.setattr(digits, "TEST_EPISODES", 100)
    assert digits.main(["--seeds", "1"]) == 0
    text = capsys.readouterr().out
    assert all(metric in text for metric in digits.TEMPERATURES)
    assert "digits 5 to 9, 15 queries a class; 100 episodes, 95 % interval" in text
