"""No time is taken of a wrong answer: each side is held to the float64 result first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .baselines import Side, formula
from .cases import Case

# A side may be this much worse than the formula itself in float32, and a few roundings beside that. A wrong formula is
# off by far more: inputs are drawn so that no term of a result is small.
TIMES_OWN_ERROR = 10
ROUNDINGS = 32
HALF_PRECISION_ROUNDINGS = 4
WRONG_INDICES = 0.01  # neighbours may be nearer to each other than float32 resolves
PEER_ERROR = 0.01  # a peer has to compute the same formula; how well it rounds is its own affair, and recorded


@dataclass(frozen=True)
class Results:
    """What a call gave: outputs, and gradients of the arguments that ask for one."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]

    def named(self) -> dict[str, Tensor]:
        outputs = {f"output {i}": x for i, x in enumerate(self.outputs)}
        return outputs | {f"gradient {i}": x for i, x in enumerate(self.gradients)}


def asking(arguments: tuple) -> tuple[Tensor, ...]:
    """The arguments that ask for a gradient."""
    return tuple(x for x in arguments if isinstance(x, Tensor) and x.requires_grad)


def call(function: Callable, arguments: tuple) -> tuple[Tensor, ...]:
    """The outputs, as a tuple."""
    with torch.set_grad_enabled(bool(asking(arguments))):
        outputs = function(*arguments)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def incoming_gradients(outputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Random, in the outputs' dtypes, the same for each side: a constant would hide an error in other directions."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in outputs)


def results(function: Callable, arguments: tuple, seed: int) -> Results:
    """One forward and, where an argument asks for it, one backward pass."""
    outputs = call(function, arguments)
    inputs = asking(arguments)
    if not inputs:
        return Results(outputs, ())
    gradients = torch.autograd.grad(outputs, inputs, incoming_gradients(outputs, seed), materialize_grads=True)
    return Results(outputs, gradients)


def _converted(arguments: tuple, dtype: torch.dtype) -> tuple:
    """The same values in another dtype; what asked for a gradient still does."""
    return tuple(
        x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in arguments
    )


def error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖; the share of differing entries for integers."""
    if not truth.is_floating_point():
        return (got != truth).double().mean().item()
    difference = torch.linalg.vector_norm(got.detach().double() - truth)
    return (difference / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


@dataclass(frozen=True)
class Verdict:
    """Relative errors of outputs and gradients; what is wrong with them, None if nothing is."""

    errors: dict[str, float]
    wrong: str | None


class Check:
    """Holds the float64 results of a case, and the errors that are allowed."""

    def __init__(self, case: Case, arguments: tuple, seed: int = 0, truth: Callable | None = None) -> None:
        function = truth or formula(case)
        self.arguments, self.seed = arguments, seed
        self.truth = results(function, _converted(arguments, torch.float64), seed).named()
        half = case.dtype in (torch.bfloat16, torch.float16)
        rounding = (HALF_PRECISION_ROUNDINGS if half else ROUNDINGS) * torch.finfo(case.dtype).eps
        own = results(function, _converted(arguments, torch.float32), seed).named()  # half precision accumulates in it
        self.allowed = {
            name: TIMES_OWN_ERROR * error(own[name], value) + rounding if value.is_floating_point() else WRONG_INDICES
            for name, value in self.truth.items()
        }

    def judge(self, side: Side) -> Verdict:
        """How far the side's answer is from the truth, and whether that is too far."""
        got = results(side.call, self.arguments, self.seed).named()
        if got.keys() != self.truth.keys():
            return Verdict({}, f"expected {', '.join(self.truth)}, got {', '.join(got)}")
        errors = {}
        for name, truth in self.truth.items():
            if got[name].shape != truth.shape:
                return Verdict(errors, f"{name}: expected shape {tuple(truth.shape)}, got {tuple(got[name].shape)}")
            errors[name] = error(got[name], truth)
            allowed = max(self.allowed[name], PEER_ERROR) if side.is_peer else self.allowed[name]
            if not errors[name] <= allowed:  # NaN is wrong too
                return Verdict(errors, f"{name}: relative error {errors[name]:.1e}, allowed {allowed:.1e}")
        return Verdict(errors, None)
