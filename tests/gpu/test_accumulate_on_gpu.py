"""Moments of chunks on a GPU: kept there, or brought to the CPU, without synchronisation."""

from __future__ import annotations

import pytest
import torch
from ops_under_test import Draw
from torch.testing import assert_close

import fastda.reference as F
from fastda import CovarianceAccumulator


@pytest.mark.parametrize("device, expected", [(None, "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_where_the_moments_are(device, expected):
    x = Draw(dtype=torch.float64).normal(500, 7, mean=1000.0)
    accumulator = CovarianceAccumulator(device=device)
    accumulator.update(x[:200].cuda()).update(x[200:400]).merge(CovarianceAccumulator().update(x[400:]))
    assert accumulator.mean.device.type == accumulator.covariance().device.type == accumulator.device.type == expected
    assert_close(accumulator.mean.cpu(), x.mean(0), rtol=1e-12, atol=0)
    assert_close(accumulator.covariance().cpu(), F.covariance(x), rtol=0, atol=1e-12)
    other = CovarianceAccumulator().update(2 * x)
    assert_close(accumulator.coral_distance(other).cpu(), F.coral_loss(x, 2 * x), rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_updating_does_not_synchronise(dtype):
    x = Draw(dtype=dtype).normal(64, 5).cuda()
    accumulator = CovarianceAccumulator().update(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            accumulator.update(x)
        count = accumulator.count
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count == 4 * 64
    whole = torch.cat([x] * 4).double()
    assert_close(accumulator.covariance(), F.covariance(whole), rtol=0, atol=1e-12)
