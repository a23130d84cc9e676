"""MAML and Reptile: second order against a plain loop over tasks in float64, and every option."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention
from torch.testing import assert_close

import fastda
import fastda.reference
from fastda.benchmarks.memory import peak
from fastda.fewshot import MAML, Reptile

pytestmark = pytest.mark.usefixtures("one_thread")
RATE = 0.3
TASKS = 4


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 24)

    def forward(self, x):
        query, key, value = self.project(x).chunk(3, -1)
        return scaled_dot_product_attention(query, key, value)


def sequential(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), norm, nn.Tanh(), nn.Linear(8, 2))


def convolutional(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 8, 2), norm, nn.Tanh(), nn.Flatten(), nn.Linear(24, 2))


NETWORKS = {
    "BatchNorm1d": lambda: sequential(nn.BatchNorm1d(8)),
    "BatchNorm1d of maps": lambda: convolutional(nn.BatchNorm1d(8)),
    "LayerNorm": lambda: sequential(nn.LayerNorm(8)),
    "InstanceNorm1d": lambda: convolutional(nn.InstanceNorm1d(8, affine=True)),
    "InstanceNorm1d, tracking": lambda: convolutional(nn.InstanceNorm1d(8, affine=True, track_running_stats=True)),
    "GroupNorm": lambda: sequential(nn.GroupNorm(2, 8)),
    "RMSNorm": lambda: sequential(nn.RMSNorm(8)),
    "LayerNorm of maps": lambda: sequential(nn.LayerNorm(8)),
    "attention": lambda: nn.Sequential(Attention(), nn.Tanh(), nn.Linear(8, 2)),
    "none": lambda: sequential(nn.Identity()),
}
each_network = pytest.mark.parametrize("name", NETWORKS)


def make(name: str = "none", seed: int = 0) -> tuple[nn.Sequential, list[torch.Tensor]]:
    """A network in float64 whose affine parameters are random, and tasks for it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = NETWORKS[name]().double()
        for parameter in network.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        over_maps = name in ("attention", "LayerNorm of maps")
        inputs = (6, 3, 4) if isinstance(network[0], nn.Conv1d) else (6, 5, 3) if over_maps else (6, 3)
        outputs = (6, 5, 2) if over_maps else (6, 2)
        tasks = [torch.randn(TASKS, *shape, dtype=torch.float64) for shape in (inputs, outputs, inputs, outputs)]
    return network, tasks


def loop(network, tasks, *, steps=1, first_order=False, rates=None, adapted=None, max_norm=None, loss=mse_loss):
    """MAML task by task with `torch.autograd`: the mean loss, each task's adapted parameters, in training mode."""
    start = dict(network.named_parameters())
    names = [name for name in start if adapted is None or name in adapted]
    losses, ends = [], []
    for support, labels, queries, query_labels in zip(*tasks):
        parameters = start
        for _ in range(steps):
            value = loss(functional_call(network, parameters, (support,)), labels)
            gradients = torch.autograd.grad(value, [parameters[n] for n in names], create_graph=not first_order)
            if max_norm is not None:
                norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
                gradients = [g * (max_norm / norm).clamp(max=1) for g in gradients]
            rate = rates or dict.fromkeys(names, RATE)
            parameters = parameters | {n: parameters[n] - rate[n] * g for n, g in zip(names, gradients)}
        losses.append(loss(functional_call(network, parameters, (queries,)), query_labels))
        ends.append(parameters)
    return torch.stack(losses).mean(), ends


def assert_same(maml, network, tasks, expected, also=()):
    """Meta-loss and meta-gradient are those expected, to 1e-10 of the largest entry."""
    parameters = [*network.parameters(), *also]
    loss = maml(*tasks)
    assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(expected, parameters, materialize_grads=True)
    largest = max(g.abs().max() for g in want)
    for got, right in zip(torch.autograd.grad(loss, parameters), want):
        assert_close(got, right, rtol=0, atol=1e-10 * largest.item())


# Second order


@each_network
@pytest.mark.parametrize("steps", [1, 3])
def test_second_order_is_that_of_a_loop_over_tasks(name, steps):
    network, tasks = make(name)
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=steps)
    assert_same(maml, network, tasks, loop(network, tasks, steps=steps)[0])


@each_network
def test_first_order_is_that_of_a_loop_and_another_than_second_order(name):
    network, tasks = make(name)
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2, first_order=True)
    expected, _ = loop(network, tasks, steps=2, first_order=True)
    assert_same(maml, network, tasks, expected)
    with pytest.raises(AssertionError):
        assert_same(maml, network, tasks, loop(network, tasks, steps=2)[0])


def test_what_is_compiled_is_the_second_order_of_a_loop(monkeypatch):
    """As one graph; the slow tests below have its code generated too, and for other networks and shapes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    network, tasks = make("BatchNorm1d")
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2, compile=True)
    assert_same(maml, network, tasks, loop(network, tasks, steps=2)[0])


@pytest.mark.slow
@each_network
def test_compiled_second_order_is_that_of_a_loop(name):
    torch.compiler.reset()
    network, tasks = make(name)
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2, compile=True)
    assert_same(maml, network, tasks, loop(network, tasks, steps=2)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "attention", "LayerNorm of maps"])
def test_other_shapes_are_compiled_too(name):
    """With symbols for sizes, or, where linear layers over maps refuse those under vmap (torch 2.13), with numbers."""
    torch.compiler.reset()
    network, tasks = make(name)
    maml = MAML(network, mse_loss, inner_lr=RATE, compile=True)
    for some in (tasks, [x[:3] for x in tasks], [x[:2, :4] for x in tasks]):
        assert_same(maml, network, some, loop(network, some)[0])


@pytest.mark.slow
def test_what_does_not_compile_says_why():
    network, tasks = make()
    maml = MAML(network, lambda outputs, labels: mse_loss(outputs[:, :1] @ labels, labels), compile=True)
    with pytest.raises(RuntimeError, match=r"Expected size .* \[4, 1\] but got: \[4, 6\]"):
        maml(*tasks)


@pytest.mark.slow
def test_every_option_compiles():
    network, tasks = make("BatchNorm1d")
    options = {"inner_lr": RATE, "inner_steps": 2, "max_grad_norm": 0.5, "adapted": ["0", "3"], "chunk_size": 3}
    for learner in (MAML, Reptile):
        more = {"first_order": True, "learn_inner_lr": True} if learner is MAML else {"inner_batch_size": 4}
        eager, compiled = (learner(network, mse_loss, **options, **more, compile=c) for c in (False, True))
        (expected, *want), (loss, *got) = (
            (x := one(*tasks), *torch.autograd.grad(x, list(one.parameters()), materialize_grads=True))
            for one in (eager, compiled)
        )
        assert_close([loss, *got], [expected, *want], rtol=1e-9, atol=1e-10)
        with torch.no_grad():
            assert_close(compiled(*tasks), expected.detach())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BatchNorm1d", "LayerNorm"])
def test_torch_compile_around_it_changes_nothing(name):
    network, tasks = make(name)
    assert_same(torch.compile(MAML(network, mse_loss, inner_lr=RATE)), network, tasks, loop(network, tasks)[0])


class Scaled(nn.Module):
    """A scalar among the parameters."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.scale * x


class Tied(nn.Module):
    """Two layers that share their weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()))


def test_shared_weights_are_adapted_as_one():
    network, (_, tasks) = Tied().double(), make()
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2)
    assert_same(maml, network, tasks, loop(network, tasks, steps=2)[0])
    model = maml.adapt(tasks[0][0], tasks[1][0])
    assert model.second.weight is model.first.weight is not network.first.weight


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # the loop's
@each_network
def test_autocast_changes_no_more_than_it_changes_a_loop(name):
    network, tasks = make(name)
    network, tasks = network.float(), [x.float() for x in tasks]

    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])

    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2)
    expected = gradient(maml(*tasks))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, looped = maml(*tasks), loop(network, tasks, steps=2)[0]
    error = (gradient(loss) - expected).norm()
    assert 0 < error <= 2 * (gradient(looped) - expected).norm()
    assert not network[1]._forward_pre_hooks


# Options


def test_meta_sgd_learns_a_rate_for_each_element():
    network, tasks = make()
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2, learn_inner_lr=True)
    rates = maml.rates()
    assert {name: x.shape for name, x in rates.items()} == {n: p.shape for n, p in network.named_parameters()}
    assert {id(p) for p in maml.parameters()} == {id(p) for p in (*network.parameters(), *rates.values())}
    with torch.no_grad():
        for rate in rates.values():
            rate.mul_(torch.rand_like(rate) + 0.5)
    expected, _ = loop(network, tasks, steps=2, rates=rates)
    assert_same(maml, network, tasks, expected, also=rates.values())


@pytest.mark.parametrize("option", ["adapted", "not_adapted"])
def test_anil_and_boil_adapt_a_part(option):
    network, tasks = make()
    head = ["3.weight", "3.bias"]
    names = head if option == "adapted" else [n for n, _ in network.named_parameters() if n not in head]
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=2, **{option: ["3"]})
    expected, ends = loop(network, tasks, steps=2, adapted=names)
    assert_same(maml, network, tasks, expected)
    model = maml.adapt(tasks[0][0], tasks[1][0])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name)) == (name not in names)
        assert_close(parameter, ends[0][name])


def test_targets_of_another_shape_are_warned_of():
    """As by `mse_loss` outside: they are broadcast, which is seldom meant."""
    network, (support, labels, queries, query_labels) = make()
    with pytest.warns(UserWarning, match="target size"):
        MAML(network, mse_loss)(support, labels[..., :1], queries, query_labels)


def test_frozen_parameters_get_no_gradient_and_do_not_move():
    network, tasks = make()
    network[0].weight.requires_grad_(False)
    maml = MAML(network, mse_loss, inner_lr=RATE)
    maml(*tasks).backward()
    assert network[0].weight.grad is None and network[0].bias.grad is not None
    assert torch.equal(maml.adapt(tasks[0][0], tasks[1][0])[0].weight, network[0].weight)


@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_gradients_are_clipped_inside(max_norm):
    network, tasks = make()
    network[1] = Scaled().double()
    maml = MAML(network, mse_loss, inner_lr=RATE, inner_steps=3, max_grad_norm=max_norm)
    expected, _ = loop(network, tasks, steps=3, max_norm=max_norm)
    assert_same(maml, network, tasks, expected)


def test_clipping_a_gradient_of_zero_gives_no_nan():
    network = nn.Linear(3, 2).double()
    tasks = [torch.zeros(2, 4, size, dtype=torch.float64) for size in (3, 2, 3, 2)]
    nn.init.zeros_(network.bias)
    MAML(network, mse_loss, max_grad_norm=1.0)(*tasks).backward()
    assert network.weight.grad.isfinite().all()


@settings(max_examples=12)
@given(chunk_size=st.integers(1, 6), tasks=st.integers(1, 5), steps=st.integers(1, 2), learn=st.booleans())
def test_chunks_change_nothing(chunk_size, tasks, steps, learn):
    network, everything = make("BatchNorm1d")
    some = [torch.cat([x, x + 1])[:tasks] for x in everything]
    options = {"inner_lr": RATE, "inner_steps": steps, "learn_inner_lr": learn}
    whole, chunked = MAML(network, mse_loss, **options), MAML(network, mse_loss, chunk_size=chunk_size, **options)
    results = []
    for maml in (whole, chunked):
        loss = maml(*some)
        results.append((loss, *torch.autograd.grad(loss, list(maml.parameters())), maml.predict(*some[:3])))
    assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_chunks_bound_the_memory():
    network = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    tasks = [torch.randn(64, 50, size) for size in (16, 1, 16, 1)]
    whole, chunked = (
        peak(lambda maml=MAML(network, mse_loss, inner_steps=3, chunk_size=size): maml(*tasks)) for size in (None, 4)
    )
    assert chunked < whole / 8


def test_sum_is_the_mean_times_the_number_of_tasks():
    network, tasks = make()
    sums, means = [], []
    for found, reduction in ((means, "mean"), (sums, "sum")):
        loss = MAML(network, mse_loss, reduction=reduction)(*tasks)
        found += [loss, *torch.autograd.grad(loss, list(network.parameters()))]
    assert_close(sums, [TASKS * x for x in means])


def test_the_meta_loss_is_one_term_among_others():
    network, tasks = make()
    maml = MAML(network, mse_loss, inner_lr=RATE)
    expected, _ = loop(network, tasks)
    penalty = sum(p.square().sum() for p in network.parameters())
    got, right = (
        torch.autograd.grad(3 * loss + penalty, list(network.parameters()), retain_graph=True)
        for loss in (maml(*tasks), expected)
    )
    assert_close(got, right, rtol=1e-9, atol=1e-10)


def test_hooks_of_parameters_run_in_the_backward_pass_alone():
    network, tasks = make()
    seen = []
    network[0].weight.register_hook(seen.append)
    loss = MAML(network, mse_loss)(*tasks)
    assert not seen
    loss.backward()
    assert_close(seen, [network[0].weight.grad])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"chunk_size": 3}], ids=str)
def test_the_gradient_is_handed_over_once(backend, options):
    """What the caller gets is the caller's to overwrite."""
    network, tasks = make()
    with fastda.use_backend(backend):
        loss = MAML(network, mse_loss, **options)(*tasks)
    (first,) = torch.autograd.grad(loss, network[0].weight, retain_graph=True)
    expected = first.clone()
    first.zero_()
    assert_close(torch.autograd.grad(3 * loss, network[0].weight, retain_graph=True)[0], 3 * expected)
    assert_close(torch.autograd.grad(loss, network[0].weight)[0], expected)
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(loss, network[0].weight)


def test_a_third_derivative_is_refused_by_name():
    network, tasks = make()
    with pytest.raises(RuntimeError, match="create_graph: .* can be differentiated once"):
        torch.autograd.grad(MAML(network, mse_loss)(*tasks), network[0].weight, create_graph=True)


def test_without_gradients_it_is_the_loss_alone():
    network, tasks = make()
    maml = MAML(network, mse_loss, inner_lr=RATE)
    with torch.no_grad():
        loss = maml(*tasks)
    assert not loss.requires_grad
    assert_close(loss, loop(network, tasks)[0].detach())


def test_dropout_draws_anew_for_each_task():
    network = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    maml = MAML(network, mse_loss, inner_lr=1e-9)
    inputs = torch.ones(2, 4, 3)
    outputs = maml.predict(inputs, inputs[..., :1], inputs)
    assert not torch.equal(outputs[0], outputs[1])
    maml.eval()
    assert torch.equal(*maml.predict(inputs, inputs[..., :1], inputs))


def test_classification():
    network, (support, _, queries, _) = make()
    labels = torch.arange(6).remainder(2).expand(TASKS, 6)
    maml = MAML(network, cross_entropy, inner_lr=RATE)
    tasks = [support, labels, queries, labels.flip(1)]
    assert_same(maml, network, tasks, loop(network, tasks, loss=cross_entropy)[0])


# BatchNorm


@pytest.mark.parametrize("statistics", ["batch", "kept"])
def test_running_statistics_are_left_alone(statistics):
    network, tasks = make("BatchNorm1d")
    network[1].running_mean += 3
    before = {name: x.clone() for name, x in network.named_buffers()}
    maml = MAML(network, mse_loss, norm_statistics=statistics)
    maml(*tasks).backward()
    maml.predict(*tasks[:3])
    assert network[1].training and network[1].track_running_stats
    assert_close(dict(network.named_buffers()), before, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["batch", "kept"])
@pytest.mark.parametrize("training", [True, False])
def test_which_statistics_normalise(statistics, training):
    network, tasks = make("BatchNorm1d")
    network[1].running_mean += 3
    reference = copy.deepcopy(network).train(statistics == "batch")
    maml = MAML(network, mse_loss, inner_lr=RATE, norm_statistics=statistics).train(training)
    assert_same(maml, network, tasks, loop(network.train(statistics == "batch"), tasks)[0])
    network.train(training)
    model = maml.adapt(tasks[0][0], tasks[1][0])
    parameters = loop(reference, tasks)[1][0]
    assert_close(model(tasks[2][0]), functional_call(reference, parameters, (tasks[2][0],)))


# Use


@each_network
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_predict_is_each_adapted_model(name, steps):
    network, tasks = make(name)
    maml = MAML(network, mse_loss, inner_lr=RATE).eval()
    outputs = maml.predict(*tasks[:3], steps=steps)
    for support, labels, queries, output in zip(*tasks[:3], outputs):
        assert_close(maml.adapt(support, labels, steps)(queries), output)
    if steps == 0:
        assert_close(outputs[0], maml.adapt(tasks[0][0], tasks[1][0], 0)(tasks[2][0]))


def test_adapt_returns_a_plain_model():
    network, tasks = make("BatchNorm1d")
    network[0].weight.grad = torch.ones_like(network[0].weight)
    before = copy.deepcopy(network.state_dict())
    model = MAML(network, mse_loss, inner_lr=RATE).adapt(tasks[0][0], tasks[1][0])
    assert type(model) is nn.Sequential and not model.training
    assert all(p.is_leaf and p.requires_grad and p.grad is None for p in model.parameters())
    assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tasks[2][0]), model(tasks[2][0]))
    mse_loss(model(tasks[2][0]), tasks[3][0]).backward()


def test_inference_mode_changes_nothing():
    network, tasks = make("BatchNorm1d")
    maml = MAML(network, mse_loss, inner_lr=RATE)

    def found(support, labels, queries, query_labels):
        adapted = maml.adapt(support[0], labels[0])(queries[0])
        return [maml.predict(support, labels, queries), maml(support, labels, queries, query_labels), adapted]

    with torch.no_grad():
        expected = found(*tasks)
    with torch.inference_mode():
        assert_close(found(*tasks), expected)
        assert_close(found(*(x.clone() for x in tasks)), expected)


def test_saving_and_copying():
    network, tasks = make()
    maml = MAML(network, mse_loss, inner_lr=RATE, learn_inner_lr=True)
    with torch.no_grad():
        maml.rates()["0.weight"].add_(0.1)
    file = io.BytesIO()
    torch.save(maml.state_dict(), file)
    file.seek(0)
    other = MAML(make(seed=5)[0], mse_loss, learn_inner_lr=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    for same in (other, copy.deepcopy(maml), pickle.loads(pickle.dumps(maml))):
        assert torch.equal(same(*tasks), maml(*tasks))


# The fused ops inside


class ProtoMAML(MAML):
    """The head of each task starts from its prototypes: Triantafillou et al., Meta-Dataset, ICLR 2020."""

    ops = fastda

    def start(self, parameters, support, labels):
        body, head = self.network
        own = {name.removeprefix("0."): x for name, x in parameters.items() if name.startswith("0.")}
        features = vmap(lambda inputs: functional_call(body, own, (inputs,)))(support)
        prototypes = self.ops.class_means(features, labels, head.out_features)
        return super().start(parameters, support, labels) | {
            "1.weight": 2 * prototypes,
            "1.bias": -prototypes.square().sum(-1),
        }


def few_shot_tasks():
    torch.manual_seed(1)
    labels = torch.tensor([0, 1, 2, 2, 1, 0]).expand(TASKS, 6)
    return [
        torch.randn(TASKS, 6, 4, dtype=torch.float64),
        labels,
        torch.randn(TASKS, 6, 4, dtype=torch.float64),
        labels,
    ]


def gradients(maml, tasks):
    loss = maml(*tasks)
    return [loss, *torch.autograd.grad(loss, list(maml.network.parameters()))]


def test_proto_maml_on_the_fused_ops_is_that_on_the_reference():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh())
    network = nn.Sequential(body, nn.Linear(5, 3)).double()
    found = {}
    for ops in (fastda, fastda.reference):
        maml = ProtoMAML(network, cross_entropy, inner_lr=RATE, inner_steps=3)
        maml.ops = ops
        found[ops] = gradients(maml, few_shot_tasks())
    assert_close(found[fastda], found[fastda.reference], rtol=1e-9, atol=1e-11)
    assert found[fastda][1].abs().max() > 1e-3


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
def test_the_fused_loss_differentiates_twice_inside_the_inner_loop(metric):
    """Against the reference in a plain loop, task by task."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double()

    def loss_on(ops):
        def loss(features, labels):
            halves = features[:3], labels[:3], features[3:], labels[3:]
            return ops.prototypical_loss(*halves, num_classes=3, metric=metric, temperature=0.7)

        return loss

    tasks = few_shot_tasks()
    expected, _ = loop(network, tasks, steps=2, loss=loss_on(fastda.reference))
    assert_same(MAML(network, loss_on(fastda), inner_lr=RATE, inner_steps=2), network, tasks, expected)


# Reptile


def test_reptile_moves_towards_the_mean_of_where_the_tasks_end():
    network, tasks = make("LayerNorm")
    reptile = Reptile(network, mse_loss, inner_lr=RATE, inner_steps=4, chunk_size=3)
    _, ends = loop(network, tasks, steps=4, first_order=True)
    expected = {n: p + 0.5 * (sum(end[n] for end in ends) / TASKS - p) for n, p in network.named_parameters()}
    optimizer = torch.optim.SGD(reptile.parameters(), lr=0.5)
    reptile(*tasks).backward()
    optimizer.step()
    assert_close(dict(network.named_parameters()), expected)


def test_reptile_goes_through_the_samples():
    network, tasks = make()
    reptile = Reptile(network, mse_loss, inner_lr=RATE, inner_steps=3, inner_batch_size=4)
    parameters, support, labels = dict(network.named_parameters()), tasks[0][0], tasks[1][0]
    losses = []
    for rows in ([0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]):
        loss = mse_loss(functional_call(network, parameters, (support[rows],)), labels[rows])
        losses.append(loss.detach())
        steps = torch.autograd.grad(loss, list(parameters.values()))
        parameters = {n: (p - RATE * g).detach().requires_grad_() for (n, p), g in zip(parameters.items(), steps)}
    assert_close(dict(reptile.adapt(support, labels).named_parameters()), parameters)
    assert_close(reptile(*(x[:1] for x in tasks)).detach(), torch.stack(losses).mean())


def test_reptile_learns_to_adapt():
    """Lines through the origin: the slope that one step can reach from."""
    generator = torch.Generator().manual_seed(0)

    def tasks(count):
        slopes, x = torch.randn(count, 1, 1, generator=generator) + 2, torch.randn(count, 8, 1, generator=generator)
        return x, slopes * x

    network = nn.Linear(1, 1)
    reptile = Reptile(network, mse_loss, inner_lr=0.1, inner_steps=3)
    optimizer = torch.optim.SGD(reptile.parameters(), lr=0.3)
    x, y = tasks(200)

    def error():
        return mse_loss(reptile.predict(x[:, :4], y[:, :4], x[:, 4:]), y[:, 4:]).item()

    before = error()
    for _ in range(60):
        optimizer.zero_grad()
        reptile(*tasks(10)).backward()
        optimizer.step()
    assert error() < 0.5 * before
    assert network.weight.item() == pytest.approx(2, abs=0.3)


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"inner_lr": 0}, ValueError, "inner_lr: expected a number > 0"),
        ({"inner_steps": 0}, ValueError, "inner_steps: expected at least 1"),
        ({"adapted": ["heda"]}, ValueError, "adapted: expected names .* got 'heda'; its parameters are 0.weight"),
        ({"adapted": "3"}, TypeError, r"adapted: expected a sequence of names, got '3'; pass \['3'\]"),
        ({"adapted": []}, ValueError, "adapted: expected at least one name, got none"),
        ({"not_adapted": ["0", "3"]}, ValueError, "not_adapted: expected to leave parameters"),
        ({"adapted": ["0"], "not_adapted": ["3"]}, ValueError, "adapted, not_adapted: expected at most one"),
        ({"norm_statistics": "running"}, ValueError, "norm_statistics: expected one of 'batch', 'kept'"),
        ({"reduction": "none"}, ValueError, "reduction: expected one of 'mean', 'sum'"),
        ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: expected a number > 0"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        MAML(make()[0], mse_loss, **options)


def test_wrong_tasks_are_named():
    network, (support, labels, queries, query_labels) = make()
    maml = MAML(network, mse_loss)
    with pytest.raises(ValueError, match=r"support: expected shape \(tasks, samples, ...\)"):
        maml(support[0, 0], labels, queries, query_labels)
    with pytest.raises(ValueError, match="queries: expected the 4 tasks of support"):
        maml(support, labels, queries[:2], query_labels[:2])
    with pytest.raises(ValueError, match="support_labels: expected one label for each of the 6 samples of support"):
        maml(support, labels[:, :3], queries, query_labels)
    with pytest.raises(TypeError, match="network: expected a torch.nn.Module"):
        MAML(len, mse_loss)
    with pytest.raises(TypeError, match="loss_function: expected a function"):
        MAML(network, "mse")


@pytest.mark.parametrize("learner", [MAML, Reptile])
def test_what_cannot_be_learnt_is_named(learner):
    network, tasks = make()
    learns = learner(network, mse_loss)
    with pytest.raises(ValueError, match="support: expected at least one task, got none"):
        learns(*(x[:0] for x in tasks))
    with pytest.raises(ValueError, match="support: expected shape .* with at least one sample"):
        learns(*(x[:, :0] for x in tasks))
    with pytest.raises(ValueError, match=r"support: expected a tensor without gradient, .* detach\(\) it"):
        learns(tasks[0].clone().requires_grad_(), *tasks[1:])
    with pytest.raises(ValueError, match=r"loss_function: expected a scalar for a task, got .* shape \(6, 2\)"):
        learner(network, lambda outputs, labels: (outputs - labels) ** 2)(*tasks)
    with pytest.raises(ValueError, match="loss_function: expected no parameters that learn, got some in Linear"):
        learner(network, nn.Linear(2, 1))
    with pytest.raises(ValueError, match="network: expected parameters to adapt, got none"):
        learner(nn.Tanh(), mse_loss)
    network.requires_grad_(False)
    for call in (lambda: learns(*tasks), lambda: learns.adapt(tasks[0][0], tasks[1][0])):
        with pytest.raises(ValueError, match="network: expected a gradient to be required .* thaw them"):
            call()


def test_wrong_support_of_one_task_is_named():
    network, (support, labels, queries, _) = make()
    maml = MAML(network, mse_loss)
    with pytest.raises(ValueError, match="support_labels: expected one label for each of the 6 samples of support"):
        maml.adapt(support[0], labels[0, :3])
    with pytest.raises(TypeError, match="support: expected a tensor"):
        maml.adapt([1.0], labels[0])
    with pytest.raises(ValueError, match=r"support: expected shape \(K, \*sample\) with at least one sample"):
        maml.adapt(support[0, :0], labels[0, :0])
    with pytest.raises(ValueError, match="support: expected at least one task, got none"):
        maml.predict(support[:0], labels[:0], queries[:0])
