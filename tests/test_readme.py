"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_an_example_for_each_family():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    names = {}
    exec("import torch, fastda\n" + EXAMPLES[number], names)
    gradients = [value.grad for value in names.values() if getattr(value, "is_leaf", False) and value.requires_grad]
    assert gradients and all(gradient.isfinite().all() and gradient.abs().sum() > 0 for gradient in gradients)
