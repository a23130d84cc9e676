"""The decision table, the scenario table, where they disagree, and code that runs."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastda
from fastda.shift import SCENARIOS, recommend
from fastda.shift.advice import ORDER, TITLES
from fastda.shift.recipes import EVIDENCE, RECIPES, TEXT_RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_is_at_the_front_door():
    assert fastda.recommend is recommend
    with pytest.raises(AttributeError, match="module 'fastda' has no attribute 'recomend'"):
        fastda.recomend  # noqa: B018


@pytest.mark.parametrize(
    ("a_class", "domains", "method"),
    [
        (1, "similar", "few-shot"),
        (10, "different", "few-shot"),
        (50, "similar", "feature-extraction"),
        (99, "similar", "feature-extraction"),
        (50, "different", "coral+finetune"),
        (100, "similar", "top-layers"),
        (1000, "different", "top-layers"),
        (1001, "similar", "finetune"),
        (5000, "different", "finetune"),
    ],
)
def test_by_labels_a_class(a_class, domains, method):
    """Where the rule by labels in all says something simpler or else, both are named."""
    found = recommend(10 * a_class, 5000, num_classes=10, domains=domains)
    assert method in [found.method, *([found.next_step.method] if found.disagreement else [])]
    assert (found.method != method) <= bool(found.disagreement)


def test_none_labelled_but_many_unlabelled():
    found = recommend(0, 5000)
    assert (found.method, found.gain) == ("coral", "variable")
    assert [step.method for step in found.steps] == ["source-only", "coral"] and found.next_step.method == "dann"
    assert recommend(0, 0).method == "source-only"
    assert recommend(0, 5000, same_task=False).method == "source-only"


@pytest.mark.parametrize(
    ("scenario", "labelled", "num_classes", "method", "gain"),
    [
        ("photos -> product photos", 8000, 5, "finetune", "high"),
        ("photos -> X-rays", 100, 2, "feature-extraction", "moderate"),
        ("photos -> X-rays", 500, 14, "feature-extraction", "moderate"),
        ("photos -> satellite images", 1000, 10, "top-layers", "moderate to high"),
        ("photos -> satellite images", 5000, 10, "top-layers", "moderate to high"),
        ("English -> French text", 12_000, 2, "finetune", "high"),
        ("hospital A -> hospital B", 50, 2, "coral+finetune", "moderate"),
        ("hospital A -> hospital B", 200, 3, "coral+finetune", "moderate"),
        ("photos -> paintings", 0, 7, "coral", "variable"),
    ],
)
def test_the_scenario_table(scenario, labelled, num_classes, method, gain):
    found = recommend(labelled, 5000, num_classes=num_classes, scenario=scenario)
    assert (found.method, found.gain, found.disagreement) == (method, gain, "")
    row = next(row for row in SCENARIOS if row.name == scenario)
    assert (row.method, row.gain) == (method, gain) and row.least <= labelled <= row.most


@pytest.mark.parametrize("row", SCENARIOS, ids=lambda row: row.name)
def test_each_row_holds_from_end_to_end_of_its_range(row):
    """By labels in all alone: how many classes there are is not known."""
    for labelled in (row.least, min(row.most, 10 * row.least + 1)):
        found = recommend(labelled, 5000, scenario=row.name)
        assert (found.method, found.gain) == (row.method, row.gain)


@pytest.mark.parametrize(
    ("labelled", "num_classes", "scenario", "first", "other"),
    [
        (300, 2, "photos -> X-rays", "feature-extraction", "top-layers"),
        (8000, 200, "photos -> product photos", "feature-extraction", "finetune"),
        (150, 15, "hospital A -> hospital B", "few-shot", "coral+finetune"),
    ],
)
def test_where_the_rules_disagree_the_simpler_goes_first(labelled, num_classes, scenario, first, other):
    found = recommend(labelled, 1000, num_classes=num_classes, scenario=scenario)
    assert (found.method, found.next_step.method) == (first, other)
    assert TITLES[first] in found.disagreement and TITLES[other] in found.disagreement
    assert "the two rules disagree" in str(found)


@pytest.mark.parametrize("labelled", [0, 7, 60, 300, 2000, 50_000])
@pytest.mark.parametrize("num_classes", [None, 2, 30])
@pytest.mark.parametrize("kinds", [None, (), ("covariate",), ("label",), ("concept",), ("covariate", "label")])
@pytest.mark.parametrize("domains", ["similar", 1.8])
def test_the_simplest_is_always_first(labelled, num_classes, kinds, domains):
    found = recommend(labelled, 100, num_classes=num_classes, domains=domains, shift=kinds)
    places = [ORDER.index(step.method) for step in found.steps]
    assert places == sorted(set(places)) and found.steps[-1].method == found.method
    assert found.steps[0].method in ("source-only", "none")
    assert found.reason and found.title and found.gain and found.code == RECIPES[found.method]
    assert found.evidence == EVIDENCE.get(found.method, "")


def test_what_a_diagnosis_found_comes_first():
    assert recommend(500, 500, num_classes=2, shift=()).method == "none"
    assert recommend(0, 500, shift=("label",)).method == "reweight"
    concept = recommend(100, 500, num_classes=2, domains="different", shift=("concept",))
    assert concept.method == "feature-extraction" and "no alignment of inputs helps" in concept.reason
    assert recommend(0, 500, shift=("concept",)).method == "source-only"
    both = recommend(0, 500, shift=("covariate", "label"))
    assert [step.method for step in both.steps] == ["source-only", "reweight", "coral"]
    assert "sample the source by the class weights" in both.reason
    blind = SimpleNamespace(kinds=("covariate",), coral_is_blind=True)
    assert recommend(0, 500, shift=blind).method == "dann"


def test_advice_against_overfitting_with_few_labels():
    few = recommend(300, num_classes=5, domains="similar")
    words = "".join(few.overfitting)
    assert all(word in words for word in ("early stopping", "dropout", "weight decay", "augmentation"))
    assert recommend(50_000, num_classes=10).overfitting == ()
    assert recommend(0, 5000).overfitting == () and recommend(5, num_classes=5).overfitting == ()


def test_the_text_has_all_of_it():
    found = recommend(120, 5000, num_classes=2, domains="different")
    text = str(found)
    for part in (found.title, found.reason, found.gain, found.evidence, found.code, *found.overfitting):
        assert part in text
    assert found.to_dict()["steps"][0]["method"] == "source-only"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1,), {}, ValueError, "labelled: expected at least 0, got -1"),
        ((1.5,), {}, TypeError, "labelled: expected an int"),
        ((), {"domains": "far"}, ValueError, "domains: expected one of 'similar', 'different'"),
        ((), {"domains": 3}, ValueError, "domains: expected a number >= 0 and <= 2"),
        ((), {"modality": "sound"}, ValueError, "modality: expected one of 'images', 'text', 'features'"),
        ((), {"scenario": "moon"}, ValueError, "scenario: expected one of 'photos -> product photos'"),
        ((), {"shift": "label"}, TypeError, r'shift: expected a ShiftReport or kinds such as \("label",\)'),
        ((), {"shift": ("labels",)}, ValueError, "shift: expected one of 'covariate', 'label', 'concept'"),
        ((5,), {"num_classes": 1}, ValueError, "num_classes: expected at least 2"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        recommend(*arguments, **options)


@pytest.fixture
def variables():
    """What the recipes name: a network, loaders, predictions."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.eye(3)[labels] * 2 + 0.3 * torch.randn(60, 3)
    probabilities = np.eye(3)[labels.numpy()]

    def loader(*tensors):
        return DataLoader(TensorDataset(*tensors), batch_size=20)

    encoder, classifier = nn.Sequential(nn.Linear(3, 8), nn.ReLU()), nn.Linear(8, 3)
    return {
        "feature_extractor": encoder,
        "label_predictor": classifier,
        "model": nn.Sequential(OrderedDict(encoder=encoder, classifier=classifier)),
        "source": loader(inputs, labels),
        "target": loader(inputs * 1.5, torch.where(labels == 0, labels, -1)),
        "labelled_target": loader(inputs * 1.5, labels),
        "source_labels": labels,
        "source_probabilities": probabilities,
        "target_probabilities": probabilities,
    }


@pytest.mark.parametrize(
    ("method", "code"), [*RECIPES.items(), *((f"text, {key}", value) for key, value in TEXT_RECIPES.items())]
)
def test_the_code_runs(method, code, variables, monkeypatch):
    """As it stands, but for the number of epochs."""
    import fastda.training

    whole = fastda.training.fit
    monkeypatch.setattr(fastda.training, "fit", lambda *a, **k: whole(*a, **k | {"epochs": 2, "progress": False}))
    parameters = dict(variables["model"].named_parameters())  # held here: a method may take the model apart
    before = {name: p.clone() for name, p in parameters.items()}
    names = dict(variables)
    exec(code, names)
    changed = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    trained = {"feature-extraction": {"classifier"}, "top-layers": {"encoder", "classifier"}}
    trained |= dict.fromkeys(
        ("coral", "dann", "coral+finetune", "dann+finetune", "finetune"), {"encoder", "classifier"}
    )
    if method.startswith("text"):
        method = "finetune"
    assert {name.partition(".")[0] for name in changed} == trained.get(method, set())
    if method == "few-shot":
        assert len(names["predictions"]) == 60
    if method == "reweight":
        assert names["probabilities"].shape == (60, 3)


def test_every_method_has_code_and_a_title():
    assert set(RECIPES) == set(TITLES)
    assert set(EVIDENCE) < set(TITLES)
