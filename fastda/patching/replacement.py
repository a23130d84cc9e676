"""What stands for a function of another library, and how it is made sure that it computes the same."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backend import requested, use_backend
from ..reference.checks import FLOATING, INTEGER

Normal = Callable[..., Tensor]
"""Random float64 values of a shape, which ask for a gradient."""


@dataclass(frozen=True)
class Replacement:
    """One function of a library, and what takes its place.

    Attributes:
        module: the module that defines it.
        name: `function`, or `Class.method`.
        op: of fastda, which does the work.
        function: takes the library's own function, then that function's arguments. It calls the library's own where the
            op does not serve them.
        probe: calls a function, the library's or ours, on random values, and gives the tensors that have to agree.
        since: the version before which the library has no such function; empty where all have it.
    """

    module: str
    name: str
    op: str
    function: Callable
    probe: Callable[[Callable, Normal], Iterable[Tensor]]
    since: str = ""

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True, eq=False)
class Found:
    """A function of the library that is installed, where it was found, and its successor."""

    replacement: Replacement
    owner: object  # the module or the class
    attribute: str
    is_static: bool
    original: Callable
    successor: Callable

    def as_attribute(self, function: Callable) -> object:
        return staticmethod(function) if self.is_static else function


def find(replacement: Replacement) -> Found | str | None:
    """The function in the library; how it differs, where it is not as expected; None where this version has none."""
    path, (*holder, attribute) = replacement.path, replacement.name.split(".")
    absent = None if replacement.since else f"{path} is absent"
    try:
        owner = importlib.import_module(replacement.module)
    except ModuleNotFoundError as error:
        if not replacement.module.startswith(error.name or "-"):
            raise  # something that the library needs is not installed
        return absent
    try:
        for name in holder:
            owner = getattr(owner, name)
        held = inspect.getattr_static(owner, attribute)
    except AttributeError:
        return absent
    is_static = isinstance(held, staticmethod)
    original = held.__func__ if is_static else held
    if not callable(original):
        return f"{path} is no function, but of type {type(original).__name__}"

    @functools.wraps(original)
    def successor(*args, **kwargs):
        return replacement.function(original, *args, **kwargs)

    difference = _difference(replacement, original, successor)
    return (
        f"{path} {difference}" if difference else Found(replacement, owner, attribute, is_static, original, successor)
    )


def _difference(replacement: Replacement, original: Callable, successor: Callable) -> str:
    """How the two differ; empty if they agree."""
    expected, got = _arguments(replacement.function)[1:], _arguments(original)
    if got != expected:
        return f"takes {_in_words(got)}, expected {_in_words(expected)}"
    try:
        wanted = _outcome(replacement, original)
    except Exception as error:  # whatever an unknown function may do
        return f"raises {type(error).__name__} where values were expected: {error}"
    ours = _outcome(replacement, successor)
    if len(ours) != len(wanted):
        return f"gives {len(wanted)} tensors and gradients, expected {len(ours)}"
    tolerance = 1e-5 if any(x.dtype == torch.float32 for x in wanted) else 1e-8
    for x, y in zip(wanted, ours):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"gives {x.dtype} of shape {tuple(x.shape)}, expected {y.dtype} of shape {tuple(y.shape)}"
        if not torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True):
            return f"computes something else: other values or gradients, by {(x - y).abs().max():.2g}"
    return ""


def _arguments(function: Callable) -> list[tuple]:
    return [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]


def _in_words(arguments: list[tuple]) -> str:
    parameters = [inspect.Parameter(name, kind, default=default) for name, kind, default in arguments]
    return str(inspect.Signature(parameters))


def _outcome(replacement: Replacement, function: Callable) -> list[Tensor]:
    """Results of the probe, and gradients for random incoming gradients; the same inputs at every call."""
    generator, leaves = torch.Generator("cpu").manual_seed(0), []

    def normal(*shape: int) -> Tensor:
        leaves.append(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_())
        return leaves[-1]

    # Whatever the program has set. The function's own random numbers, if any, are not the program's.
    on_cpu = use_backend("auto") if requested() in ("cuda", "triton") else nullcontext()
    with (
        on_cpu,
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        results = list(replacement.probe(function, normal))
        incoming = torch.Generator("cpu").manual_seed(1)
        pairs = [(x, torch.randn(x.shape, generator=incoming, dtype=x.dtype)) for x in results if x.requires_grad]
        outputs, gradients = zip(*pairs)
        return [*results, *torch.autograd.grad(outputs, leaves, gradients, allow_unused=True, materialize_grads=True)]


def features(*tensors: object, dims: int = 2) -> bool:
    """Are these dense floating tensors of so many dimensions? Others are left to the library's own function."""
    return all(
        isinstance(x, Tensor) and x.dtype in FLOATING and x.layout == torch.strided and x.dim() == dims for x in tensors
    )


def labels(*tensors: object, dims: int = 1) -> bool:
    """Are these tensors of integers with so many dimensions?"""
    return all(isinstance(x, Tensor) and x.dtype in INTEGER and x.dim() == dims for x in tensors)
