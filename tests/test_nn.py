"""The layers: λ and its schedule, what is saved, the shapes of the domain classifier."""

from __future__ import annotations

import copy
import doctest
import io
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import fastda
from fastda.nn import DomainDiscriminator, GradientReversal
from fastda.schedules import dann_lambda, normalised_lambda, warm_start_lambda

pytestmark = pytest.mark.usefixtures("one_thread")


def factor(layer: torch.nn.Module) -> float:
    """What the layer multiplies a gradient with."""
    x = torch.ones(2, 3, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones(2, 3))
    assert gradient.unique().numel() == 1
    return gradient[0, 0].item()


@pytest.mark.parametrize("layer", fastda.nn.__all__)
def test_documentation_and_example(layer):
    module = getattr(fastda.nn, layer)
    parts = ("Args:", "Shape:", "Raises:", "Source:", "ifferentiable", "Example:")
    assert all(part in module.__doc__ for part in parts)
    (test,) = doctest.DocTestFinder(recurse=False).find(module, layer, globs={})
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0


def test_a_fixed_lambda():
    assert factor(GradientReversal()) == -1
    layer = GradientReversal(0.25)
    layer.step()
    assert factor(layer) == -0.25
    assert repr(layer) == "GradientReversal(lambd=0.25)"


def test_a_schedule_by_progress():
    layer = GradientReversal(by_progress=partial(dann_lambda, gamma=4.0), max_steps=8)
    for step in range(12):
        assert factor(layer) == pytest.approx(-dann_lambda(min(step / 8, 1.0), 4.0), abs=1e-6)
        layer.step()
    layer.step(progress=0.5)
    assert factor(layer) == pytest.approx(-dann_lambda(0.5, 4.0))


@pytest.mark.parametrize("schedule", [warm_start_lambda, partial(normalised_lambda, max_steps=5, lambda_max=0.3)])
def test_a_schedule_by_step(schedule):
    layer = GradientReversal(by_step=schedule)
    for step in range(7):
        assert factor(layer) == pytest.approx(-schedule(step), abs=1e-7)
        layer.step()


def test_only_step_advances():
    layer = GradientReversal(by_step=warm_start_lambda)
    layer.step()
    before = factor(layer)
    for training in (True, False):
        layer.train(training)
        with torch.set_grad_enabled(training):
            for _ in range(3):
                layer(torch.ones(2, 3))
    assert factor(layer) == before and layer.steps == 1


def test_lambda_and_steps_are_saved_and_restored():
    first, second = (GradientReversal(by_step=warm_start_lambda) for _ in range(2))
    for _ in range(5):
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    third = copy.deepcopy(first)
    for layer in (first, second, third):
        assert factor(layer) == pytest.approx(-warm_start_lambda(5))
        layer.step()
        assert factor(layer) == pytest.approx(-warm_start_lambda(6))
    assert set(first.state_dict()) == {"lambd", "steps"}


def test_on_the_meta_device():
    with torch.device("meta"):
        layer = GradientReversal(by_step=warm_start_lambda)
    assert repr(layer).startswith("GradientReversal(lambd=meta, by_step=warm_start_lambda")
    trained = GradientReversal(by_step=warm_start_lambda)
    trained.step()
    layer.load_state_dict(trained.state_dict(), assign=True)
    layer.step()
    assert factor(layer) == pytest.approx(-warm_start_lambda(2))


def test_a_step_between_forward_and_backward_does_not_reach_backward():
    layer = GradientReversal(by_step=warm_start_lambda)
    layer.step()
    x = torch.ones(2, requires_grad=True)
    y = layer(x)
    layer.step()
    assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full((2,), -warm_start_lambda(1)))


def test_steps_never_recompile():
    torch.compiler.reset()
    layer, counter = GradientReversal(by_progress=dann_lambda, max_steps=10), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(5):
        x = torch.ones(2, requires_grad=True)
        assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.full((2,), -dann_lambda(step / 10)))
        layer.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"lambd": float("nan")}, ValueError, "^lambd: expected a number finite, got nan"),
        ({"lambd": "1"}, TypeError, "^lambd: expected a number"),
        ({"lambd": 1.0, "by_step": warm_start_lambda}, ValueError, "^by_step: expected .* got lambd and by_step"),
        ({"by_step": warm_start_lambda, "by_progress": dann_lambda}, ValueError, "^by_step: expected either"),
        ({"by_progress": dann_lambda, "max_steps": 0}, ValueError, "^max_steps: expected at least 1, got 0"),
        ({"by_step": lambda step: torch.inf}, ValueError, "^lambd: expected a number finite, got inf"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GradientReversal(**arguments)


def test_a_step_without_its_progress():
    with pytest.raises(ValueError, match="^progress: expected a share of training .* got None; .*max_steps"):
        GradientReversal(by_progress=dann_lambda).step()
    with pytest.raises(ValueError, match="^progress: expected None without a schedule by_progress, got 0.5"):
        GradientReversal(0.5).step(progress=0.5)


@pytest.mark.parametrize("normalisation", ["none", "batch", "layer"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("num_layers", [2, 3])
def test_discriminator(num_layers, dropout, normalisation):
    torch.manual_seed(0)
    options = {"num_layers": num_layers, "dropout": dropout, "normalisation": normalisation}
    discriminator = DomainDiscriminator(6, 8, **options)
    x = torch.randn(5, 6, requires_grad=True)
    assert discriminator(x).shape == (5, 1)
    linear = [layer for layer in discriminator if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [8] * (num_layers - 1) + [1]
    assert any(isinstance(layer, torch.nn.Dropout) for layer in discriminator) == (dropout > 0)
    discriminator.eval()
    features, logits = discriminator.fork(x, lambd=0.3)
    assert torch.equal(features, x)
    assert_close(logits, discriminator(x))
    inputs, incoming = (x, *discriminator.parameters()), torch.randn(5, 1)
    got = torch.autograd.grad(logits, inputs, incoming)
    plain = torch.autograd.grad(discriminator(fastda.reference.gradient_reversal(x, 0.3)), inputs, incoming)
    assert_close(got, plain)


@pytest.mark.parametrize("change", ["hook", "parametrisation", "another layer"])
def test_the_first_layer_of_a_fork_may_compute_more_than_its_weight_says(change):
    discriminator = DomainDiscriminator(6, 8, dropout=0.0).eval()
    first = discriminator[0]
    if change == "hook":
        torch.nn.utils.spectral_norm(first)
    elif change == "parametrisation":
        torch.nn.utils.parametrizations.spectral_norm(first)
    else:
        discriminator[0] = torch.nn.Sequential(first, torch.nn.Tanh())
    x, incoming = torch.randn(5, 6, requires_grad=True), torch.randn(5, 1)
    inputs = (x, *discriminator.parameters())
    got = torch.autograd.grad(discriminator.fork(x, 0.3)[1], inputs, incoming)
    assert_close(got, torch.autograd.grad(discriminator(fastda.reference.gradient_reversal(x, 0.3)), inputs, incoming))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"in_features": 0}, ValueError, "^in_features: expected at least 1"),
        ({"hidden_features": 2.0}, TypeError, "^hidden_features: expected an int"),
        ({"num_layers": 1}, ValueError, "^num_layers: expected at least 2"),
        ({"num_layers": 4}, ValueError, "^num_layers: expected 2 or 3, got 4"),
        ({"dropout": 1.0}, ValueError, "^dropout: expected a probability below 1, got 1.0"),
        ({"dropout": -0.1}, ValueError, "^dropout: expected a number >= 0"),
        ({"normalisation": "instance"}, ValueError, "^normalisation: expected one of 'none', 'batch', 'layer', got"),
    ],
)
def test_bad_discriminators(arguments, error, message):
    with pytest.raises(error, match=message):
        DomainDiscriminator(**{"in_features": 4, **arguments})


def test_adversarial_training_adapts():
    """Two features tell the classes apart, one of which moves with the domain: without reversal it misleads."""
    accuracy = {}
    for lambd in (0.0, 1.0):
        torch.manual_seed(0)
        labels = torch.randint(0, 2, (256,))
        signs = 2.0 * labels.unsqueeze(1) - 1
        source, target = (signs + torch.randn(256, 2) * torch.tensor([0.5, 0.3]) for _ in range(2))
        target = target + torch.tensor([0.0, 3.0])
        extractor, head = torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)
        discriminator = DomainDiscriminator(4, 32, num_layers=2, dropout=0.0)
        modules = torch.nn.ModuleList([extractor, head, discriminator])
        optimiser = torch.optim.Adam(modules.parameters(), lr=0.01)
        for _ in range(300):
            features, logits = discriminator.fork(extractor(torch.cat([source, target])), lambd)
            loss = torch.nn.functional.cross_entropy(head(features[:256]), labels)
            loss = loss + fastda.domain_adversarial_loss(logits[:256], logits[256:])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        accuracy[lambd] = (head(extractor(target)).argmax(1) == labels).float().mean().item()
    assert accuracy[0.0] < 0.75 and accuracy[1.0] > 0.85, accuracy
