"""The room of the Triton kernels' tests: here they run under Triton's interpreter, on CPU tensors.

The variable has to be set before a kernel is imported; a test that compiles kernels runs them in a process of its own.
"""

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    try:
        import triton  # noqa: F401
    except ImportError as error:
        skip = pytest.mark.skip(reason=f"Triton is not installed here: {error}")
        for item in items:
            if item.path.is_relative_to(os.path.dirname(__file__)):
                item.add_marker(skip)
