"""Joins the Triton launchers to the ops, and imports Triton no sooner than the first call."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable

import torch

TOPICS = {
    "class_means": "prototype_classes",
    "coral_layers": "coral",
    "coral_loss": "coral",
    "covariance": "covariance",
    "nearest_prototype": "nearest_prototype",
    "pairwise_distance": "prototypes",
    "prototype_cross_entropy": "prototypes",
    "prototype_softmax": "prototypes",
    "prototypical_loss": "prototype_classes",
}
"""Ops with Triton kernels, forward and backward, and the module of fastda.kernels.triton that launches them."""


ABSENT = "" if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"
"""Why Triton cannot be had, and the cure; empty if it can."""


def serves(op: str) -> bool:
    return op.removesuffix("_backward") in TOPICS


def launcher(op: str) -> Callable:
    """The function that launches the kernels of an op."""
    topic = TOPICS[op.removesuffix("_backward")]

    def launch(*arguments):
        return getattr(importlib.import_module(f"fastda.kernels.triton.{topic}"), op)(*arguments)

    return launch


def interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter, and so on CPU tensors."""
    if ABSENT:
        return False
    from triton import JITFunction

    from .triton.products import products_kernel

    return not isinstance(products_kernel, JITFunction)


def serve_cpu() -> torch.library.Library:
    """Let the launchers serve CPU tensors as well while the result is kept; the C++ kernels stand behind them."""
    library = torch.library.Library("fastda", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of overridden kernels
        for topic in TOPICS:
            for op in (topic, f"{topic}_backward"):
                library.impl(op, launcher(op), "CPU", allow_override=True)
    return library
