"""λ schedules against their closed forms."""

from __future__ import annotations

import math
from inspect import getmembers, isfunction

import pytest

from fastda import schedules


@pytest.mark.parametrize("gamma", [1.0, 10.0])
def test_dann_lambda(gamma):
    values = [schedules.dann_lambda(i / 20, gamma) for i in range(21)]
    assert values[0] == 0
    assert values == sorted(values)
    assert values[20] == pytest.approx(math.tanh(gamma / 2), abs=1e-15)
    assert values[10] == pytest.approx(math.tanh(gamma / 4), abs=1e-15)


@pytest.mark.parametrize("progress", [-0.01, 1.01, 50, math.nan])
def test_progress_outside_of_training(progress):
    with pytest.raises(ValueError, match=rf"^progress: expected .*got {progress}"):
        schedules.dann_lambda(progress)


def test_warm_start_lambda():
    assert schedules.warm_start_lambda(0, low=0.2, high=0.8) == pytest.approx(0.2)
    assert schedules.warm_start_lambda(1000) == pytest.approx(math.tanh(0.5))  # 0.462: not clamped to its limit
    assert schedules.warm_start_lambda(2000) == pytest.approx(math.tanh(1.0))
    found = schedules.warm_start_lambda(10, alpha=3.0, low=1.0, high=3.0, max_steps=20)
    assert found == pytest.approx(1 + 2 * math.tanh(0.75))


def test_normalised_lambda():
    for gamma in (0.5, 1.0, 10.0):
        values = [schedules.normalised_lambda(step, 40, lambda_max=0.3, gamma=gamma) for step in range(60)]
        assert values[0] == 0 and values == sorted(values)
        assert values[40:] == pytest.approx([0.3] * 20)
    assert values[20] == pytest.approx(0.3 * math.tanh(2.5) / math.tanh(5.0))


@pytest.mark.parametrize("schedule", [schedules.warm_start_lambda, schedules.normalised_lambda])
def test_steps_out_of_bounds(schedule):
    with pytest.raises(ValueError, match=r"^step: expected at least 0, got -1"):
        schedule(-1, max_steps=10)
    with pytest.raises(ValueError, match=r"^max_steps: expected at least 1, got 0"):
        schedule(1, max_steps=0)
    with pytest.raises(ValueError, match=r"^gamma: "):
        schedules.normalised_lambda(1, 10, gamma=0)


def test_every_schedule_is_documented():
    public = [function for name, function in getmembers(schedules, isfunction) if not name.startswith("_")]
    assert public
    for function in public:
        assert all(part in function.__doc__ for part in ("Args:", "Source:", "Example:")), function.__name__
