"""The tests of this folder need a CUDA device. Without one they are skipped, and say so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
REASON = f"no CUDA device: torch {torch.__version__}, built for CUDA {torch.version.cuda}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line(f"tests/gpu skipped: {REASON}")
