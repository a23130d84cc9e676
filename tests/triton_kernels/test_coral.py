"""CORAL on Triton, interpreted on CPU tensors: as exact as the reference, over routes, sizes, layouts and dtypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from ops_under_test import BY_NAME, Draw, Sizes
from strategies import LAYOUTS, describe, lay_out
from tolerance import assert_as_accurate_as_reference, map_floating, random_like, results
from torch.testing import assert_close

import fastda
import fastda.reference

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory", "one_thread")
CORAL, DEEP_CORAL = BY_NAME["coral_loss"], BY_NAME["deep_coral_loss"]
AROUND_BLOCKS = (2, 3, 7, 13, 16, 17, 31, 32, 33)
GRAM, DIFFERENCE = Sizes(samples=7, others=5, features=40), Sizes(samples=40, others=35, features=7)
each_route = pytest.mark.parametrize("sizes", [GRAM, DIFFERENCE], ids=["gram", "difference"])


def check(op, arguments):
    assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments)


@st.composite
def calls(draw):
    sizes = Sizes(
        batch=draw(st.sampled_from([(), (2,), (1, 2), (0,)])),
        samples=draw(st.sampled_from(AROUND_BLOCKS)),
        others=draw(st.sampled_from(AROUND_BLOCKS)),
        features=draw(st.sampled_from((0, 1, *AROUND_BLOCKS, 65))),
    )
    options = {name: draw(st.sampled_from(values)) for name, values in CORAL.options.items()}
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    arguments = CORAL.arguments(Draw(sizes, dtype, draw(st.integers(0, 2**16))), **options)
    for name in ("source", "target"):
        arguments[name] = lay_out(arguments[name], draw(st.sampled_from(LAYOUTS)))
    return arguments


@given(arguments=calls())
@settings(max_examples=5)
def test_values_and_gradients(arguments):
    note(describe(arguments))
    check(CORAL, arguments)


@pytest.mark.slow
@given(arguments=calls())
@settings(max_examples=200)
def test_values_and_gradients_at_length(arguments):
    note(describe(arguments))
    check(CORAL, arguments)


@each_route
def test_float32_products(sizes, checked_products):
    """Where float64 products would cost too much."""
    check(CORAL, CORAL.arguments(Draw(sizes), mean_weight=0.7))


@each_route
def test_means_in_a_launch_of_their_own(sizes, separate_means):
    check(CORAL, CORAL.arguments(Draw(Sizes((2,), sizes.samples, sizes.others, sizes.features)), mean_weight=0.7))


def test_means_of_many_samples_are_split():
    check(CORAL, CORAL.arguments(Draw(Sizes(samples=530, others=20, features=5)), mean_weight=0.7))


@each_route
def test_means_a_thousand_deviations_from_zero(sizes):
    arguments = CORAL.arguments(Draw(sizes), mean_weight=0.7)
    check(CORAL, arguments | {name: arguments[name] + 1000 for name in ("source", "target")})


@each_route
def test_one_feature_a_million_times_another(sizes):
    arguments = CORAL.arguments(Draw(sizes))
    for name in ("source", "target"):
        arguments[name][..., 0] *= 1e6
    check(CORAL, arguments)


@each_route
@pytest.mark.parametrize("name", ["source", "target"])
def test_a_gradient_for_one_input_alone(sizes, name):
    arguments = CORAL.arguments(Draw(sizes), mean_weight=0.7)
    (other,) = {"source", "target"} - {name}
    everything = results(fastda.coral_loss, arguments)
    alone = results(fastda.coral_loss, arguments, constant=(other,))
    assert alone.keys() == {"output 0", f"gradient of {name}"}
    assert torch.equal(alone[f"gradient of {name}"], everything[f"gradient of {name}"])


@pytest.mark.parametrize("noise", [1e-2, 1e-3])
@pytest.mark.parametrize("products", ["float64", "float32"])
def test_domains_that_nearly_agree(noise, products, request):
    """The terms of ‖Cs − Ct‖² cancel in the Gram matrix; relative errors stay small all the same."""
    if products == "float32":
        request.getfixturevalue("checked_products")
    draw = Draw()
    source = draw.normal(8, 40)
    target = source + noise * draw.normal(8, 40)
    source.requires_grad_(), target.requires_grad_()
    truth = fastda.reference.coral_loss(source.double(), target.double(), reduction="none")
    loss = fastda.coral_loss(source, target, reduction="none")
    assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    grad = random_like(loss, 0)
    got = torch.autograd.grad(loss, (source, target), grad)
    for g, expected in zip(got, torch.autograd.grad(truth, (source, target), grad.double())):
        assert (g - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_domains_that_nearly_agree(dtype):
    arguments = CORAL.arguments(Draw(Sizes(samples=9, others=9, features=40), dtype))
    arguments["target"] = arguments["source"].clone()
    arguments["target"][0] *= 1.5
    check(CORAL, arguments)


@pytest.mark.parametrize("noise", [1e-3, 1e-8])
def test_float64_domains_that_nearly_agree(noise):
    """Truth from Cs − Ct = UᵀV + VᵀU with U = Xs − Xt and V = (Xs + Xt)/2, centred, which does not cancel."""
    draw = Draw(dtype=torch.float64)
    source, difference = draw.normal(10, 40), draw.normal(10, 40)
    target = source + noise * difference
    u, v = source - target, (source + target) / 2
    u, v = u - u.mean(0), v - v.mean(0)
    truth = (u.T @ v + v.T @ u).div(9).square().sum() / (4 * 40**2)
    assert_close(fastda.coral_loss(source, target), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("products", ["float64", "float32"])
@pytest.mark.parametrize("samples, features", [(9, 40), (40, 9)])
def test_identical_domains_are_at_distance_0(samples, features, products, request):
    if products == "float32":
        request.getfixturevalue("checked_products")
    source = Draw().normal(samples, features, mean=3).requires_grad_()
    target = source.detach().clone().requires_grad_()
    loss = fastda.coral_loss(source, target, mean_weight=1.0)
    assert loss == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (source, target)))


def test_one_batch_element_cancels_and_another_does_not(checked_products):
    draw = Draw(Sizes(batch=(2,), features=40))
    source, target = draw.samples(9), draw.samples(9)
    target[1] = source[1]
    losses = fastda.coral_loss(source, target, reduction="none")
    assert losses[1] == 0
    assert_close(losses[0], fastda.reference.coral_loss(source[0], target[0]))


@each_route
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_nan_and_inf_propagate_as_in_the_reference(sizes, bad, checked_products):
    arguments = CORAL.arguments(Draw(Sizes((2,), sizes.samples, sizes.others, sizes.features)), reduction="none")
    arguments["target"][1, 2, 3] = bad
    check(CORAL, arguments)


def test_large_features_do_not_overflow():
    """Squares of the Gram matrix beyond float32, a loss within it."""
    draw = Draw(Sizes(features=40))
    source, target = (draw.samples(6, deviation=1e9) for _ in range(2))
    truth = fastda.reference.coral_loss(source.double(), target.double())
    assert_close(fastda.coral_loss(source, target).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_products(dtype, half_products):
    """Those of centred features rounded to the input's dtype; the interpreter rounds to bfloat16 towards zero."""
    arguments = CORAL.arguments(Draw(Sizes((2,), 70, 40, 33), dtype), mean_weight=0.7)
    got = results(fastda.coral_loss, arguments)
    expected = results(fastda.reference.coral_loss, map_floating(arguments, lambda _, x: x.double()))
    rounding = torch.finfo(dtype).eps
    for name, result in got.items():
        assert (result.double() - expected[name]).norm() <= 4 * rounding * expected[name].norm(), name


def test_half_precision_beyond_its_range(half_products):
    """Centred values of 70 000 do not exist in float16."""
    source = torch.tensor([[6e4, 1.0], [-6e4, 2.0], [-6e4, 5.0], [6e4, 0.0], [-6e4, 3.0]], dtype=torch.float16)
    loss = fastda.coral_loss(source, source.flip(0) / 2)
    assert_close(loss, fastda.reference.coral_loss(source, source.flip(0) / 2), rtol=1e-2, atol=0)


@given(
    sizes=st.lists(st.tuples(*(st.sampled_from((2, 5, 17, 33)) for _ in range(3))), min_size=1, max_size=3),
    batch=st.sampled_from([(), (2,)]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    weights=st.booleans(),
)
@settings(max_examples=2)
def test_layers_in_one_call_are_the_layers_one_by_one(sizes, batch, dtype, weights):
    draw = Draw(dtype=dtype)
    arguments = {}
    for layer, (num_source, num_target, num_features) in enumerate(sizes):
        arguments[f"source_{layer}"] = draw.normal(*batch, num_source, num_features)
        arguments[f"target_{layer}"] = draw.normal(*batch, num_target, num_features, deviation=1.5)

    def loss_of(module):
        def loss(**features):
            pairs = [[features[f"{domain}_{i}"] for i in range(len(sizes))] for domain in ("source", "target")]
            factors = [0.3 + layer for layer in range(len(sizes))] if weights else None
            return module.deep_coral_loss(*pairs, weights=factors, mean_weight=0.5)

        return loss

    assert_as_accurate_as_reference(loss_of(fastda), loss_of(fastda.reference), arguments)


@pytest.mark.parametrize("num_layers", [1, 4])
def test_the_number_of_launches_does_not_depend_on_the_layers(num_layers):
    """Counted on the meta device: two forward, two backward where all is small."""
    from fastda.kernels.triton import coral, problem

    sizes = [5] * num_layers, [6] * num_layers, [20, 30, 40, 50][:num_layers]
    domains = [torch.empty(sum(count * d for d in sizes[2]), device="meta") for count in (5, 6)]
    constants = (*sizes, [1.0] * num_layers, 1, "paper")
    problem.noted.clear()
    *grads, means, products = coral.coral_layers(*domains, *constants)
    assert len(problem.noted) == 2
    coral.coral_layers_backward(*grads, *domains, means, products, *constants, True, True)
    assert len(problem.noted) == 4
    problem.noted.clear()


@each_route
def test_second_derivatives_and_vmap(sizes):
    arguments = CORAL.arguments(Draw(Sizes((2,), sizes.samples // 2, sizes.others // 2, sizes.features), torch.float64))
    source, target = arguments["source"].requires_grad_(), arguments["target"]

    def second(module):
        (gradient,) = torch.autograd.grad(module.coral_loss(source, target), source, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), source)[0]

    assert_close(second(fastda), second(fastda.reference))
    per_pair = [
        torch.func.vmap(torch.func.grad(module.coral_loss))(source, target) for module in (fastda, fastda.reference)
    ]
    assert_close(*per_pair)


def test_a_direct_call_is_checked():
    x = torch.ones(3, 5)
    for arguments, message in (
        ((x, torch.ones(3, 6), 1, "paper"), "target: expected the batch dimensions and features"),
        ((x, torch.ones(1, 5), 1, "paper"), "samples: expected more than correction, 1, got 1"),
        ((x, x.double(), 1, "paper"), "target: expected torch.float32"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            torch.ops.fastda.coral_loss(*arguments)
    with pytest.raises(ValueError, match="targets: expected 9 a batch element"):
        torch.ops.fastda.coral_layers(torch.ones(9), torch.ones(8), [3], [3], [3], [1.0], 1, "paper")

