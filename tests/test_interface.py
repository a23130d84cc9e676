"""`import fastda.reference as F` and `import fastda as F` are interchangeable, and each op is documented."""

from __future__ import annotations

import doctest
import inspect

import pytest
from ops_under_test import OPS, each_op

import fastda
import fastda.reference
import fastda.schedules


def is_op(function: object) -> bool:
    return inspect.isfunction(function) and not function.__name__.startswith("_")


def test_every_op_is_in_the_table_of_tests():
    assert sorted(op.name for op in OPS) == sorted(fastda.reference.__all__)


def test_the_reference_lists_all_that_it_exports():
    exported = {name for name, x in vars(fastda.reference).items() if not name.startswith("_") and is_op(x)}
    assert exported == set(fastda.reference.__all__)


@each_op
def test_fastda_exports_the_op(op):
    assert op.name in fastda.__all__
    assert is_op(getattr(fastda, op.name))
    assert getattr(fastda, op.name).__name__ == op.name


def test_every_public_function_of_fastda_that_takes_tensors_has_a_twin():
    takes_tensors = {
        name
        for name in fastda.__all__
        if is_op(getattr(fastda, name)) and "Tensor" in str(inspect.signature(getattr(fastda, name)))
    }
    assert takes_tensors == set(fastda.reference.__all__)


@each_op
def test_signatures_agree(op):
    """Names, kinds, order, defaults and annotations of the arguments, and what is returned."""
    reference, fused = (inspect.signature(getattr(module, op.name)) for module in (fastda.reference, fastda))
    assert fused == reference


@each_op
def test_documentation(op):
    text = inspect.getdoc(getattr(fastda, op.name))
    assert text == inspect.getdoc(getattr(fastda.reference, op.name))
    assert "Example:" in text
    assert "ifferentiab" in text  # differentiable, differentiability
    if "Arguments, errors and differentiability are the same" not in text:
        assert all(part in text for part in ("Args:", "Returns:", "Raises:"))
        assert "bfloat16" in text or "as in :func:`fastda." in text
        for argument in inspect.signature(getattr(fastda, op.name)).parameters:
            assert argument in text.partition("Args:")[2], f"{op.name}: {argument} is not described"


EXAMPLES = [
    *(getattr(fastda, op.name) for op in OPS),
    *filter(is_op, vars(fastda.schedules).values()),
    fastda.CovarianceAccumulator,
    fastda.CovarianceAccumulator.coral_distance,
]


@pytest.mark.parametrize("function", EXAMPLES, ids=lambda function: function.__name__)
def test_examples_run(function):
    tests = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert sum(len(test.examples) for test in tests) > 0, "no example"
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0
