"""The tests of this folder need a CUDA device. Without one they are left out, all in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from remarks import remark

HERE = Path(__file__).parent
REASON = f"no CUDA device: torch {torch.__version__}, built for CUDA {torch.version.cuda}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
    if here and not torch.cuda.is_available():
        items[:] = [item for item in items if HERE not in item.path.parents]
        config.hook.pytest_deselected(items=here)
        remark(f"tests/gpu: {len(here)} tests left out: {REASON}")
