"""The README's examples run as they stand."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_readme_has_an_example_for_each_family():
    assert len(EXAMPLES) == 9


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number):
    text, names = EXAMPLES[number], {}
    exec("import torch, fastda\nfrom torch import nn\n" + text, names)
    if "evaluate(" in text or "fastda.sklearn" in text:
        assert names["accuracy"] > 0.9
    elif "fastda.shift" in text:
        assert names["report"].kinds == ("covariate",) and names["method"] == "coral"
    elif "layerwise_lr_decay" in text:
        assert min(group["lr"] for group in names["optimizer"].param_groups) == pytest.approx(0.0000625)
        assert {n.partition(".")[0] for n, p in names["model"].named_parameters() if p.grad is not None} == {"3", "4"}
    else:
        leaves = [x.grad for x in names.values() if getattr(x, "is_leaf", False) and x.requires_grad]
        results = leaves if "backward()" in text else [names["distance"]]
        if "evaluate_episodes" in text:
            assert names["accuracy"].mean > 0.8 and len(names["answers"]) == 800
            results = [x.grad for key in ("network", "maml") for x in names[key].parameters()]
        assert results and all(result.isfinite().all() and result.abs().sum() > 0 for result in results)
