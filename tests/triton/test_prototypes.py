"""Prototypes on Triton, interpreted on CPU tensors: as exact as the reference, over metrics, sizes, layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from ops_under_test import BY_NAME, METRICS, Draw, Sizes
from strategies import LAYOUTS, describe, lay_out
from tolerance import assert_as_accurate_as_reference, is_floating, random_like, results
from torch.testing import assert_close

import fastda
import fastda.reference
from fastda import backend

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory", "one_thread")
SERVED = [BY_NAME[name] for name in backend.KERNELS["triton"] if name in backend.PROTOTYPES]
each_served = pytest.mark.parametrize("op", SERVED, ids=str)
each_metric = pytest.mark.parametrize("metric", METRICS)
EPISODE, MEANS = BY_NAME["prototypical_loss"], BY_NAME["class_means"]


def check(op, arguments):
    assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments)


@st.composite
def calls(draw, op):
    around = (1, 2, 15, 16, 17, 33)
    sizes = Sizes(
        batch=draw(st.sampled_from([(), (2,), (1, 2), (0,)])),
        samples=draw(st.sampled_from((0, *around))),
        others=draw(st.sampled_from((0, *around))),
        features=draw(st.sampled_from((0, *around, 65))),
        classes=draw(st.sampled_from((2, 3, 5, 17))),
        labels=draw(st.sampled_from(("balanced", "unbalanced", "gaps", "one class"))),
    )
    options = {name: draw(st.sampled_from(values)) for name, values in op.options.items()}
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    arguments = op.arguments(Draw(sizes, dtype, draw(st.integers(0, 2**16))), **options)
    for name, x in arguments.items():
        if is_floating(x) and name not in op.options:
            arguments[name] = lay_out(x, draw(st.sampled_from(LAYOUTS)))
    return arguments


@each_served
@given(data=st.data())
@settings(max_examples=4)
def test_values_and_gradients(op, data):
    arguments = data.draw(calls(op))
    note(describe(arguments))
    check(op, arguments)


@pytest.mark.slow
@each_served
@given(data=st.data())
@settings(max_examples=200)
def test_values_and_gradients_at_length(op, data):
    arguments = data.draw(calls(op))
    note(describe(arguments))
    check(op, arguments)
