"""What the public modules beside the ops offer: documented, with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")

MODULES = ("adapting", "methods", "training", "finetuning", "fewshot", "shift", "sklearn", "patching", "data_files")
PUBLIC = [
    pytest.param(getattr(importlib.import_module(f"fastda.{module}"), name), id=f"{module}.{name}")
    for module in MODULES
    for name in importlib.import_module(f"fastda.{module}").__all__
]
CALLABLES = [
    parameter for parameter in PUBLIC if inspect.isclass(parameter.values[0]) or inspect.isfunction(parameter.values[0])
]
# What a method's example shows, or what comes out of a function whose example shows it.
RESULTS = {
    *("AdaptedModel", "Adaptation", "Report"),
    *("Passed", "Layer", "Evaluation", "Fit", "Episode", "EpisodeAccuracy"),
    *("MMD", "CORALDistance", "ConceptDrift", "Confidence", "FeatureTests", "LabelShift", "ProxyADistance"),
    *("Recommendation", "Scenario", "ShiftReport", "Step", "Test", "Samples"),
}
WITHOUT_EXAMPLE = {"Term", "CORALTerm", "DomainAdversarialTerm", "predict", *RESULTS}


@pytest.mark.parametrize("thing", CALLABLES)
def test_documented(thing):
    """Each argument is described, but for those that are another's and said to be so."""
    text = inspect.getdoc(thing)
    assert len(text) > 40
    if thing.__name__ in RESULTS:
        return
    for name, parameter in inspect.signature(thing).parameters.items():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            assert name in text.partition("Args:")[2], f"{name} is not described"


@pytest.mark.parametrize("thing", CALLABLES)
def test_examples_run(thing):
    tests = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs={})
    assert bool(sum(len(test.examples) for test in tests)) != (thing.__name__ in WITHOUT_EXAMPLE)
    for test in tests:
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.failed == 0
