"""The sinusoid experiment and its command."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastda import cli
from fastda.fewshot import sinusoid
from fastda.fewshot.sinusoid import draw_new_tasks, draw_tasks, make_network, task_errors, train
from fastda.intervals import interval

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tasks_are_the_papers():
    tasks = draw_tasks(20_000, 5, torch.Generator().manual_seed(0))
    assert tasks.support.shape == tasks.query_labels.shape == (20_000, 5, 1)
    x, y = torch.cat([tasks.support, tasks.queries], 1), torch.cat([tasks.support_labels, tasks.query_labels], 1)
    assert -5 <= x.min() < -4.99 and 4.99 < x.max() <= 5
    assert 4.9 < y.abs().max() <= 5
    design = torch.cat([x.sin(), x.cos()], -1).double()
    a, b = torch.linalg.lstsq(design, y.double()).solution.squeeze(-1).T
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    assert 0.1 <= amplitude.min() < 0.12 and amplitude.max() <= 5.001
    assert phase.min() > -1e-2 and phase.max() < math.pi + 1e-2
    assert amplitude.mean() == pytest.approx(2.55, abs=0.05) and phase.mean() == pytest.approx(math.pi / 2, abs=0.05)


def test_test_curves_are_not_training_curves_and_come_back():
    one, same, other = draw_new_tasks(5, 0), draw_new_tasks(5, 0), draw_new_tasks(5, 1)
    assert torch.equal(one.query_values, same.query_values) and not torch.equal(one.query_values, other.query_values)
    assert not torch.equal(one.support[:25], draw_tasks(25, 5, torch.Generator().manual_seed(0)).support)


def test_initial_weights_are_small_and_the_seeds():
    before = torch.get_rng_state()
    network = make_network(0)
    assert torch.equal(before, torch.get_rng_state())
    assert 0 < network[2].weight.abs().max() <= 0.02 and network[2].bias.abs().max() == 0
    assert torch.equal(network[0].weight, make_network(0)[0].weight)
    assert not torch.equal(network[0].weight, make_network(1)[0].weight)


def test_one_step_after_maml_soon_beats_pretraining():
    """After 1500 iterations, K = 10: 1.5 against 3.1."""
    maml, pretrained = (train(method, shots=10, iterations=1500) for method in ("MAML", "pretraining"))
    tasks = draw_new_tasks(10, 0)
    (error, half), (other, other_half) = (interval(task_errors(x, tasks, 1)) for x in (maml, pretrained))
    assert error + half < other - other_half


@pytest.mark.slow
def test_one_step_after_maml_beats_pretraining_by_a_factor_of_two():
    """3000 iterations, K = 10; the compiled step is the one trained with."""
    maml, pretrained = (
        train(method, shots=10, iterations=3000, compile=method == "MAML") for method in ("MAML", "pretraining")
    )
    tasks = draw_new_tasks(10, 0)
    (error, half), (other, other_half) = (interval(task_errors(x, tasks, 1)) for x in (maml, pretrained))
    assert error < other / 2
    assert error + half < other - other_half
    eager = sinusoid.MAML(maml.network, sinusoid.mse_loss)
    batch = draw_tasks(25, 10, torch.Generator().manual_seed(1))
    parameters = list(maml.parameters())
    got, expected = (torch.autograd.grad(learner(*batch), parameters) for learner in (maml, eager))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_papers_error_is_reached():
    """All 70 000 iterations, K = 5, one step: 0.67 in the paper, 0.718 ± 0.063 in an independent run."""
    maml = train("MAML", shots=5, compile=True)
    error, _ = interval(task_errors(maml, draw_new_tasks(5, 0), 1))
    assert error < 0.718 + 0.063


def test_the_command_prints_the_table_and_writes_figure_and_json(tmp_path, capsys):
    figure, numbers = tmp_path / "figure.png", tmp_path / "numbers.json"
    random_state = torch.get_rng_state()
    options = ["--shots", "3", "--iterations", "4", "--no-compile", "--figure", str(figure), "--json", str(numbers)]
    assert cli.main(["sinusoid", *options]) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    output = capsys.readouterr()
    assert "\x1b" not in output.out
    assert all(method in output.out for method in sinusoid.METHODS)
    assert "on 600 new curves from 3 points" in output.out
    assert "12/12" in output.err and "pretraining" in output.err  # the progress bar
    content = json.loads(numbers.read_text())
    assert content["steps"] == list(range(11)) and content["errors"].keys() == set(sinusoid.METHODS)
    for error in content["errors"].values():
        assert {len(values) for values in error.values()} == {11} and min(error["median"]) > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [figure, numbers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shots", "0"], "--shots: expected at least 1, got 0"),
        (["--iterations", "-3"], "--iterations: expected at least 1, got -3"),
        (["--figure", "no/such/folder/a.png"], "--figure: expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sinusoid", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
