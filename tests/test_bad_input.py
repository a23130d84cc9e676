"""Bad input: one test a row, for the reference and for the fused ops. The error names the argument and what it got."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from ops_under_test import BY_NAME, OPS, Draw, Sizes, each_module

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = Sizes(batch=(2,))


class Row(NamedTuple):
    op: str
    what: str  # what is wrong, for the test's name
    change: dict[str, object] | Callable[[dict[str, object]], dict[str, object]]  # what becomes of valid arguments
    error: type[Exception]
    named: str  # the argument that the message begins with
    got: str  # what the message shows of it
    sizes: Sizes = Sizes()


def of(name: str, function: Callable[[torch.Tensor], object]) -> Callable[[dict[str, object]], dict[str, object]]:
    """Change one argument."""
    return lambda arguments: {name: function(arguments[name])}


def tensors(op: str, *, labels: bool) -> list[str]:
    """The names of an op's label or feature arguments, in their order."""
    arguments = BY_NAME[op].arguments(Draw(), weighted=True)
    if labels:
        return [name for name, x in arguments.items() if isinstance(x, torch.Tensor) and not x.is_floating_point()]
    return list(BY_NAME[op].differentiable(arguments))


NAMED = [op.name for op in OPS if op.name != "deep_coral_loss"]  # whose errors name the layer, see below
WITH_SAMPLES = [name for name in NAMED if not name.startswith(("gradient", "domain"))]


def feature_rows() -> Iterator[Row]:
    for op in NAMED:
        names = tensors(op, labels=False)
        for name in names:
            yield Row(op, f"{name} is a list", {name: [[1.0]]}, TypeError, name, "list")
            for dtype in (torch.int64, torch.bool, torch.complex64):
                change = of(name, lambda x, dtype=dtype: x.to(dtype))
                yield Row(op, f"{name} of {dtype}", change, TypeError, name, str(dtype))
        for name in names[1:]:
            yield Row(op, f"{name} on another device", of(name, lambda x: x.to("meta")), ValueError, name, "meta")
    for op in WITH_SAMPLES:
        first, *others = tensors(op, labels=False)
        for name in (first, *others):
            yield Row(op, f"{name} of one dimension", of(name, lambda x: x[0]), ValueError, name, "shape (4,)")
        for name in others:
            short = of(name, lambda x: x[..., :3])
            yield Row(op, f"{name} of other features", short, ValueError, name, ", 3)")
            other = of(name, lambda x: x[:1])
            yield Row(op, f"{name} of another batch", other, ValueError, name, "shape (1, ", BATCH)
            none = of(name, lambda x: x[0])
            yield Row(op, f"{name} without batch", none, ValueError, name, "shape (", BATCH)


def label_rows() -> Iterator[Row]:
    for op in NAMED:
        for name in tensors(op, labels=True):
            yield Row(op, f"{name} is a list", of(name, lambda x: x.tolist()), TypeError, name, "list")
            yield Row(op, f"{name} of floats", of(name, lambda x: x.float()), TypeError, name, "torch.float32")
            yield Row(op, f"{name} of bool", of(name, lambda x: x.bool()), TypeError, name, "torch.bool")
            yield Row(op, f"{name} too few", of(name, lambda x: x[:2]), ValueError, name, "shape (2,)")
            yield Row(op, f"{name} without batch", of(name, lambda x: x[0]), ValueError, name, "shape (", BATCH)
            yield Row(op, f"{name} on another device", of(name, lambda x: x.to("meta")), ValueError, name, "meta")
            for label in (3, -1, 2**40, -(2**40)):
                change = of(name, lambda x, label=label: torch.cat([x[1:], torch.tensor([label])]))
                yield Row(op, f"{name} {label} out of range", change, IndexError, name, str(label))


OPTIONS = {"metric": "manhattan", "reduction": "median", "scale": "tllib", "empty": "one"}
KNOWN = {"metric": "sqeuclidean", "reduction": "none", "scale": "paper", "empty": "zero"}
NUMBERS = {
    "correction": [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError)],
    "mean_weight": [(-0.5, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1", TypeError)],
    "num_classes": [(0, ValueError), (-2, ValueError), (3.0, TypeError), (True, TypeError)],
    "temperature": [*((x, ValueError) for x in (0, -1.0, math.nan, math.inf)), ("1", TypeError)],
    "label_smoothing": [(-0.1, ValueError), (1.1, ValueError), (math.nan, ValueError), ("0", TypeError)],
    "ignore_index": [(1.0, TypeError), (True, TypeError), (None, TypeError)],
    "k": [(0, ValueError), (-1, ValueError), (4, ValueError), (1.0, TypeError), (True, TypeError)],
    "lambd": [*((x, ValueError) for x in (math.nan, math.inf, -math.inf)), ("1", TypeError), (True, TypeError)],
}
SCALARS = {
    "temperature": [(torch.ones(1), ValueError, "shape (1,)"), (torch.tensor(1), TypeError, "torch.int64")],
    "lambd": [(torch.ones(2), ValueError, "shape (2,)"), (torch.tensor(1), TypeError, "torch.int64")],
}


def option_rows() -> Iterator[Row]:
    for op in NAMED:
        arguments = BY_NAME[op].arguments()
        for name in filter(OPTIONS.__contains__, arguments):
            yield Row(op, f"{name} unknown", {name: OPTIONS[name]}, ValueError, name, f"'{OPTIONS[name]}'")
            yield Row(op, f"{name} unknown, known are listed", {name: "x"}, ValueError, name, f"'{KNOWN[name]}'")
            yield Row(op, f"{name} is None", {name: None}, ValueError, name, "None")
        for name in filter(NUMBERS.__contains__, arguments):
            for value, error in NUMBERS[name]:
                yield Row(op, f"{name} {value!r}", {name: value}, error, name, str(value))
        for name in filter(SCALARS.__contains__, arguments):
            for value, error, got in SCALARS[name]:
                yield Row(op, f"{name} {value!r}", {name: value}, error, name, got)
            on_meta = {name: torch.ones((), device="meta")}
            yield Row(op, f"{name} on another device", on_meta, ValueError, name, "meta")


LINEAR, DOMAIN = "gradient_reversal_linear", "domain_adversarial_loss"
OWN_ROWS = [
    Row(LINEAR, "weight of other features", of("weight", lambda x: x[:, :3]), ValueError, "weight", "shape (3, 3)"),
    Row(LINEAR, "weight of one dimension", of("weight", lambda x: x[0]), ValueError, "weight", "shape (4,)"),
    Row(LINEAR, "weight of another dtype", of("weight", lambda x: x.double()), TypeError, "weight", "torch.float64"),
    Row(LINEAR, "bias of another dtype", of("bias", lambda x: x.half()), TypeError, "bias", "torch.float16"),
    *(
        Row(op, "lambd beyond all floats", {"lambd": 10**400}, ValueError, "lambd", "an int of 1329 bits")
        for op in ("gradient_reversal", "gradient_reversal_fork", LINEAR)
    ),
    Row(LINEAR, "bias too short", of("bias", lambda x: x[:2]), ValueError, "bias", "shape (2,)"),
    *(
        Row(DOMAIN, f"{name} of another shape", {name: torch.ones(2)}, ValueError, name, "shape (2,)")
        for name in ("source_weight", "target_weight")
    ),
    *(
        Row(op, f"{name} {n} samples", of(name, lambda x, n=n: x[:n]), ValueError, name, f"got {n}")
        for op, name in (("covariance", "x"), ("coral_loss", "source"), ("coral_loss", "target"))
        for n in (0, 1)
    ),
]
ROWS = [*feature_rows(), *label_rows(), *option_rows(), *OWN_ROWS]


@each_module
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.op}: {row.what}".replace("[", "(").replace("]", ")"))
def test_row(module, row):
    op = BY_NAME[row.op]
    arguments = op.arguments(Draw(row.sizes), weighted=True)
    arguments |= row.change(arguments) if callable(row.change) else row.change
    with pytest.raises(row.error, match=rf"^{row.named}: expected ") as raised:
        op.of(module)(**arguments)
    assert row.got in str(raised.value)


LAYER = torch.ones(4, 3)
DEEP_ROWS = {
    "no layer": ([], [], {}, ValueError, "^targets: expected .* got 0 sources, 0 targets"),
    "lists of other lengths": ([LAYER] * 2, [LAYER], {}, ValueError, "^targets: expected .* got 2 sources, 1 targets"),
    "too few weights": ([LAYER] * 2, [LAYER] * 2, {"weights": [1.0]}, ValueError, "^weights: expected .*2.* got 1"),
    "integers in a layer": ([LAYER] * 2, [LAYER, LAYER.int()], {}, TypeError, "^layer 1: target: expected .*int32"),
    "other features": ([LAYER] * 2, [LAYER, LAYER[:, :2]], {}, ValueError, r"^layer 1: target: expected .*\(4, 2\)"),
    "one sample": ([LAYER, LAYER[:1]], [LAYER] * 2, {}, ValueError, "^layer 1: source: expected .* got 1"),
    "an unknown scale": ([LAYER], [LAYER], {"scale": "x"}, ValueError, "scale: expected one of 'paper', 'mean', 'sum'"),
}


@each_module
@pytest.mark.parametrize("row", DEEP_ROWS)
def test_layers(module, row):
    sources, targets, options, error, message = DEEP_ROWS[row]
    with pytest.raises(error, match=message):
        module.deep_coral_loss(sources, targets, **options)


@each_module
@pytest.mark.parametrize("name", ["coral_loss", "deep_coral_loss", "class_means", "prototypical_loss"])
def test_process_group(module, name):
    op = BY_NAME[name]
    with pytest.raises(TypeError, match=r"process_group: expected a torch\.distributed ProcessGroup or None, got str"):
        op.of(module)(**op.arguments(), process_group="world")


@each_module
@pytest.mark.parametrize("name", ["class_means", "prototype_cross_entropy", "prototypical_loss"])
def test_labels_out_of_range_in_a_batch(module, name):
    """In each batch element, and also where no gradient is asked for."""
    op = BY_NAME[name]
    for label in tensors(name, labels=True):
        arguments = op.arguments(Draw(BATCH))
        arguments[label][1, -1] = 77
        with pytest.raises(IndexError, match=rf"^{label}: expected .*\b0\b.*2.*\b77\b"), torch.no_grad():
            op.of(module)(**arguments)


def test_every_argument_is_covered():
    """An argument that joins an op without a row here is noticed."""
    for op in NAMED:
        arguments = BY_NAME[op].arguments(Draw(), weighted=True).keys() - {"weighted"}
        covered = {word for row in ROWS if row.op == op for word in re.findall(r"\w+", row.named)}
        assert arguments <= covered, (op, arguments - covered)
