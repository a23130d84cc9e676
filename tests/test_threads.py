"""Ops called from several Python threads at once, and with several threads of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from ops_under_test import Draw, Op, Sizes, each_op
from tolerance import assert_same_bits, results

import fastda

CALLERS, CALLS = 8, 4
SIZES = (
    Sizes(batch=(3,), samples=21, others=13, features=18, classes=4),
    Sizes(samples=131, others=97, features=130, classes=300),
    Sizes(samples=40, others=50, features=700, classes=20),
)
# Their work is split by what comes out, and no sum is: the number of threads changes nothing.
SAME_BITS = {
    "class_means",
    "domain_adversarial_loss",
    "gradient_reversal",
    "gradient_reversal_fork",
    "pairwise_distance",
    "prototype_log_softmax",
    "prototype_softmax",
}


def outcome(op: Op, sizes: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """Values and gradients."""
    return results(op.of(fastda), op.arguments(Draw(sizes, seed=seed)), constant=op.constants)


@each_op
def test_calls_from_eight_threads_at_once_give_what_they_give_one_by_one(op):
    threads = torch.get_num_threads()
    calls = [(sizes, seed) for sizes in SIZES for seed in range(CALLS)]
    together = Barrier(CALLERS)

    def all_calls(first: int) -> list[dict[str, torch.Tensor]]:
        """Each caller in another order, so that different calls meet."""
        torch.set_num_threads(1)
        together.wait()
        found = {i: outcome(op, *calls[i]) for i in [(first + j) % len(calls) for j in range(len(calls))]}
        return [found[i] for i in range(len(calls))]

    try:
        torch.set_num_threads(1)
        expected = [outcome(op, *call) for call in calls]
        with ThreadPoolExecutor(CALLERS) as pool:
            for found in pool.map(all_calls, range(CALLERS)):
                for one, other in zip(found, expected):
                    assert_same_bits(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.compiled_core
@each_op
def test_the_number_of_threads(op):
    """The same bits for one and two, or where sums are split among threads the same to rounding."""
    threads = torch.get_num_threads()
    try:
        for sizes in (*SIZES, Sizes(samples=3000, others=2000, features=64, classes=50)):
            found = []
            for count in (1, 2):
                torch.set_num_threads(count)
                found.append(outcome(op, sizes, seed=0))
            if op.name in SAME_BITS:
                assert_same_bits(*found)
            for name, one in found[0].items():
                torch.testing.assert_close(one, found[1][name], rtol=1e-4, atol=1e-5, equal_nan=True)
    finally:
        torch.set_num_threads(threads)
