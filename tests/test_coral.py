"""CORAL: worked examples, what peers compute, edge cases, invariances, accuracy where domains nearly agree."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import Draw, Sizes, each_module
from tolerance import assert_as_accurate_as_reference
from torch.testing import assert_close

import fastda
import fastda.reference
from fastda.benchmarks.memory import memory

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")


def domains(samples=10, others=8, features=5, seed=0, dtype=torch.float64):
    draw = Draw(Sizes(samples=samples, others=others, features=features), dtype, seed)
    return draw.samples(samples), draw.samples(others, mean=0.5, deviation=1.5)


pairs = st.builds(domains, *(st.integers(2, 40), st.integers(2, 40), st.integers(1, 30), st.integers(0, 2**16)))


def samples_of_covariance(covariance: list[list[float]]) -> torch.Tensor:
    """Four samples that have exactly this unbiased covariance."""
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64) * 0.75**0.5
    return x @ torch.linalg.cholesky(torch.tensor(covariance, dtype=torch.float64)).mT


@each_module
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_worked_example(module, dtype):
    """Cs − Ct is all ones: squared norm 4, loss 4 / (4·2²)."""
    source, target = samples_of_covariance([[2, 1], [1, 3]]), samples_of_covariance([[1, 0], [0, 2]])
    source, target = source.to(dtype), target.to(dtype)
    assert_close(module.coral_loss(source, target), torch.tensor(0.25, dtype=dtype))
    assert_close(module.coral_loss(source, target, scale="mean"), torch.tensor(1.0, dtype=dtype))
    assert_close(module.coral_loss(source, target, scale="sum"), torch.tensor(4.0, dtype=dtype))


@each_module
@given(pair=pairs)
def test_what_peers_compute(module, pair):
    """pytorch-adapt, skada and adapt: "paper". TLlib and DomainBed: 1/d² and the mean squared difference of means."""
    source, target = pair
    difference = torch.atleast_2d(torch.cov(source.T)) - torch.atleast_2d(torch.cov(target.T))
    assert_close(module.coral_loss(source, target), difference.square().sum() / (4 * source.shape[1] ** 2))
    tllib = difference.square().mean() + (source.mean(0) - target.mean(0)).square().mean()
    assert_close(module.coral_loss(source, target, scale="mean", mean_weight=1.0), tllib)


@each_module
@given(pair=pairs, seed=st.integers(0, 2**16))
def test_invariances(module, pair, seed):
    source, target = pair
    loss = module.coral_loss(source, target)
    assert_close(module.coral_loss(target, source), loss)
    assert_close(module.coral_loss(source + 10, target - 3), loss)
    assert_close(module.coral_loss(source.flip(0), target.roll(1, 0)), loss)
    assert_close(module.coral_loss(2 * source, 2 * target), 16 * loss)
    rotation = torch.linalg.qr(Draw(dtype=torch.float64, seed=seed).normal(source.shape[1], source.shape[1])).Q
    assert_close(module.coral_loss(source @ rotation, target @ rotation), loss)


@each_module
@pytest.mark.parametrize("samples, features", [(6, 50), (50, 6), (300, 64)])
def test_never_negative(module, samples, features):
    for seed in range(20):
        source, _ = domains(samples, 2, features, seed, torch.float32)
        close = source + 1e-4 * torch.randn(source.shape, generator=torch.Generator().manual_seed(seed))
        for target in (source.flip(0), source + 1, close):
            assert module.coral_loss(source, target) >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples, features", [(6, 50), (50, 6), (300, 64), (193, 193), (40, 700)])
@pytest.mark.parametrize("layers", [False, True], ids=["one", "layers"])
def test_identical_domains_give_exactly_zero(samples, features, dtype, layers):
    source = domains(samples, 2, features, dtype=dtype)[0].requires_grad_()
    target = source.detach().clone().requires_grad_()
    loss = fastda.deep_coral_loss([source], [target]) if layers else fastda.coral_loss(source, target)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, (source, target)):
        assert (gradient == 0).all()


@pytest.mark.compiled_core
@pytest.mark.parametrize("samples, features", [(40, 700), (32, 256), (64, 1500), (200, 64), (400, 128), (300, 300)])
@pytest.mark.parametrize("noise", [0.3, 0.2, 1e-1, 1e-2, 1e-3, 1e-4])
def test_domains_that_nearly_agree(samples, features, noise):
    """What cancels in ‖Cs − Ct‖² is taken in float64: the relative error stays below 1e-6."""
    source, _ = domains(samples, 2, features, dtype=torch.float32)
    target = source + noise * domains(samples, 2, features, seed=1, dtype=torch.float32)[0]
    source.requires_grad_(), target.requires_grad_()
    truth = fastda.reference.coral_loss(source.double(), target.double())
    loss = fastda.coral_loss(source, target)
    assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, (source, target)), torch.autograd.grad(truth, (source, target))):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.compiled_core
def test_few_wide_float64_samples_that_nearly_agree_take_no_matrix_of_features():
    generator = torch.Generator().manual_seed(0)
    source, difference = torch.randn(2, 8, 20_000, dtype=torch.float64, generator=generator)
    target = source + 1e-3 * difference
    with torch.profiler.profile(profile_memory=True) as profile:
        fastda.coral_loss(source, target)
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 20 * source.nbytes


@pytest.mark.parametrize("samples, features", [(32, 512), (60, 20)])
def test_features_whose_squares_overflow(samples, features):
    """Inf, as in the reference, not the NaN of Inf − Inf; NaN stays NaN."""
    source, target = domains(samples, samples, features, dtype=torch.float32)
    for scale in (1e12, 1e15, 1e18):
        got, expected = (module.coral_loss(scale * source, scale * target) for module in (fastda, fastda.reference))
        assert_close(got, expected)
    source[0, 0] = torch.nan
    assert fastda.coral_loss(source, target).isnan()


@each_module
def test_half_precision_does_not_overflow(module):
    """Activations of deviation 20 overflow float16 products."""
    draw = Draw(Sizes(features=64), torch.float16)
    source, target = draw.samples(256, deviation=20.0), draw.samples(200, deviation=20.0)
    source.requires_grad_()
    loss = module.coral_loss(source, target)
    assert loss.dtype == torch.float32
    assert_close(loss, module.coral_loss(source.float(), target.float()))
    (gradient,) = torch.autograd.grad(loss, source)
    assert gradient.dtype == torch.float16 and gradient.isfinite().all()


@each_module
def test_edge_cases(module):
    empty, ones = torch.empty(4, 0), torch.ones(1, 3)
    assert module.coral_loss(empty, empty) == 0
    assert module.coral_loss(ones, ones, correction=0, mean_weight=1.0) == 0
    assert module.coral_loss(torch.ones(0, 4, 3), torch.ones(0, 5, 3), reduction="none").shape == (0,)
    assert module.coral_loss(torch.ones(0, 4, 3), torch.ones(0, 5, 3)).isnan()
    assert module.coral_loss(torch.ones(0, 4, 3), torch.ones(0, 5, 3), reduction="sum") == 0


@each_module
@pytest.mark.parametrize("name", ["source", "target"])
@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples(module, name, count):
    arguments = {"source": torch.ones(4, 3), "target": torch.ones(4, 3), name: torch.ones(count, 3)}
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 2 samples \(correction \+ 1\), got {count};"):
        module.coral_loss(**arguments)


@each_module
def test_blind_spot(module):
    """Equal covariances with other higher moments give 0."""
    signs = torch.tensor([[1.0], [-1.0]]).repeat(8, 1)
    rare = torch.tensor([[2.0], [-2.0]] + [[0.0]] * 6).repeat(2, 1)  # the same variance, another kurtosis
    assert_close(module.coral_loss(signs, rare), torch.tensor(0.0))


@each_module
def test_layers_are_weighted_and_summed(module):
    (a, b), (c, d) = domains(features=5), domains(features=3)
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    total = module.deep_coral_loss([a, c], [b, d], weights=[2.0, weight], scale="mean", mean_weight=0.3)
    first, second = (module.coral_loss(x, y, scale="mean", mean_weight=0.3) for x, y in ((a, b), (c, d)))
    assert_close(total, 2 * first + 0.5 * second)
    assert_close(torch.autograd.grad(total, weight)[0], second)
    assert_close(module.deep_coral_loss([a], [b]), module.coral_loss(a, b))


@pytest.mark.compiled_core
def test_a_single_layer_is_not_copied():
    source, target = (x.float() for x in domains(2000, 1500, 32))
    used = memory(lambda source, target: fastda.deep_coral_loss([source], [target]), (source, target), "cpu")
    assert used["extra"] < source.nbytes / 2


@each_module
@pytest.mark.parametrize("sequence", [list, tuple, torch.tensor, numpy.array])
def test_weights_of_layers_as_any_sequence(module, sequence):
    (a, b), (c, d) = domains(features=5), domains(features=3)
    loss = module.deep_coral_loss([a, c], [b, d], weights=sequence([1.5, -0.5]))
    assert_close(loss, 1.5 * module.coral_loss(a, b) - 0.5 * module.coral_loss(c, d))


@pytest.mark.compiled_core
def test_detached_layers_take_no_work():
    """The op is told which domain needs a gradient: nothing is left allocated for the other."""
    (a, b), (c, d) = domains(64, 64, 500, dtype=torch.float32), domains(64, 64, 300, dtype=torch.float32)
    a.requires_grad_(), c.requires_grad_()
    loss = fastda.deep_coral_loss([a, c], [b, d])
    with torch.profiler.profile(profile_memory=True) as profile:
        gradients = torch.autograd.grad(loss, (a, c))
    (call,) = (event for event in profile.events() if event.name == "fastda::coral_layers_backward")
    assert call.cpu_memory_usage < 1.1 * (a.nbytes + c.nbytes)
    for gradient, (source, target) in zip(gradients, ((a, b), (c, d))):
        (expected,) = torch.autograd.grad(fastda.reference.coral_loss(source, target), source)
        assert_close(gradient, expected)


@given(pair=pairs)
def test_options_do_not_change_the_accuracy(pair):
    source, target = (x.float() for x in pair)
    for options in ({"mean_weight": 2.5, "scale": "mean"}, {"correction": 0, "scale": "sum"}):
        arguments = {"source": source, "target": target, **options}
        assert_as_accurate_as_reference(fastda.coral_loss, fastda.reference.coral_loss, arguments)


@each_module
@pytest.mark.parametrize("samples, features", [(32, 256), (20, 130), (40, 30)])
@pytest.mark.parametrize("noise", [1e-3, 1e-6, 1e-8])
def test_float64_domains_that_nearly_agree(module, samples, features, noise):
    """Truth from Cs − Ct = UᵀV + VᵀU with U = Xs − Xt and V = (Xs + Xt)/2, centred, which does not cancel."""
    generator = torch.Generator().manual_seed(0)
    source, difference = torch.randn(2, samples, features, dtype=torch.float64, generator=generator)
    target = source + noise * difference
    u, v = source - target, (source + target) / 2
    u, v = u - u.mean(0), v - v.mean(0)
    truth = (u.T @ v + v.T @ u).div(samples - 1).square().sum() / (4 * features**2)
    assert_close(module.coral_loss(source, target), truth, rtol=1e-5, atol=0)


@pytest.mark.compiled_core
def test_difference_of_means_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    source = 1000 + torch.randn(32, 256, generator=generator)
    target = source + 1e-3 * torch.randn(32, 256, generator=generator)
    got = fastda.coral_loss(source, target, mean_weight=1.0)
    truth = fastda.coral_loss(source.double(), target.double(), mean_weight=1.0)
    assert_close(got.double(), truth, rtol=1e-5, atol=0)


def test_features_made_in_inference_mode():
    source = torch.randn(6, 9, requires_grad=True, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        target = source + 1
        target[0] *= 2
    fastda.coral_loss(source, target).backward()
    (expected,) = torch.autograd.grad(fastda.reference.coral_loss(source, target.clone()), source)
    assert_close(source.grad, expected)
