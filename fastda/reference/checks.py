"""Argument checks that the reference and the fused ops share, so that both raise the same errors.

Every message names the argument, what it got, what was expected and what to do.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LARGEST = sys.float_info.max
INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def describe(value: object) -> str:
    """What an argument turned out to be, for an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def tensor(name: str, value: Tensor) -> None:
    """Raise a TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}; wrap it in torch.as_tensor(...)")


def floating(name: str, value: Tensor) -> None:
    """Raise a TypeError unless `value` is a tensor of a supported floating dtype."""
    tensor(name, value)
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got a {value.layout} one; convert it with .to_dense()")
    if value.dtype not in FLOATING:
        raise TypeError(
            f"{name}: expected float32, float64, bfloat16 or float16, got {describe(value)}; convert it with .float()"
        )


def features(shape: str, **tensors: Tensor) -> tuple[Tensor, ...]:
    """Check feature tensors `(..., N, D)` that share device and dtype; promote them to one dtype.

    `shape` is the expected shape in words, as the error message shows it.
    """
    for name, x in tensors.items():
        floating(name, x)
        if x.dim() < 2:
            raise ValueError(
                f"{name}: expected shape {shape}, got {describe(x)}; flatten or unsqueeze it to samples × features"
            )
    return same_dtype(**tensors)


def same_dtype(**tensors: Tensor) -> tuple[Tensor, ...]:
    """Promote floating tensors as PyTorch does; a ValueError if they are not on one device."""
    (first_name, first), *rest = tensors.items()
    dtype = first.dtype
    for name, x in rest:
        if x.device != first.device:
            raise ValueError(
                f"{name}: expected the device of {first_name}, {first.device}, got {describe(x)}; "
                f"move one of them with .to(device)"
            )
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in tensors.values())


def matching(name: str, got: Tensor, other_name: str, other: Tensor) -> None:
    """The two share leading batch dimensions and the number of features."""
    if got.shape[:-2] != other.shape[:-2]:
        raise ValueError(
            f"{name}: expected the batch dimensions of {other_name}, {tuple(other.shape[:-2])}, got {describe(got)}; "
            f"expand one of them to the other's"
        )
    if got.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name}: expected as many features as {other_name}, {other.shape[-1]}, got {describe(got)}; "
            f"take both from the same layer"
        )


def enough_samples(name: str, count: int, correction: int) -> None:
    """A covariance needs at least correction + 1 samples."""
    if count < correction + 1:
        raise ValueError(
            f"{name}: expected at least {correction + 1} samples (correction + 1), got {count}; "
            f"use a larger batch (drop_last=True for the last one) or a smaller correction"
        )


def labels(name: str, value: Tensor, shape: tuple[int, ...], features_name: str, features: Tensor) -> Tensor:
    """Check integer labels, one for each sample of `features`; returns int64."""
    if not isinstance(value, Tensor):
        cure = "wrap it in torch.as_tensor(...)"
        raise TypeError(f"{name}: expected a tensor of integers, got {describe(value)}; {cure}")
    if value.dtype not in INTEGER:
        raise TypeError(f"{name}: expected integers, got {describe(value)}; convert it with .long()")
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, one label for each sample of {features_name}, "
            f"got {describe(value)}; expand or reshape the labels"
        )
    if value.device != features.device:
        raise ValueError(
            f"{name}: expected the device of {features_name}, {features.device}, got {describe(value)}; "
            f"move it with .to(device)"
        )
    return value if value.dtype == torch.int64 else value.to(torch.int64)


def option(name: str, value: str, known: Sequence[str]) -> str:
    """One of a few strings."""
    if value not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{name}: expected one of {names}, got {describe(value)}; choose one of them")
    return value


def whole_number(name: str, value: int, least: int) -> int:
    """An integer (also NumPy's) that is at least `least`; bool is refused."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {describe(value)}; convert it with int(...)")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}; pass a larger number")
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def number(name: str, value: float, *, least: float = -math.inf, above: float = -math.inf, most: float = math.inf):
    """A finite real number (also NumPy's), no larger than floats are, within its bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}; convert it with float(...)")
    if not (value > above and value >= least and value <= most and -LARGEST <= value <= LARGEST):
        bound = f"> {above}" if above > -math.inf else f">= {least}" if least > -math.inf else "finite"
        bound += f" and <= {most}" if most < math.inf else ""
        got = f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > LARGEST else value
        raise ValueError(f"{name}: expected a number {bound}, got {got}; pass one within these bounds")
    return value if isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) else float(value)


def scalar_tensor(name: str, value: Tensor, shapes: tuple[tuple[int, ...], ...], like: Tensor) -> None:
    """A floating tensor with one element, on the device of the features or (zero-dimensional) on the CPU."""
    floating(name, value)
    if tuple(value.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: expected a number or a tensor of shape {wanted}, got {describe(value)}; reshape it")
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {describe(value)}; move it with .to(device)")
