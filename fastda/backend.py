"""Which backend serves which op, and every switch that decides it.

======================  ==============================================================================================
`fastda.use_backend`    "auto" (by device, the default), "reference", "cpp", "cuda", "triton"; a context manager too
`FASTDA_BACKEND`        the same, from the environment, read when fastda is imported
======================  ==============================================================================================

Both concern the ops that have a kernel in that backend; the others are the reference. At installation
`FASTDA_NO_KERNELS=1` leaves the compiled core out, `FASTDA_FORCE_CUDA=1` makes it an error where its kernels for CUDA
cannot be built, and `FASTDA_SANITIZE=1` (or `avx512`, `avx2`, `default`: one instruction set alone) compiles it for
tests/sanitize.sh. `TRITON_INTERPRET=1`, Triton's own switch, set before Triton is imported, runs its kernels on CPU
tensors, slowly: for tests.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .kernels import cpp, launchers

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")

ADVERSARIAL = ("domain_adversarial_loss", "gradient_reversal", "gradient_reversal_fork", "gradient_reversal_linear")
PROTOTYPES = (
    "class_means",
    "nearest_prototype",
    "pairwise_distance",
    "prototype_cross_entropy",
    "prototype_log_softmax",
    "prototype_softmax",
    "prototypical_loss",
)
KERNELS = {
    "cpp": (*ADVERSARIAL, "coral_loss", "covariance", "deep_coral_loss", *PROTOTYPES),
    "cuda": ADVERSARIAL,
    "triton": ("coral_loss", "covariance", "deep_coral_loss", *PROTOTYPES),
}
"""Ops with a kernel of their own, by backend; every other op is the reference re-exported, under every setting."""

DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
"""The device that a backend serves; Triton's interpreter serves the CPU."""

_logger = logging.getLogger("fastda")
_told: set[tuple[str, str]] = set()
_requested = os.environ.get("FASTDA_BACKEND", "auto")
_ready: str | None = "auto"  # the request that has been checked
_interpreter: torch.library.Library | None = None  # while it lives, Triton's launchers serve the CPU


class use_backend:
    """Choose the backend of all ops, process-wide: `fastda.use_backend("reference")`, or for a while in a `with` block.

    Args:
        name: "auto" chooses by device; "reference" is plain PyTorch everywhere; "cpp" the compiled core, on CPU
            tensors; "cuda" its kernels for CUDA tensors; "triton" the Triton kernels, on CUDA tensors (and on CPU
            tensors where TRITON_INTERPRET=1 is set).

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
        _choose(self._name)
        return self

    def __exit__(self, *exception) -> None:
        _choose(self._before)


def _choose(name: str) -> None:
    """Make a backend, which can be had, the one that serves."""
    global _requested, _ready, _interpreter
    if name != "triton":
        _interpreter = None
    elif _interpreter is None and launchers.interpreted():
        _interpreter = launchers.serve_cpu()
    _requested = _ready = name


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
    if _ready != _requested:
        check_requested()
        _choose(_requested)
    if op not in KERNELS[_requested]:
        _tell(op, device, f"the backend {_requested} has no kernel of it")
        return "reference"
    if device not in _devices(_requested):
        is_interpretable = _requested == "triton" and device == "cpu"
        interpreter = ", set TRITON_INTERPRET=1 before Triton is imported" if is_interpretable else ""
        raise RuntimeError(
            f"{op}: backend {_requested!r} was asked for and serves {' and '.join(_devices(_requested))} tensors, "
            f'got one on {x.device}; move it{interpreter}, or choose fastda.use_backend("auto")'
        )
    return _requested


def eager_core(x: Tensor):
    """The compiled core where an eager call on `x` may go straight to it, to be checked there; None where it may not.

    For the ops of ADVERSARIAL and for single episodes, whose cost is largely that of the call.
    """
    if torch.compiler.is_compiling() or _requested not in ("auto", "cpp", "cuda"):
        return None
    if _requested != "auto" and not (isinstance(x, Tensor) and x.device.type == DEVICES[_requested]):
        return None
    return cpp.library


def _devices(backend: str) -> tuple[str, ...]:
    """What a backend serves, as things stand."""
    return (DEVICES[backend],) if _interpreter is None else ("cpu",)


def _check(argument: str, name: str) -> None:
    """Raise unless the backend of that name is known and can be had."""
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = _reason_absent(name)
    if reason:
        raise RuntimeError(f"{argument}: backend {name!r} cannot be had: {reason}")


def _reason_absent(backend: str) -> str:
    """Why a backend cannot be had on this machine; empty if it can."""
    if backend in DEVICES and not cpp.status.available:
        derivatives = " (it carries the derivatives of all fused ops)" * (backend != "cpp")
        return f"the compiled core{derivatives} is {cpp.status.reason}"
    if backend == "cuda" and "cuda" not in cpp.devices:
        return f"the compiled core is built without kernels for cuda ({cpp.status.stamp['CUDA kernels']})"
    if backend == "triton":
        if launchers.ABSENT:
            return launchers.ABSENT
        if not torch.cuda.is_available() and not launchers.interpreted():
            switch = "TRITON_INTERPRET=1 before Triton is imported"
            return f"there is no CUDA device; to run on the CPU, slowly, set {switch}"
    return ""


def _automatic(op: str, device: str) -> tuple[str, str]:
    """The backend of `op` on a device, and why it is not a kernel where it is not."""
    backend = next((name for name, served in DEVICES.items() if served == device and op in KERNELS[name]), None)
    if backend is None:
        return "reference", f"no kernel for {device} yet"
    if not cpp.status.available:
        return "reference", f"the compiled core is {cpp.status.reason}"
    if backend == "cuda" and "cuda" not in cpp.devices:
        return "reference", _reason_absent("cuda")
    if backend == "triton" and launchers.ABSENT:
        return "reference", launchers.ABSENT
    return backend, ""


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
    absent = _reason_absent(_requested)
    if _requested in BACKENDS and not absent:
        _choose(_requested)
    for op in reference.__all__:
        for device in devices:
            if not any(op in kernels for kernels in KERNELS.values()):
                row = "reference", "no kernel of its own yet"
            elif _requested == "reference":
                row = "reference", "asked for"
            elif _requested not in DEVICES:
                row = _automatic(op, device)
            elif op not in KERNELS[_requested]:
                row = "reference", f"{_requested} was asked for, and has no kernel of it"
            elif absent:
                row = "none", f"{_requested} was asked for, and cannot be had: {absent}"
            elif device not in _devices(_requested):
                served = " and ".join(_devices(_requested))
                row = "none", f"{_requested} was asked for, and serves {served} tensors alone"
            else:
                row = _requested, ""
            rows.append(OpService(op, device, *row))
    return rows
