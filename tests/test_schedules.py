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


def test_every_schedule_is_documented():
    public = [function for name, function in getmembers(schedules, isfunction) if not name.startswith("_")]
    assert public
    for function in public:
        assert all(part in function.__doc__ for part in ("Args:", "Source:", "Example:")), function.__name__
