"""Moments that are accumulated: against one pass over all samples, whatever the chunks and the order of merging."""

from __future__ import annotations

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import REDUCTIONS, Draw
from torch import Tensor
from torch.testing import assert_close

import fastda
import fastda.reference as F
from fastda import CovarianceAccumulator
from fastda.accumulate import ROWS

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
EXACT = 1e-12
BATCHES = ((), (3,), (2, 1), (0,))


@st.composite
def parts(draw: st.DrawFn) -> list[Tensor]:
    """Chunks, some empty, some of one sample, of features with deviation 1, also far from zero."""
    sizes = draw(st.lists(st.sampled_from((0, 1, 1, 2, 3, 17)), min_size=1, max_size=12))
    shape = *draw(st.sampled_from(BATCHES)), sum(sizes), draw(st.integers(0, 5))
    source = Draw(dtype=torch.float64, seed=draw(st.integers(0, 2**16)))
    x = source.normal(*shape, mean=draw(st.sampled_from((0.0, 3.0, -1000.0))))
    return list(x.split(sizes, -2))


def accumulated(*chunks: Tensor, **options: object) -> CovarianceAccumulator:
    accumulator = CovarianceAccumulator(**options)
    for chunk in chunks:
        assert accumulator.update(chunk) is accumulator
    return accumulator


def assert_moments(accumulator: CovarianceAccumulator, x: Tensor) -> None:
    """Those of `x`, whose features have deviation 1, in one pass."""
    assert accumulator.count == x.shape[-2]
    if accumulator.count > 0:
        assert_close(accumulator.mean, x.mean(-2), rtol=EXACT, atol=EXACT)
    for correction in range(min(2, accumulator.count)):
        expected = F.covariance(x, correction=correction)
        assert_close(accumulator.covariance(correction=correction), expected, rtol=0, atol=EXACT)


@given(parts())
def test_any_chunks(chunks):
    assert_moments(accumulated(*chunks), torch.cat(chunks, -2))


@given(parts(), st.randoms(use_true_random=False))
def test_any_order_of_merging(chunks, chance: random.Random):
    x = torch.cat(chunks, -2)
    accumulators = [accumulated(chunk) for chunk in chunks] + [CovarianceAccumulator()]
    chance.shuffle(accumulators)
    assert_moments(CovarianceAccumulator().merge(*accumulators), x)
    while len(accumulators) > 1:
        a, b = (accumulators.pop(chance.randrange(len(accumulators))) for _ in range(2))
        counts = a.count, b.count
        accumulators.append(a + b)
        assert (a.count, b.count) == counts
    assert_moments(accumulators[0], x)


def test_far_from_zero_where_sums_of_products_have_no_digits_left():
    x = Draw(dtype=torch.float64).normal(500, 3, mean=1e7)
    mean, products = x.mean(0), x.T @ x / len(x)
    expected = F.covariance(x, correction=0)
    assert (products - torch.outer(mean, mean) - expected).abs().max() > 1e-3
    assert_close(accumulated(*x.split(7)).covariance(correction=0), expected, rtol=0, atol=1e-8)
    assert_close(accumulated(*x.split(1)).covariance(correction=0), expected, rtol=0, atol=1e-8)


def test_features_of_very_different_spread():
    x = Draw(dtype=torch.float64).normal(300, 3) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    relative = accumulated(*x.split(11)).covariance() / F.covariance(x)
    assert_close(relative, torch.ones_like(relative), rtol=0, atol=1e-11)


def test_ten_thousand_chunks_of_one_sample():
    x = Draw(dtype=torch.float64).normal(10_000, 2, mean=1000.0)
    assert_moments(accumulated(*x.split(1)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_any_dtype_are_accumulated_in_float64(dtype):
    x = Draw(dtype=dtype).normal(90, 4, mean=2.0)
    accumulator = accumulated(x[:30].double(), x[30:60], x[60:].double())
    assert accumulator.mean.dtype == accumulator.covariance().dtype == torch.float64
    assert_moments(accumulator, x.double())


def test_float32_is_as_exact_as_one_pass_in_float32():
    x = Draw().normal(4000, 8, mean=100.0)
    truth = F.covariance(x.double())
    accumulator = accumulated(*x.split(64), dtype=torch.float32)
    assert accumulator.mean.dtype == accumulator.covariance().dtype == torch.float32
    error, own = ((found.double() - truth).abs().max() for found in (accumulator.covariance(), F.covariance(x)))
    assert error <= 2 * own + 16 * torch.finfo(torch.float32).eps
    sum_of_both = accumulator + accumulated(x)
    assert sum_of_both.dtype == torch.float32 and sum_of_both.count == 8000


def test_a_chunk_larger_than_what_is_taken_at_a_time(tmp_path):
    x = Draw(dtype=torch.float64).normal(2 * ROWS + 3, 2, mean=5.0)
    file = np.memmap(tmp_path / "features", dtype=np.float64, mode="w+", shape=tuple(x.shape))
    file[:] = x.numpy()
    assert_moments(accumulated(torch.from_numpy(file)), x)


@pytest.mark.parametrize("layout", ["transposed", "every other", "expanded"])
def test_layouts(layout):
    x = Draw(dtype=torch.float64).normal(2, 20, 6)
    x = {"transposed": x.mT.contiguous().mT, "every other": x[:, ::2, ::2], "expanded": x[:1].expand(4, 20, 6)}[layout]
    before = x.clone()
    assert_moments(accumulated(*x.split(7, -2)), x)
    assert torch.equal(x, before)


# What else it may be used with


def test_no_graph_is_kept():
    x = Draw().normal(6, 3).requires_grad_()
    accumulator = accumulated(x, x.exp())
    assert not any(found.requires_grad for found in (accumulator.mean, accumulator.covariance()))


def test_inside_and_outside_of_inference_mode():
    x = Draw(dtype=torch.float64).normal(9, 3)
    accumulator = CovarianceAccumulator()
    with torch.inference_mode():
        accumulator.update(x[:4] * 1)
        other = CovarianceAccumulator().merge(accumulator)
        other.load_state_dict(accumulator.state_dict())
    assert_moments(accumulator.update(x[4:]), x)
    assert_moments(other.update(x[4:]), x)


def test_autocast_changes_nothing():
    x = Draw().normal(50, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = accumulated(*x.split(20), dtype=torch.float32).covariance()
    assert torch.equal(inside, accumulated(*x.split(20), dtype=torch.float32).covariance())


def test_what_was_read_does_not_change_later():
    x = Draw(dtype=torch.float64).normal(20, 3)
    accumulator = accumulated(x[:10])
    read = [accumulator.mean, accumulator.covariance(), *accumulator.state_dict().values()]
    before = copy.deepcopy(read)
    accumulator.update(x[10:])
    for now, then in zip(read, before):
        assert torch.equal(now, then)
        now.zero_()
    assert_moments(accumulator, x)


def test_an_accumulator_merged_with_itself_has_its_samples_twice():
    x = Draw(dtype=torch.float64).normal(20, 3)
    accumulator = accumulated(x)
    assert_moments(accumulator + accumulator, torch.cat([x, x]))
    assert_moments(accumulator.merge(accumulator), torch.cat([x, x]))


def test_sum_of_a_list():
    x = Draw(dtype=torch.float64).normal(20, 3)
    assert_moments(sum((accumulated(chunk) for chunk in x.split(6)), CovarianceAccumulator()), x)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_inf_stay_with_their_feature(value):
    x = Draw(dtype=torch.float64).normal(12, 3)
    clean = accumulated(x).covariance()
    x[4, 1] = value
    accumulator = accumulated(*x.split(3))
    spoilt = torch.zeros(3, 3, dtype=torch.bool)
    spoilt[1] = spoilt[:, 1] = True
    assert not accumulator.mean[1].isfinite() and not accumulator.covariance()[spoilt].isfinite().any()
    assert_close(accumulator.covariance()[~spoilt], clean[~spoilt], rtol=0, atol=EXACT)


def test_moments_live_where_they_are_asked_for():
    """The meta device stands for another one."""
    x = Draw().normal(4, 3)
    assert CovarianceAccumulator().device is None and CovarianceAccumulator(device="meta").device.type == "meta"
    assert accumulated(x).device.type == "cpu"
    there = CovarianceAccumulator(device="meta").merge(accumulated(x))
    assert there.mean.device.type == there.covariance().device.type == there.device.type == "meta"
    assert (there + accumulated(x)).device.type == "meta"
    assert (CovarianceAccumulator() + there).device.type == "meta"


# Saving


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    x = Draw(dtype=torch.float64).normal(20, 3)
    assert copied(CovarianceAccumulator()).count == 0
    accumulator = accumulated(x[:10])
    twin = copied(accumulator).update(x[10:])
    assert_moments(twin, x)
    assert_moments(accumulator, x[:10])


def saved_and_loaded(accumulator: CovarianceAccumulator) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(accumulator.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_state_dict(batch):
    x = Draw(dtype=torch.float64).normal(*batch, 20, 3)
    loaded = accumulated(x[..., :5, :2])
    loaded.load_state_dict(saved_and_loaded(accumulated(x[..., :10, :])))
    assert_moments(loaded.update(x[..., 10:, :]), x)
    loaded.load_state_dict(saved_and_loaded(CovarianceAccumulator()))
    assert loaded.count == 0 and loaded.update(torch.ones(2, 7)).count == 2
    single = CovarianceAccumulator(dtype=torch.float32)
    single.load_state_dict(accumulated(x).state_dict())
    assert single.covariance().dtype == torch.float32 and single.count == 20


STATE = accumulated(torch.ones(4, 3)).state_dict()
WRONG_STATES = {
    "nothing": ({}, ValueError, "expected count, mean and scatter, got nothing"),
    "an entry is missing": ({k: x for k, x in STATE.items() if k != "scatter"}, ValueError, "got count, mean;"),
    "an entry too many": (STATE | {"bias": torch.ones(3)}, ValueError, "got bias, count, mean, scatter;"),
    "samples without moments": ({"count": torch.tensor(4)}, ValueError, "mean and scatter of 4 samples, got neither"),
    "negative count": (STATE | {"count": torch.tensor(-1)}, ValueError, r"\['count'\]: expected at least 0, got -1"),
    "broken count": (STATE | {"count": torch.tensor(1.5)}, TypeError, r"\['count'\]: expected an int, got 1.5"),
    "integer mean": (STATE | {"mean": torch.ones(3).int()}, TypeError, r"\['mean'\]: expected .* got .*int32"),
    "scatter is a list": (STATE | {"scatter": [1.0]}, TypeError, r"\['scatter'\]: expected a tensor, got .*list"),
    "scatter not square": (STATE | {"scatter": torch.ones(3, 2)}, ValueError, r"\['scatter'\]: .* got \(3, 2\) for "),
}


@pytest.mark.parametrize("name", WRONG_STATES)
def test_a_wrong_state_changes_nothing(name):
    state, error, message = WRONG_STATES[name]
    x = Draw(dtype=torch.float64).normal(4, 3)
    accumulator = accumulated(x)
    with pytest.raises(error, match=f"^state_dict.*{message}"):
        accumulator.load_state_dict(state)
    assert_moments(accumulator, x)


def test_reset():
    accumulator = accumulated(torch.ones(4, 3))
    accumulator.reset()
    assert accumulator.count == 0 and accumulator.device is None
    x = Draw(dtype=torch.float64).normal(6, 2)
    assert_moments(accumulator.update(x), x)


def test_it_says_what_it_holds():
    assert repr(CovarianceAccumulator()) == "CovarianceAccumulator(count=0, dtype=torch.float64)"
    accumulator = accumulated(torch.ones(2, 4, 3), dtype=torch.float32)
    assert (
        repr(accumulator)
        == "CovarianceAccumulator(count=4, num_features=3, batch=(2,), dtype=torch.float32, device='cpu')"
    )


# CORAL


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("scale, mean_weight", [("paper", 0.0), ("mean", 1.0), ("sum", 0.3)])
def test_coral_distance_is_the_loss_of_all_samples(batch, correction, scale, mean_weight):
    draw = Draw(dtype=torch.float64)
    source, target = draw.normal(*batch, 40, 5, mean=3.0), draw.normal(*batch, 30, 5, deviation=1.5)
    accumulators = accumulated(*source.split(7, -2)), accumulated(*target.split(9, -2))
    options = {"correction": correction, "scale": scale, "mean_weight": mean_weight}
    for reduction in REDUCTIONS:
        found = CovarianceAccumulator.coral_distance(*accumulators, **options, reduction=reduction)
        for module in (fastda, F):
            expected = module.coral_loss(source, target, **options, reduction=reduction)
            assert_close(found, expected, rtol=1e-11, atol=0)
    assert accumulators[0].coral_distance(accumulators[0], **options) == 0


def test_coral_distance_of_domains_that_nearly_agree():
    draw = Draw(dtype=torch.float64)
    source = draw.normal(200, 4)
    target = source + 1e-6 * draw.normal(200, 4)
    found = accumulated(*source.split(30)).coral_distance(accumulated(*target.split(30)), scale="sum")
    difference = F.covariance(source) - F.covariance(target)
    assert_close(found, difference.square().sum(), rtol=1e-6, atol=0)


# Errors

EMPTY, SEEN = CovarianceAccumulator(), accumulated(torch.eye(3))
WRONG_CALLS = {
    "dtype": (lambda: CovarianceAccumulator(dtype=torch.float16), TypeError, "^dtype: expected .*got torch.float16"),
    "chunk is a list": (lambda: accumulated([[1.0]]), TypeError, "^chunk: expected a tensor, got .*list"),
    "chunk of integers": (lambda: accumulated(torch.ones(2, 3).int()), TypeError, "^chunk: expected float32.*int32"),
    "one dimension": (lambda: accumulated(torch.ones(3)), ValueError, r"^chunk: expected shape .*got .*\(3,\)"),
    "other features": (
        lambda: copy.deepcopy(SEEN).update(torch.ones(2, 5)),
        ValueError,
        "^chunk: expected 3 features .*, got 5",
    ),
    "other batch": (
        lambda: copy.deepcopy(SEEN).update(torch.ones(2, 2, 3)),
        ValueError,
        r"^chunk: expected .*batch dimensions \(\) .*got 3 and \(2,\)",
    ),
    "features after an empty chunk": (
        lambda: accumulated(torch.ones(0, 4), torch.ones(2, 5)),
        ValueError,
        "^chunk: expected 4 features .*, got 5",
    ),
    "mean of nothing": (lambda: EMPTY.mean, ValueError, "^mean: expected at least 1 sample, got 0"),
    "covariance of nothing": (
        lambda: EMPTY.covariance(correction=0),
        ValueError,
        r"^covariance: expected at least 1 samples \(correction \+ 1\), got 0",
    ),
    "covariance of one": (
        lambda: accumulated(torch.ones(1, 3)).covariance(),
        ValueError,
        r"^covariance: expected at least 2 samples \(correction \+ 1\), got 1",
    ),
    "correction": (lambda: SEEN.covariance(correction=-1), ValueError, "^correction: expected at least 0, got -1"),
    "merge with a tensor": (lambda: SEEN.merge(torch.ones(3)), TypeError, "^others: expected a Cov.*torch.float32"),
    "add a number": (lambda: SEEN + 1, TypeError, "unsupported operand"),
    "distance to a tensor": (lambda: SEEN.coral_distance(torch.eye(3)), TypeError, "^target: expected a Covariance"),
    "distance to nothing": (lambda: SEEN.coral_distance(EMPTY), ValueError, "^target: expected at least 2 samples"),
    "distance of nothing": (lambda: EMPTY.coral_distance(SEEN), ValueError, "^source: expected at least 2 samples"),
    "distance to other features": (
        lambda: SEEN.coral_distance(accumulated(torch.eye(4))),
        ValueError,
        "^target: expected 3 features .*, got 4",
    ),
    "scale": (lambda: SEEN.coral_distance(SEEN, scale="x"), ValueError, "^scale: expected one of 'paper'"),
    "mean_weight": (lambda: SEEN.coral_distance(SEEN, mean_weight=-1), ValueError, "^mean_weight: expected"),
    "reduction": (lambda: SEEN.coral_distance(SEEN, reduction="x"), ValueError, "^reduction: expected one of"),
    "process_group": (lambda: SEEN.across_processes("world"), TypeError, "^process_group: expected .*got str"),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_errors(name):
    call, error, message = WRONG_CALLS[name]
    with pytest.raises(error, match=message):
        call()
    assert SEEN.count == 3 and EMPTY.count == 0


def test_a_merge_that_fails_merges_nothing():
    x = Draw(dtype=torch.float64).normal(6, 3)
    accumulator = accumulated(x)
    with pytest.raises(ValueError, match="^others: expected 3 features .*, got 4"):
        accumulator.merge(accumulated(x), accumulated(torch.eye(4)))
    assert_moments(accumulator, x)
    unused = CovarianceAccumulator()
    with pytest.raises(ValueError, match="^others: expected 3 features .*, got 4"):
        unused.merge(accumulated(x), accumulated(torch.eye(4)))
    assert unused.count == 0
