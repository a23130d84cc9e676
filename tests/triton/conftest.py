"""The room of the Triton kernels' tests under Triton's interpreter, on CPU tensors; tests/conftest.py chooses it.

On a GPU machine the kernels run compiled, in tests/gpu.
"""

import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("triton") is None:
        reason = "Triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reason = "there is a GPU: Triton's interpreter is off, and tests/gpu has the compiled kernels"
    else:
        return
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.skip(reason=reason))
