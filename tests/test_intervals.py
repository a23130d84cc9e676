"""Student's intervals."""

from __future__ import annotations

import math

import pytest
import torch

from fastda.intervals import interval

VALUES = [1.0, 2.0, 3.0, 4.0, 5.0]
QUANTILES = {0.9: 2.131846786, 0.95: 2.776445105, 0.99: 4.604094871}  # t(0.5 + level / 2, 4), from a printed table


@pytest.mark.parametrize("level", QUANTILES)
def test_it_is_students(level):
    mean, half = interval(VALUES, level)
    assert mean == 3
    assert half == pytest.approx(QUANTILES[level] * math.sqrt(2.5 / 5), rel=1e-9)


def test_a_tensor_is_a_list():
    assert interval(torch.tensor(VALUES)) == interval(VALUES)


def test_one_value_has_no_interval():
    mean, half = interval([1.5])
    assert mean == 1.5 and math.isnan(half)
