"""Which backend serves which op, and every switch that decides it.

======================  ==============================================================================================
`fastda.use_backend`    "auto" (by device, the default), "reference" or "cpp"; a context manager too
`FASTDA_BACKEND`        the same, from the environment, read when fastda is imported
======================  ==============================================================================================

Both concern the ops that have a kernel; the others are the reference under every setting. At installation
`FASTDA_NO_KERNELS=1` leaves the compiled core out.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .kernels import cpp

BACKENDS = ("auto", "reference", "cpp")

KERNELS = {
    "cpp": ("coral_loss", "covariance", "deep_coral_loss", "gradient_reversal", "prototypical_loss"),
}
"""Ops with a kernel of their own, by backend; every other op is the reference re-exported, under every setting."""

DEVICES = {"cpp": "cpu"}
"""The device that a backend serves."""

_logger = logging.getLogger("fastda")
_told: set[tuple[str, str]] = set()
_requested = os.environ.get("FASTDA_BACKEND", "auto")


class use_backend:
    """Choose the backend of all ops, process-wide: `fastda.use_backend("reference")`, or for a while, in a `with` block.

    Args:
        name: "auto" chooses by device; "reference" is plain PyTorch everywhere; "cpp" the compiled core, on CPU tensors.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend is absent; says why and what to do.

    Example:
        >>> import torch, fastda
        >>> x = torch.randn(4, 3)
        >>> with fastda.use_backend("reference"):
        ...     loss = fastda.coral_loss(x, x + 1)
    """

    def __init__(self, name: str):
        _check("name", name)
        self._name, self._before = name, _requested
        self.__enter__()

    def __enter__(self) -> use_backend:
        global _requested
        _requested = self._name
        return self

    def __exit__(self, *exception) -> None:
        global _requested
        _requested = self._before


def requested() -> str:
    """The backend that was asked for."""
    return _requested


def check_requested() -> None:
    """Raise unless the backend that was asked for can be had: a ValueError or RuntimeError with cause and cure."""
    _check("FASTDA_BACKEND", _requested)


def serve(op: str, x: Tensor) -> str:
    """The backend of one call of `op` on a tensor like `x`."""
    if _requested == "reference" or torch.autograd.forward_ad._current_level >= 0:  # forward mode is the formula's
        return "reference"
    device = x.device.type if isinstance(x, Tensor) else "cpu"
    if _requested == "auto":
        backend, reason = _automatic(op, device)
        if reason and not torch.compiler.is_compiling():
            _tell(op, device, reason)
        return backend
    check_requested()
    if device != DEVICES[_requested]:
        raise RuntimeError(
            f"{op}: backend {_requested!r} was asked for and serves {DEVICES[_requested]} tensors, got one on {x.device}; "
            f'move it, or choose fastda.use_backend("auto")'
        )
    return _requested


def _check(argument: str, name: str) -> None:
    """Raise unless the backend of that name is known and can be had."""
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    if name == "cpp" and not cpp.status.available:
        raise RuntimeError(f"{argument}: backend 'cpp' cannot be had: the compiled core is {cpp.status.reason}")


def _automatic(op: str, device: str) -> tuple[str, str]:
    """The backend of `op` on a device, and why it is not a kernel where it is not."""
    if device != "cpu":
        return "reference", f"no kernel for {device} yet"
    if not cpp.status.available:
        return "reference", f"the compiled core is {cpp.status.reason}"
    return "cpp", ""


def _tell(op: str, device: str, reason: str) -> None:
    if (op, device) not in _told:
        _told.add((op, device))
        _logger.warning("%s runs as plain PyTorch on %s: %s", op, device, reason)


@dataclass(frozen=True)
class OpService:
    """A row of the report: the backend that serves `op` on `device`, and the reason where it is the reference."""

    op: str
    device: str
    backend: str
    reason: str


def serving(devices: tuple[str, ...] = ("cpu", "cuda")) -> list[OpService]:
    """Which backend serves which op, as things stand."""
    rows = []
    for op in reference.__all__:
        for device in devices:
            if op not in KERNELS["cpp"]:
                row = "reference", "no kernel of its own yet"
            elif _requested == "reference":
                row = "reference", "asked for"
            elif _requested in DEVICES and device != DEVICES[_requested]:
                row = "none", f"{_requested} was asked for, and serves {DEVICES[_requested]} tensors alone"
            else:
                row = _automatic(op, device)
            rows.append(OpService(op, device, *row))
    return rows
