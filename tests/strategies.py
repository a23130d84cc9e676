"""What hypothesis draws: sizes, dtypes, layouts, label distributions, options."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from ops_under_test import LABEL_KINDS, Draw, Op, Sizes
from tolerance import is_floating, map_floating
from torch import Tensor

SIZES = (0, 1, 2, 3, 5, 7, 13, 15, 16, 17, 31, 33, 63, 65)  # none, one, primes, and around the sizes of blocks
BATCHES = ((), (1,), (3,), (2, 2), (0,))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "expanded")


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another layout, surrounded by NaN where sliced; for "expanded" the first ones, repeated.

    Only batches are expanded: samples or features that are all alike make results that are 0 but for rounding.
    """
    if layout == "transposed" and x.dim() >= 2:
        return x.mT.contiguous().mT
    if layout == "sliced" and x.dim() >= 1:
        around = x.new_full((*(2 * n + 1 for n in x.shape),), torch.nan)
        window = around[tuple(slice(1, None, 2) for _ in x.shape)]
        return window.copy_(x)
    if layout == "expanded" and x.dim() > 2 and x.numel() > 0:
        return x[:1].expand_as(x)
    return x


@st.composite
def calls(draw: st.DrawFn, op: Op, dtypes=DTYPES, layouts=LAYOUTS, batches=BATCHES) -> dict[str, object]:
    """Valid arguments of an op."""
    sizes = Sizes(
        batch=draw(st.sampled_from(batches)),
        samples=draw(st.sampled_from(SIZES)),
        others=draw(st.sampled_from(SIZES)),
        features=draw(st.sampled_from(SIZES)),
        classes=draw(st.sampled_from(SIZES[2 if "k" in op.options else 1 :])),
        labels=draw(st.sampled_from(LABEL_KINDS)),
    )
    options = {name: draw(st.sampled_from(values)) for name, values in op.options.items()}
    if options.get("metric") == "euclidean" and sizes.features == 1:
        # A point's direction is ±1 there, which the reference has without rounding: where such terms cancel, no error
        # would be allowed at all.
        sizes = replace(sizes, features=2)
    source = Draw(sizes, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**16)))
    arguments = op.arguments(source, **options)
    return map_floating(
        arguments, lambda name, x: x if name in op.options else lay_out(x, draw(st.sampled_from(layouts)))
    )


def describe(arguments: dict[str, object]) -> str:
    """The call in one line, for a failing example."""
    return ", ".join(
        f"{name}={x.dtype}{list(x.shape)} strides {x.stride()}" if is_floating(x) else f"{name}={x}"
        for name, x in arguments.items()
    )
