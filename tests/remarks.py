"""What the summary of a run says of all its tests: what was left out, and why.

Tests may run in several processes (`pytest -n 2`); what each remarks is handed to the one that prints.
"""

from __future__ import annotations

remarks: dict[str, None] = {}  # in their order, each once


def remark(sentence: str) -> None:
    remarks[sentence] = None
