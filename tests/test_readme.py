"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_an_example_for_each_family():
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    names = {}
    exec("import torch, fastda\n" + EXAMPLES[number], names)
    if "backward()" in EXAMPLES[number]:
        results = [x.grad for x in names.values() if getattr(x, "is_leaf", False) and x.requires_grad]
    else:
        results = [names["distance"]]
    assert results and all(result.isfinite().all() and result.abs().sum() > 0 for result in results)
