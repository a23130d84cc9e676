"""The demo: its data, its training with either backend, and the command end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastda
from fastda import cli
from fastda.demo import data as demo_data
from fastda.demo import figure as demo_figure
from fastda.demo import report as demo_report
from fastda.demo.data import Phone, make_domains, photograph, studio_digits
from fastda.demo.report import Report, Result, StepTime
from fastda.demo.train import METHODS, dann, deep_coral, predict, source_only, train

pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ("source_train", "source_test", "target_train", "target_test")


@pytest.fixture(scope="module")
def domains():
    return make_domains(0)


# Data


def test_photographs_of_one_seed_are_the_same():
    images, _ = studio_digits()
    first = photograph(images[:50], seed=3)
    assert np.array_equal(first, photograph(images[:50], seed=3))
    assert not np.array_equal(first, photograph(images[:50], seed=4))


def test_domains_of_one_seed_are_the_same(domains):
    again = make_domains(0)
    assert all(torch.equal(getattr(domains, part).images, getattr(again, part).images) for part in PARTS)
    assert not torch.equal(domains.target_test.images, make_domains(1).target_test.images)


def test_images_have_the_documented_shape_type_and_range(domains):
    for part in PARTS:
        digits = getattr(domains, part)
        assert digits.images.shape == (len(digits), 1, demo_data.SIDE, demo_data.SIDE)
        assert digits.images.dtype == torch.float32
        assert digits.images.min() >= 0 and digits.images.max() <= 1
        assert digits.labels.dtype == torch.int64
        assert digits.labels.unique().tolist() == list(range(demo_data.NUM_CLASSES))
        assert torch.equal(digits.labels, torch.from_numpy(studio_digits()[1])[digits.index])


@pytest.mark.parametrize("development", [False, True])
def test_no_digit_is_in_two_parts(development):
    domains = make_domains(0, development=development)
    index = torch.cat([getattr(domains, part).index for part in PARTS])
    assert len(index.unique()) == len(index)


def test_tuning_never_sees_the_digits_that_are_reported_on(domains):
    reported = {*domains.source_test.index.tolist(), *domains.target_test.index.tolist()}
    for seed in (100, 101):
        development = make_domains(seed, development=True)
        assert all(reported.isdisjoint(getattr(development, part).index.tolist()) for part in PARTS)
        other = make_domains(seed)
        assert reported == {*other.source_test.index.tolist(), *other.target_test.index.tolist()}


def still(**ranges: tuple[float, float]) -> Phone:
    """A camera without any fault, but for those given."""
    perfect = {
        "blur": (1e-3, 1e-3),
        "exposure": (1.0, 1.0),
        "falloff": (0.0, 0.0),
        "contrast": (1.0, 1.0),
        "veil": (0.5, 0.5),
        "read_noise": (0.0, 0.0),
        "shot_noise": (0.0, 0.0),
    }
    assert set(perfect) == {field.name for field in dataclasses.fields(Phone)}
    return Phone(**{**perfect, **ranges})


def test_a_camera_without_faults_changes_nothing_but_the_last_bit_of_8():
    images, _ = studio_digits()
    assert np.abs(photograph(images, 0, still()) - images).max() <= 0.5 / 255 + 1e-12


def test_each_fault_does_what_its_documentation_says():
    white, half = np.ones((500, 16, 16)), np.tile(np.arange(16) < 8, (500, 16, 1)).astype(float)

    assert np.allclose(photograph(white, 0, still(blur=(1.0, 1.0))), 1)
    edge = photograph(half, 0, still(blur=(1.0, 1.0)))
    slope = -np.diff(edge[0, 0])  # the blur's own shape, a Gaussian of standard deviation 1 pixel
    centre = (slope * np.arange(15)).sum() / slope.sum()
    assert math.isclose((slope * (np.arange(15) - centre) ** 2).sum() / slope.sum(), 1.0, abs_tol=0.03)

    assert np.allclose(photograph(white, 0, still(exposure=(0.6, 0.6))), 0.6)
    lit = photograph(white, 0, still(falloff=(0.5, 0.5)))
    assert np.allclose(lit.max(axis=(1, 2)), 1, atol=0.003) and np.allclose(lit.min(axis=(1, 2)), 0.5, atol=0.003)
    faded = photograph(half, 0, still(contrast=(0.2, 0.2), veil=(0.4, 0.4)))
    assert np.allclose(faded.min(), 0.8 * 0.4, atol=0.003) and np.allclose(faded.max(), 0.2 + 0.8 * 0.4, atol=0.003)

    grey = still(exposure=(0.25, 0.25), read_noise=(0.03, 0.03))
    assert math.isclose(photograph(white, 0, grey).std(), 0.03, rel_tol=0.02)
    grey = still(exposure=(0.25, 0.25), shot_noise=(0.06, 0.06))
    assert math.isclose(photograph(white, 0, grey).std(), 0.06 * math.sqrt(0.25), rel_tol=0.02)


def test_each_photograph_draws_its_own_values():
    levels = photograph(np.ones((1000, 4, 4)), 0, still(exposure=(0.6, 1.0))).mean(axis=(1, 2))
    assert 0.6 - 0.003 <= levels.min() < 0.61 and 0.99 < levels.max() <= 1
    assert math.isclose(levels.mean(), 0.8, abs_tol=0.015)


def test_global_random_state_is_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    train(deep_coral, make_domains(0), seed=0, steps=2)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    assert before[2] == random.getstate()


# Training


def prototypical(network, batch):
    """Source features as one episode: all are support, half of them queries too, so that no query lacks its class."""
    features, labels = network.features(batch.source), batch.source_labels
    queries, query_labels = features[::2], labels[::2]
    temperature = float(features.shape[-1])
    loss = fastda.prototypical_loss(
        features, labels, queries, query_labels, demo_data.NUM_CLASSES, temperature=temperature
    )
    return {"label": F.cross_entropy(network.classifier(features), labels), "prototypes": loss}


def largest_difference(curves, other_curves) -> float:
    """Largest relative difference of two sets of loss curves, over all terms and steps."""
    assert curves.keys() == other_curves.keys()
    return max(((curves[term] - other_curves[term]).abs() / other_curves[term].abs()).max().item() for term in curves)


@pytest.mark.parametrize("method", [deep_coral, dann, prototypical], ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    ("dtype", "steps", "tolerance"),
    [(torch.float64, 60, 1e-10), (torch.float32, 30, 1e-5)],
    ids=["float64", "float32"],
)
def test_reference_and_fused_ops_give_the_same_loss_curve(method, dtype, steps, tolerance, domains):
    curves = {}
    for backend in ("reference", "auto"):
        with fastda.use_backend(backend):
            _, curves[backend] = train(method, domains, seed=0, dtype=dtype, steps=steps)
    assert all(curve.shape == (steps,) and curve.dtype == dtype for curve in curves["auto"].values())
    assert largest_difference(curves["auto"], curves["reference"]) <= tolerance


def test_a_slightly_wrong_gradient_would_change_the_loss_curve(domains):
    def slightly_wrong(network, batch):
        losses = deep_coral(network, batch)
        coral = losses["coral"]
        return {**losses, "coral": coral.detach() + (1 + 1e-6) * (coral - coral.detach())}

    _, right = train(deep_coral, domains, seed=0, dtype=torch.float64, steps=50)
    _, wrong = train(slightly_wrong, domains, seed=0, dtype=torch.float64, steps=50)
    assert largest_difference(wrong, right) > 1e-8


def test_the_same_seed_trains_the_same_network(domains):
    (first, _), (second, _), (other, _) = (train(dann, domains, seed, steps=5) for seed in (0, 0, 1))
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize("name", ["source-only", "Deep CORAL", "DANN"])
def test_target_labels_are_seen_by_the_upper_bound_alone(name, domains):
    target = dataclasses.replace(domains.target_train, labels=domains.target_train.labels.flip(0))
    shuffled = dataclasses.replace(domains, target_train=target)
    for method, same in ((name, True), ("upper bound", False)):
        (network, _), (blind, _) = (train(METHODS[method], data, seed=0, steps=3) for data in (domains, shuffled))
        assert same == all(torch.equal(a, b) for a, b in zip(network.parameters(), blind.parameters()))


def test_adaptation_raises_the_accuracy_on_held_out_phone_images():
    domains = make_domains(0, phone=Phone(contrast=(0.1, 0.25)))  # a stronger shift than the demo's

    def accuracies(method):
        network, _ = train(method, domains, seed=0, steps=200)
        parts = (domains.source_test, domains.target_test)
        return [(predict(network, part)[0] == part.labels).double().mean().item() for part in parts]

    studio, phone = accuracies(source_only)
    adapted_studio, adapted_phone = accuracies(deep_coral)
    assert studio > 0.9 and adapted_studio > 0.9
    assert phone < studio - 0.15
    assert adapted_phone > phone + 0.1


# Report and command


def test_share_of_the_gap_is_taken_seed_by_seed():
    accuracies = {"source-only": (0.6, 0.8), "Deep CORAL": (0.8, 0.8), "DANN": (0.5, 0.9), "upper bound": (1.0, 0.9)}
    results = [
        Result(method, seed, source_accuracy=1.0, target_accuracy=value, target_confidence=0.5, class_accuracy=[value])
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    report = Report(results, {method: StepTime(1.0, 1.0) for method in METHODS}, domains=None, networks={})
    assert report.recovered("Deep CORAL") == pytest.approx([0.5, 0.0])
    assert report.recovered("DANN") == pytest.approx([-0.25, 1.0])


def test_the_command_prints_the_table_and_writes_figure_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_report, "TIMED_STEPS", 6)
    monkeypatch.setattr(demo_figure, "TSNE_STEPS", 250)  # the fewest that t-SNE takes
    figure, numbers = tmp_path / "figure.png", tmp_path / "numbers.json"
    figure.write_bytes(b"an older figure")
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    assert cli.main(["demo", "--seeds", "1", "--steps", "5", "--figure", str(figure), "--json", str(numbers)]) == 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random_state)

    output = capsys.readouterr()
    assert "\x1b" not in output.out
    assert all(method in output.out for method in METHODS)
    assert "one seed, so no interval" in output.out
    assert "100%" in output.err and "timing, upper bound" in output.err

    content = json.loads(numbers.read_text())
    assert {result["method"] for result in content["results"]} == set(METHODS)
    assert content["seeds"] == [0] and content["steps"] == 5
    labels = make_domains(0).target_test.labels
    for result in content["results"]:
        per_class = torch.tensor(result["class_accuracy"])
        mean = (per_class * torch.bincount(labels)).sum() / len(labels)
        assert math.isclose(mean, result["target_accuracy"], abs_tol=1e-6)
    assert all(times["reference"] > 0 and times["fused"] > 0 for times in content["milliseconds_a_step"].values())

    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [figure, numbers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--steps", "-3"], "--steps: expected at least 1, got -3"),
        (["--figure", "no/such/folder/a.png"], "--figure: expected a file in a folder that exists"),
        (["--json", "."], "--json: expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
