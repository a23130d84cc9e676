"""Prototypes: worked example, invariances, empty classes, labels, and the places where formulas break."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops_under_test import METRICS, REDUCTIONS, Draw, Sizes, each_module
from tolerance import assert_as_accurate_as_reference, random_like
from torch.testing import assert_close

import fastda
import fastda.reference
from fastda.benchmarks.memory import memory

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
each_metric = pytest.mark.parametrize("metric", METRICS)
EMPTY = [math.nan, math.nan]


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def points(queries=4, classes=3, features=2, seed=0, dtype=torch.float64):
    draw = Draw(Sizes(features=features), dtype, seed)
    return draw.samples(queries).requires_grad_(), draw.samples(classes).requires_grad_()


pairs = st.builds(points, *(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**16)))


@each_module
def test_worked_example(module):
    """Points on a line at the given distances from the query."""
    distances = torch.tensor([0.3, 0.8, 0.6, 0.9, 0.4])
    query, prototypes = torch.zeros(1, 1), distances.unsqueeze(1)
    assert_close(module.pairwise_distance(query, prototypes, metric="euclidean"), distances.unsqueeze(0))
    got = module.prototype_softmax(query, prototypes, metric="euclidean")
    assert_close(got, torch.tensor([[0.2631, 0.1596, 0.1949, 0.1444, 0.2380]]), rtol=0, atol=6e-5)
    assert_close(got, (-distances).exp().unsqueeze(0) / 2.8158, rtol=0, atol=1e-5)
    assert module.nearest_prototype(query, prototypes, metric="euclidean")[1].item() == 0


@each_module
def test_five_shots_are_answered_with_more_confidence_than_one(module):
    """Averaging removes noise from the prototypes, and with it from the distances that are compared."""
    draw = Draw(seed=1)
    centres, noise = draw.normal(200, 5, 64, deviation=0.3), draw.normal(200, 25, 64)
    labels = torch.arange(25).remainder(5).expand(200, 25)
    queries = centres + 0.3 * draw.normal(200, 5, 64)
    support = centres.repeat(1, 5, 1) + noise
    of_class = torch.arange(5).expand(200, 5)
    one, five = (
        module.prototypical_loss(support[:, :n], labels[:, :n], queries, of_class, num_classes=5) for n in (5, 25)
    )
    assert five < one


@each_module
@each_metric
@given(pair=pairs)
def test_distances_in_plain_words(module, metric, pair):
    queries, prototypes = pair
    q, p = queries.unsqueeze(1), prototypes.unsqueeze(0)
    expected = {
        "sqeuclidean": lambda: (q - p).pow(2).sum(-1),
        "euclidean": lambda: (q - p).norm(dim=-1),
        "cosine": lambda: 1 - F.cosine_similarity(q, p, dim=-1),
    }[metric]()
    assert_close(module.pairwise_distance(queries, prototypes, metric=metric), expected)


@each_module
@given(pair=pairs, scale=st.floats(0.1, 10.0))
def test_invariances(module, pair, scale):
    queries, prototypes = pair
    shift = torch.linspace(-3, 3, queries.shape[1], dtype=torch.float64)
    rotation = torch.linalg.qr(Draw(dtype=torch.float64).normal(queries.shape[1], queries.shape[1])).Q
    for metric, power in (("sqeuclidean", 2), ("euclidean", 1), ("cosine", 0)):
        distances = module.pairwise_distance(queries, prototypes, metric=metric)
        assert (distances >= 0).all()
        for map_both in (lambda x: x @ rotation, lambda x: x + shift) if power else (lambda x: x @ rotation,):
            moved = module.pairwise_distance(map_both(queries), map_both(prototypes), metric=metric)
            assert_close(moved, distances)
        scaled = module.pairwise_distance(scale * queries, scale * prototypes, metric=metric)
        assert_close(scaled, scale**power * distances)
        assert_close(module.pairwise_distance(prototypes, queries, metric=metric), distances.mT)


@each_module
@each_metric
@pytest.mark.parametrize("temperature", [1.0, 0.3, torch.tensor(2.0, dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cross_entropy_is_that_of_torch(module, metric, temperature, reduction):
    queries, prototypes = points(queries=6, classes=4)
    targets = torch.tensor([0, 3, -100, 1, 2, 2])
    logits = -module.pairwise_distance(queries, prototypes, metric=metric) / temperature
    options = {"metric": metric, "temperature": temperature}
    assert_close(module.prototype_log_softmax(queries, prototypes, **options), logits.log_softmax(-1))
    assert_close(module.prototype_softmax(queries, prototypes, **options), logits.softmax(-1))
    for extra in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"ignore_index": 2}):
        kept = targets if "ignore_index" in extra else targets.where(targets >= 0, -100)
        kept = kept.clamp_min(0) if "ignore_index" in extra else kept
        got = module.prototype_cross_entropy(queries, prototypes, kept, reduction=reduction, **options, **extra)
        assert_close(got, F.cross_entropy(logits, kept, reduction=reduction, **extra))


@each_module
def test_mean_runs_over_all_queries_that_are_not_ignored(module):
    """Of all batches together, and not over the means of batches."""
    queries, prototypes = (x.detach().unflatten(0, (2, 2)) for x in points(queries=4, classes=4))
    targets = torch.tensor([[0, -100], [1, 1]])
    losses = module.prototype_cross_entropy(queries, prototypes, targets, reduction="none")
    assert losses[0, 1] == 0
    assert_close(module.prototype_cross_entropy(queries, prototypes, targets), losses.sum() / 3)
    ignored = torch.full((2, 2), -100)
    assert module.prototype_cross_entropy(queries, prototypes, ignored).isnan()
    assert module.prototype_cross_entropy(queries, prototypes, ignored, reduction="sum") == 0


@each_module
def test_prototypical_loss_is_the_chain_of_its_parts(module):
    draw = Draw(Sizes(batch=(2, 3), samples=20, others=7, features=6, classes=5), torch.float64)
    support, queries, labels, targets = draw.samples(20), draw.samples(7), draw.labels(20), draw.labels(7)
    for options in ({}, {"metric": "cosine", "temperature": 0.1}, {"metric": "euclidean", "reduction": "none"}):
        got = module.prototypical_loss(support, labels, queries, targets, 5, **options)
        means = module.class_means(support, labels, 5)
        assert_close(got, module.prototype_cross_entropy(queries, means, targets, **options))


@each_module
def test_class_means(module):
    support = torch.tensor([[0.0, 0.0], [2.0, 4.0], [5.0, 5.0]])
    labels = torch.tensor([2, 2, 0])
    assert_close(module.class_means(support, labels, 3), torch.tensor([[5.0, 5.0], EMPTY, [1.0, 2.0]]), equal_nan=True)
    zero = module.class_means(support, labels, 3, empty="zero")
    assert_close(zero, torch.tensor([[5.0, 5.0], [0.0, 0.0], [1.0, 2.0]]))
    assert module.class_means(support[:0], labels[:0], 2).isnan().all()
    order = torch.tensor([2, 0, 1])
    assert_close(module.class_means(support[order], labels[order], 3, empty="zero"), zero)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32):
        assert_close(module.class_means(support, labels.to(dtype), 3, empty="zero"), zero)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_class_means_round_gradients_of_any_number_of_samples(dtype):
    samples, features = 2 * 2**13 + 3, 64  # which are rounded in three blocks
    draw = Draw(Sizes(samples=samples, features=features, classes=7), dtype)
    support, labels = draw.samples(samples), draw.labels(samples)
    incoming = random_like(torch.empty(7, features), 1)

    def gradient(support):
        support = support.requires_grad_()
        return torch.autograd.grad(fastda.class_means(support, labels, 7, empty="zero"), support, incoming)[0]

    rounded, exact = gradient(support), gradient(support.detach().float())
    assert rounded.dtype == dtype and torch.equal(rounded, exact.to(dtype))


@each_module
@each_metric
@pytest.mark.parametrize("where", [0, 1, 3])
def test_an_empty_class_counts_for_nothing(module, metric, where):
    """Everything is as if the class were not there, and it gets no gradient."""
    queries, prototypes = points(queries=5, classes=3, features=4)
    empty = torch.full((1, 4), math.nan, dtype=torch.float64)
    there = [c for c in range(4) if c != where]
    targets = torch.tensor(there + there[:2])
    without = torch.tensor([0, 1, 2, 0, 1])

    def with_empty():
        return torch.cat([prototypes[:where], empty, prototypes[where:]])

    probabilities = module.prototype_softmax(queries, with_empty(), metric=metric)
    assert (probabilities[:, where] == 0).all()
    assert_close(probabilities[:, there], module.prototype_softmax(queries, prototypes, metric=metric))
    logarithms = module.prototype_log_softmax(queries, with_empty(), metric=metric)
    assert (logarithms[:, where] == -math.inf).all()
    assert module.pairwise_distance(queries, with_empty(), metric=metric)[:, where].isnan().all()
    distances, indices = module.nearest_prototype(queries, with_empty(), metric=metric, k=4)
    assert (indices[:, 3] == where).all() and distances[:, 3].isnan().all() and distances[:, :3].isfinite().all()
    for smoothing in (0.0, 0.3):
        options = {"metric": metric, "label_smoothing": smoothing}
        leaf = with_empty().detach().requires_grad_()
        loss = module.prototype_cross_entropy(queries, leaf, targets, **options)
        expected = module.prototype_cross_entropy(queries, prototypes, without, **options)
        assert_close(loss, expected)
        gradients = torch.autograd.grad(loss, (queries, leaf))
        assert (gradients[1][where] == 0).all()
        assert_close((gradients[0], gradients[1][there]), torch.autograd.grad(expected, (queries, prototypes)))
        on_it = torch.tensor([where, *targets[1:]])
        losses = module.prototype_cross_entropy(queries, leaf, on_it, reduction="none", **options)
        assert losses[0] == math.inf and losses[1:].isfinite().all()


def test_the_gradient_of_one_class_is_nothing_however_its_label_is_smoothed():
    """Its probability is 1, and what it should be adds up to 1, rounded or not."""
    query, prototype = torch.tensor([[1.5410]], requires_grad=True), torch.tensor([[-0.2054]], requires_grad=True)
    for smoothing in torch.linspace(0, 1, 101).tolist():
        loss = fastda.prototype_cross_entropy(query, prototype, torch.tensor([0]), label_smoothing=smoothing)
        assert all(not grad.any() for grad in torch.autograd.grad(loss, [query, prototype]))


@each_metric
@pytest.mark.parametrize("classes, queries, features", [(70, 500, 100), (150, 130, 47), (41, 300, 41)])
def test_an_episode_of_many_classes_and_queries(metric, classes, queries, features):
    """More than a panel of classes and than are multiplied at once, and rests of both; to the bit on any threads."""
    tensors = [torch.randn(count, features, dtype=torch.float64) for count in (2 * classes, queries)]
    labels, targets = torch.arange(2 * classes) % classes, torch.arange(queries) % classes
    found = []
    for module, count in ((fastda.reference, 1), (fastda, 1), (fastda, 2), (fastda, 3)):
        with on_threads(count):
            leaves = [x.clone().requires_grad_() for x in tensors]
            options = {"metric": metric, "temperature": 9.0}
            loss = module.prototypical_loss(leaves[0], labels, leaves[1], targets, classes, **options)
            found.append((loss, *torch.autograd.grad(loss, leaves)))
    assert_close(found[1], found[0])
    assert_close(found[2], found[1], rtol=0, atol=0)
    assert_close(found[3], found[1], rtol=0, atol=0)


def of_many(op, module, support, queries, **options):
    """An op on many queries and prototypes, each the one support sample of its class; neighbours are their targets."""
    classes, targets = len(support), (torch.arange(len(queries)) + 1) % len(support)
    if op == "prototypical_loss":
        return module.prototypical_loss(support, torch.arange(classes), queries, targets, classes, **options)
    if op == "prototype_cross_entropy":
        return module.prototype_cross_entropy(queries, support, targets, **options)
    return getattr(module, op)(queries, support, **options)


each_softmax = pytest.mark.parametrize("op", ["prototypical_loss", "prototype_cross_entropy", "prototype_softmax"])


@each_softmax
def test_answers_of_which_a_softmax_is_sure(op):
    functions = (functools.partial(of_many, op, module) for module in (fastda, fastda.reference))
    assert_as_accurate_as_reference(*functions, {"support": torch.randn(60, 80), "queries": torch.randn(96, 80)})


@each_softmax
def test_numbers_too_small_to_be_normal_are_kept_outside_the_kernels(op):
    """That the kernels do without them is a mode of the processor, and would hold for all that a thread computes."""
    leaves = [torch.randn(count, 1280, requires_grad=True) for count in (60, 96)]
    with on_threads(2):
        result = of_many(op, fastda, *leaves)
        torch.autograd.grad(result, leaves, torch.ones_like(result))
        on_both_threads, on_this_one = torch.full((1 << 20,), 1e-38) * 0.01, torch.full((3,), 1e-38) * 0.01
    assert (on_both_threads > 0).all() and (on_this_one > 0).all()


def near_pairs(kind, classes, queries=130, features=70):
    """Each query near one prototype, or near some: nearer than to the middle of them all, where products cancel."""
    draw = Draw(Sizes(features=features))
    own = torch.arange(queries) % classes
    if kind == "anywhere":
        return features**-0.25 * draw.samples(classes), features**-0.25 * draw.samples(queries)
    if kind == "almost equal":
        support = draw.samples(classes)
        return support, support[own] + 1e-4 * draw.samples(queries)
    clusters = 4.0 * draw.samples(6)
    cluster = torch.arange(classes) % 6
    return clusters[cluster] + 0.2 * draw.samples(classes), clusters[cluster[own]] + 0.2 * draw.samples(queries)


each_kind = pytest.mark.parametrize("kind", ["almost equal", "in clusters"])
each_op_of_many = pytest.mark.parametrize(
    "op, options",
    [
        ("prototypical_loss", {"temperature": 3.0, "reduction": "none"}),
        ("prototypical_loss", {"temperature": 3.0}),
        ("prototype_cross_entropy", {"temperature": 3.0, "reduction": "none"}),
        ("prototype_cross_entropy", {"temperature": 3.0, "label_smoothing": 0.1}),
        ("prototype_log_softmax", {"temperature": 3.0}),
        ("pairwise_distance", {}),
    ],
    ids=str,
)


@each_kind
@each_op_of_many
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("classes", [12, 60])
def test_gradients_of_pairs_that_are_near(kind, op, options, metric, classes):
    support, queries = near_pairs(kind, classes)
    options = options | {"metric": metric}
    functions = (functools.partial(of_many, op, module, **options) for module in (fastda, fastda.reference))
    assert_as_accurate_as_reference(*functions, {"support": support, "queries": queries})


@pytest.mark.parametrize("kind", ["in clusters", "anywhere"])
@pytest.mark.parametrize("op", ["prototypical_loss", "prototype_cross_entropy"])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_gradients_that_sum_over_thousands_of_queries(kind, op, metric):
    """What all terms have in common must not add up: how a class's norm was rounded, or equal terms one by one."""
    support, queries = near_pairs(kind, 60, 2048, 64)
    options = {"metric": metric, "temperature": 3.0}
    functions = (functools.partial(of_many, op, module, **options) for module in (fastda, fastda.reference))
    assert_as_accurate_as_reference(*functions, {"support": support, "queries": queries})


@each_op_of_many
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_gradients_of_pairs_that_are_near_beside_points_that_are_infinitely_far(op, options, metric):
    """Of these, each gradient is infinite or NaN where the reference's is; of the others, no less exact."""
    support, queries = near_pairs("in clusters", 60)
    support[7, 3], queries[5] = -math.inf, math.inf
    options = options | {"metric": metric}
    functions = (functools.partial(of_many, op, module, **options) for module in (fastda, fastda.reference))
    assert_as_accurate_as_reference(*functions, {"support": support, "queries": queries})


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_gradients_of_the_nearest_beside_points_that_are_infinitely_far(metric):
    support, queries = near_pairs("almost equal", 1100, 512)
    support[1099, 0] = math.inf  # in another block of classes than most
    functions = (
        lambda support, queries, module=module: module.nearest_prototype(queries, support, metric=metric)[0]
        for module in (fastda, fastda.reference)
    )
    assert_as_accurate_as_reference(*functions, {"support": support, "queries": queries})


def test_distances_of_a_class_are_not_all_off_by_what_its_norm_was_rounded_by():
    """On a grid, where nothing else is rounded alike in all of them; over the queries, the rest averages out."""
    draw = Draw(Sizes(features=64))
    prototypes, queries = ((4096 * draw.samples(count)).round() / 4096 for count in (60, 4096))
    exact = fastda.reference.pairwise_distance(queries.double(), prototypes.double())
    error = (fastda.pairwise_distance(queries, prototypes).double() - exact).mean(0) / exact.mean(0)
    assert error.square().mean().sqrt() < torch.finfo(torch.float32).eps / 10


@each_kind
@each_op_of_many
def test_gradients_of_pairs_that_are_near_do_not_depend_on_threads(kind, op, options):
    tensors = near_pairs(kind, 150, 520, 180)
    found = []
    for count in (1, 2, 3):
        with on_threads(count):
            leaves = [x.clone().requires_grad_() for x in tensors]
            result = of_many(op, fastda, *leaves, **options)
            found.append(torch.autograd.grad(result, leaves, random_like(result.detach(), 0)))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


@each_metric
def test_gradients_near_the_least_numbers_do_not_depend_on_threads(metric):
    leaves = [torch.randn(count, 640, requires_grad=True) for count in (300, 60)]
    labels, targets = torch.arange(300) % 60, torch.arange(60) % 60
    found = []
    for count in (1, 2, 3):
        with on_threads(count):
            loss = fastda.prototypical_loss(leaves[0], labels, leaves[1], targets, 60, metric=metric)
            found.append(torch.autograd.grad(loss, leaves, torch.tensor(1e-36)))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


@each_module
@each_metric
def test_an_empty_class_in_an_episode(module, metric):
    draw = Draw(Sizes(samples=6, others=4, classes=4, labels="gaps"), torch.float64)
    support, queries = draw.samples(6).requires_grad_(), draw.samples(4).requires_grad_()
    labels, targets = torch.tensor([0, 2, 2, 0, 2, 0]), torch.tensor([0, 2, 2, 0])
    loss = module.prototypical_loss(support, labels, queries, targets, 4, metric=metric)
    alone = module.prototypical_loss(support, labels // 2, queries, targets // 2, 2, metric=metric)
    assert_close(loss, alone)
    inputs = (support, queries)
    assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(alone, inputs))
    assert module.prototypical_loss(support, labels, queries, targets + 1, 4, metric=metric) == math.inf


@each_module
@each_metric
def test_one_class(module, metric):
    queries, prototypes = points(classes=1)
    targets = torch.zeros(4, dtype=torch.int64)
    loss = module.prototype_cross_entropy(queries, prototypes, targets, metric=metric)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (queries, prototypes)))


@each_module
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
def test_equal_points_are_at_distance_zero_with_gradient_zero(module, offset):
    draw = Draw(Sizes(features=64))
    prototypes = (draw.samples(5) + offset).requires_grad_()
    queries = prototypes.detach().clone().requires_grad_()
    distances = module.pairwise_distance(queries, prototypes, metric="euclidean").diagonal()
    assert (distances == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(distances.sum(), (queries, prototypes)))
    assert (module.pairwise_distance(queries, prototypes).diagonal() == 0).all()
    labels = torch.arange(5)
    loss = module.prototypical_loss(prototypes, labels, queries, labels, 5, metric="euclidean")
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (queries, prototypes)))


@each_module
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_points_close_together_and_far_from_zero(module, metric):
    """‖q‖² − 2q·p + ‖p‖² without a shift is off by half of the distance here."""
    draw = Draw(Sizes(features=64), torch.float64)
    prototypes = draw.samples(5, mean=10.0).float()
    queries = prototypes + draw.samples(5, deviation=0.07).float()
    exact = module.pairwise_distance(queries.double(), prototypes.double(), metric=metric)
    assert_close(module.pairwise_distance(queries, prototypes, metric=metric).double(), exact, rtol=1e-4, atol=1e-5)


@each_module
@pytest.mark.parametrize("metric, power", [("sqeuclidean", 1), ("euclidean", 0.5)])
def test_distances_right_to_1e_4_where_the_expansion_is_off_by_half(module, metric, power):
    """640 features offset by 10, with a spread of 0.01; as many queries and classes as are done in blocks."""
    draw = Draw(Sizes(features=640))
    queries, prototypes = (draw.samples(count, mean=10.0, deviation=0.01) for count in (70, 50))
    exact = (queries.double().unsqueeze(1) - prototypes.double()).square().sum(-1) ** power
    distances = module.pairwise_distance(queries, prototypes, metric=metric)
    assert ((distances - exact) / exact).abs().max() < 1e-4


@each_module
@each_metric
def test_logits_of_ten_thousand_give_finite_losses(module, metric):
    queries, prototypes = points(queries=50, classes=7)
    targets = torch.arange(50) % 7
    temperature = module.pairwise_distance(queries, prototypes, metric=metric).max().detach() / 1e4
    for dtype in (torch.float32, torch.float64):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (queries, prototypes)]
        loss = module.prototype_cross_entropy(*inputs, targets, metric=metric, temperature=temperature)
        assert loss.isfinite() and loss > 100
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, inputs))


@each_module
def test_cosine_at_the_zero_vector(module):
    queries = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    prototypes = torch.tensor([[0.0, 0.0], [4.0, 3.0], [-3.0, -4.0]], requires_grad=True)
    distances = module.pairwise_distance(queries, prototypes, metric="cosine")
    assert_close(distances, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.04, 2.0]]))
    for_queries, for_prototypes = torch.autograd.grad(distances.square().sum(), (queries, prototypes))
    assert (for_queries[0] == 0).all() and (for_prototypes[0] == 0).all()
    assert for_queries.isfinite().all() and for_prototypes.isfinite().all()


@each_module
@pytest.mark.parametrize("metric", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_extreme_lengths(module, metric, scale):
    """Cosine of vectors whose squares underflow or overflow; logits of ±10³⁰."""
    queries, prototypes = (scale * x.detach().float() for x in points())
    got = module.prototype_softmax(queries, prototypes, metric=metric)
    exact = module.prototype_softmax(queries.double(), prototypes.double(), metric=metric)
    assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


@each_module
def test_nearest_prototype(module):
    queries = torch.tensor([[0.9], [4.0]])
    prototypes = torch.tensor([[5.0], [0.0], [1.0], [5.0], [3.0]])
    distances, indices = module.nearest_prototype(queries, prototypes, metric="euclidean", k=3)
    assert indices.dtype == torch.int64
    assert indices.tolist() == [[2, 1, 4], [0, 3, 4]]  # ties to the lower index
    assert_close(distances, torch.tensor([[0.1, 0.9, 2.1], [1.0, 1.0, 1.0]]))
    assert module.nearest_prototype(queries, prototypes, k=5)[1].sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


@each_module
@each_metric
@given(pair=pairs, data=st.data())
def test_nearest_prototype_sorts_the_distances(module, metric, pair, data):
    queries, prototypes = pair
    k = data.draw(st.integers(1, len(prototypes)))
    distances, indices = module.nearest_prototype(queries, prototypes, metric=metric, k=k)
    everything = module.pairwise_distance(queries, prototypes, metric=metric)
    assert_close(distances, everything.sort(-1).values[:, :k])
    assert_close(everything.gather(-1, indices), distances)


# Many classes: they pass by in blocks of 2¹⁸ distances


def many(dtype=torch.float32, empty=()):
    """More queries and more classes than one block holds."""
    draw = Draw(Sizes(samples=600, others=530, features=12, classes=600), dtype)
    queries, prototypes, targets = draw.samples(530), draw.samples(600), draw.labels(530)
    prototypes[list(empty)] = math.nan
    return queries, prototypes, targets


def values_and_gradients(function, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = function(*leaves)
    return value, *torch.autograd.grad(value, leaves, random_like(value.detach(), 0))


@each_metric
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 3, "reduction": "none"}], ids=str)
def test_cross_entropy_of_many_classes(metric, options):
    queries, prototypes, targets = many(torch.float64, empty=(0, 517, 599))
    targets = torch.where((targets == 0) | (targets == 517) | (targets == 599), 3, targets)
    temperature = torch.tensor(3.0 if metric != "cosine" else 0.2, dtype=torch.float64)
    found = []
    for module in (fastda, fastda.reference):

        def loss(queries, prototypes, temperature, module=module):
            return module.prototype_cross_entropy(
                queries, prototypes, targets, metric=metric, temperature=temperature, **options
            )

        found.append(values_and_gradients(loss, queries, prototypes, temperature))
    assert_close(*found)


def calls_backward_op(run) -> bool:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    assert "fastda::prototype_cross_entropyBackward" in names  # the node, whatever it does
    return "fastda::prototype_cross_entropy_backward" in names


def forward_takes_gradients(classes=70, dtype=torch.float32, batch=(), queries=530, features=50):
    draw = Draw(Sizes(batch=batch, features=features), dtype)
    return draw.samples(queries), draw.samples(classes), draw.labels(queries).remainder(classes)


@pytest.mark.compiled_core
@each_metric
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "queries, features, classes, batch",
    [(530, 50, 70, ()), (530, 50, 1100, ()), (530, 50, 45, (2,)), (83, 90, 1100, ()), (90, 90, 45, (2,))],
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum", "ignore_index": 3}])
def test_gradients_taken_in_the_forward_pass(metric, dtype, queries, features, classes, batch, options):
    """Eager mode takes them there, in the gradient's own memory where features are as many as queries; torch.func takes
    the way through the backward op."""
    queries, prototypes, targets = forward_takes_gradients(classes, dtype, batch, queries, features)
    temperature = torch.tensor(0.3 if metric == "cosine" else 20.0)

    def loss(queries, prototypes, temperature):
        all_options = options | {"metric": metric, "temperature": temperature}
        return -3 * fastda.prototype_cross_entropy(queries, prototypes, targets, **all_options)

    leaves = [x.clone().requires_grad_() for x in (queries, prototypes, temperature)]
    value, taken = loss(*leaves), []
    assert not calls_backward_op(lambda: taken.extend(torch.autograd.grad(value, leaves)))
    expected = torch.func.grad(loss, argnums=(0, 1, 2))(queries, prototypes, temperature)
    rounding = 32 * torch.finfo(dtype).eps  # of sums of up to 1100 terms
    for got, exact in zip(taken, expected, strict=True):
        assert got.dtype == exact.dtype
        assert_close(got, exact, rtol=rounding, atol=rounding * exact.abs().max().item())


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("queries, features, classes", [(530, 50, 200), (130, 140, 1100), (600, 610, 70)])
def test_gradients_taken_in_the_forward_pass_do_not_depend_on_threads(queries, features, classes, needed):
    tensors = forward_takes_gradients(classes, queries=queries, features=features)
    found = []
    for count in (1, 2, 5):
        with on_threads(count):
            leaves = [x.clone().requires_grad_(need) for x, need in zip(tensors, needed)]
            loss = fastda.prototype_cross_entropy(*leaves, tensors[2], temperature=20.0)
            found.append((loss, *torch.autograd.grad(loss, [x for x in leaves if x.requires_grad])))
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=0, atol=0)


def test_gradients_taken_in_the_forward_pass_are_handed_over_once():
    queries, prototypes, targets = forward_takes_gradients()
    leaves = [queries.requires_grad_(), prototypes.requires_grad_()]
    loss = fastda.prototype_cross_entropy(*leaves, targets)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(loss, leaves, torch.tensor(2.0), retain_graph=True)
    assert_close(second, [2 * x for x in kept], rtol=0, atol=0)
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(x.requires_grad for x in with_graph)
    assert_close([x.detach() for x in with_graph], kept)
    last = torch.autograd.grad(loss, leaves[1:])
    assert_close(last, kept[1:], rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_gradients_taken_in_the_forward_pass_for_a_batch_of_incoming_ones():
    queries, prototypes, targets = forward_takes_gradients()
    leaves = [queries.requires_grad_(), prototypes.requires_grad_()]
    loss = fastda.prototype_cross_entropy(*leaves, targets, temperature=20.0)  # for probabilities to be near
    incoming = torch.tensor([1.0, -2.0, 0.5])
    batch = torch.autograd.grad(loss, leaves, incoming, retain_graph=True, is_grads_batched=True)
    one = torch.autograd.grad(loss, leaves)
    rounding = 32 * torch.finfo(torch.float32).eps
    for got, exact in zip(batch, one, strict=True):
        expected = incoming[:, None, None] * exact
        assert_close(got, expected, rtol=rounding, atol=rounding * expected.abs().max().item())


@pytest.mark.compiled_core
def test_gradients_taken_in_the_forward_pass_are_not_those_of_what_was_overwritten():
    queries, prototypes, targets = forward_takes_gradients()
    loss = fastda.prototype_cross_entropy(queries, prototypes.requires_grad_(), targets)
    queries.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.compiled_core
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes, features", [(4, 40), (60, 90), (60, 200)])
@pytest.mark.parametrize("shots", [2, 3, 5, 7, 11])
def test_gradients_of_the_support_are_divided_as_a_division_rounds(dtype, classes, features, shots):
    draw = Draw(Sizes(features=features), dtype)
    support, queries = (64 * draw.samples(classes)).round() / 64, draw.samples(70)  # the means of copies are exact
    found = []
    for count in (1, shots):
        copies = support.repeat(count, 1).requires_grad_()
        labels, targets = torch.arange(count * classes) % classes, torch.arange(70) % classes
        loss = fastda.prototypical_loss(copies, labels, queries.clone().requires_grad_(), targets, classes)
        found.append(torch.autograd.grad(loss, copies)[0])
    assert_close(found[1], (found[0] / shots).repeat(shots, 1), rtol=0, atol=0)


def test_a_temperature_beyond_float32():
    draw = Draw(Sizes(features=3))
    points, labels = draw.samples(6), torch.arange(6) % 4
    for module in (fastda, fastda.reference):
        loss = module.prototypical_loss(points, labels, points, labels, 4, temperature=1e300)
        assert_close(loss, torch.tensor(math.log(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_one_feature_cancel_but_for_rounding(dtype):
    """Each query pulls the only class that has support by 1, up or down; the reference has the sum without rounding."""
    queries, support = torch.randn(300, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    found = []
    for module in (fastda, fastda.reference):
        leaf = support.clone().requires_grad_()
        losses = module.prototypical_loss(
            leaf, torch.zeros(1, dtype=torch.long), queries, torch.ones(300, dtype=torch.long), 2, metric="euclidean"
        )
        found.append(torch.autograd.grad(losses, leaf)[0])
    assert_close(*found, rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.compiled_core
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_of_points_that_are_not_finite_are_taken_in_the_backward_pass(value):
    queries, prototypes, targets = forward_takes_gradients()
    prototypes[7] = value
    loss = fastda.prototype_cross_entropy(queries, prototypes.requires_grad_(), targets.clamp(min=8))
    assert calls_backward_op(loss.backward)


@pytest.mark.compiled_core
def test_gradients_of_too_many_near_pairs_to_be_held_are_taken_in_the_backward_pass():
    cluster = 9.0 * torch.randn(2, 40, dtype=torch.float64)
    queries, prototypes = (cluster[torch.arange(n) % 2] + torch.randn(n, 40, dtype=torch.float64) for n in (600, 1000))
    found = []
    for module in (fastda, fastda.reference):
        leaves = [x.clone().requires_grad_() for x in (queries, prototypes)]
        loss = module.prototype_cross_entropy(*leaves, torch.arange(600), temperature=4.0)
        found.append((loss, *torch.autograd.grad(loss, leaves, retain_graph=True)))
        assert module is fastda.reference or calls_backward_op(loss.backward)
    assert_close(*found)


def test_accuracy_of_a_cross_entropy_of_many_classes():
    queries, prototypes, targets = (x[:90] if i != 1 else x[:200] for i, x in enumerate(many()))
    functions = (
        lambda module=module, **tensors: module.prototype_cross_entropy(
            targets=targets % 200, temperature=3.0, **tensors
        )
        for module in (fastda, fastda.reference)
    )
    assert_as_accurate_as_reference(*functions, {"queries": queries + 100, "prototypes": prototypes + 100})


@each_metric
@pytest.mark.parametrize("name", ["pairwise_distance", "prototype_softmax", "prototype_log_softmax"])
def test_softmax_and_distances_of_many_classes(metric, name):
    queries, prototypes, _ = many(torch.float64, empty=(5,))
    options = {"metric": metric} | ({} if name == "pairwise_distance" else {"temperature": 4.0})
    found = []
    for module in (fastda, fastda.reference):

        def finite(queries, prototypes, module=module):
            return getattr(module, name)(queries, prototypes, **options).nan_to_num(0.0, 0.0, 0.0)

        found.append(values_and_gradients(finite, queries, prototypes))
    assert_close(*found)


@each_metric
def test_nearest_of_many_classes(metric):
    queries, prototypes, _ = many(torch.float64, empty=(0, 517))
    prototypes[598] = prototypes[11]  # a tie between the first block and the last
    queries[3], queries[529] = prototypes[598], prototypes[520]
    found = []
    for module in (fastda, fastda.reference):
        leaves = [x.clone().requires_grad_() for x in (queries, prototypes)]
        distances, indices = module.nearest_prototype(*leaves, metric=metric, k=3)
        incoming = random_like(distances.detach(), 0)
        found.append((distances, indices, *torch.autograd.grad(distances, leaves, incoming)))
    assert found[0][1][3, 0] == 11 and found[0][1][529, 0] == 520
    assert torch.equal(found[0][1], found[1][1])
    assert_close(found[0], found[1])


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("classes", [16, 33, 70])
@pytest.mark.parametrize("apart", [0.0, 1e2, 1e5])
def test_distances_within_clusters_far_apart(metric, classes, apart):
    """Products less a point near them all serve so many; no point is near these, and what cancels is taken exactly."""
    draw = Draw(Sizes(features=130))
    queries, prototypes = draw.samples(41), draw.samples(classes)
    queries[::2] += apart
    prototypes[1::2] += apart
    prototypes[3] = queries[4]
    got = fastda.pairwise_distance(queries, prototypes, metric=metric)
    exact = fastda.reference.pairwise_distance(queries.double(), prototypes.double(), metric=metric)
    assert_close(got.double(), exact, rtol=2e-6, atol=0.0)
    assert got[4, 3] == 0


@each_metric
def test_distances_of_many_where_some_are_not_finite_or_overflow(metric):
    draw = Draw(Sizes(features=20))
    queries, prototypes = draw.samples(40), draw.samples(40)
    queries[0, 3], queries[7, 0], queries[9] = math.nan, math.inf, -math.inf
    queries[11] *= 1e25
    prototypes[2, 5], prototypes[5, 1], prototypes[8] = math.nan, math.inf, math.nan
    prototypes[9] *= 1e19
    if metric == "cosine":  # the direction of an infinite vector has NaN of its own
        queries[[7, 9]], prototypes[5] = 1.0, 1.0
    got, expected = (
        module.pairwise_distance(queries, prototypes, metric=metric) for module in (fastda, fastda.reference)
    )
    assert_close(got, expected, rtol=2e-6, atol=1e-6, equal_nan=True)


@each_metric
@pytest.mark.parametrize("queries, classes", [(75, 5), (5, 75), (23, 23)])
def test_gradients_of_episodes_where_some_features_are_not_finite(metric, queries, classes):
    """The sample that serves as centre of the others' sum is a finite one; what reaches whom is as in the reference."""
    draw = Draw(Sizes(features=120))
    queries, prototypes = draw.samples(queries), draw.samples(classes)
    prototypes[0, 3] = math.nan
    queries[0, 4] = math.nan
    found = []
    for module in (fastda, fastda.reference):
        distances = functools.partial(module.pairwise_distance, metric=metric)
        found.append(values_and_gradients(distances, queries, prototypes))
    assert_close(*found, rtol=1e-5, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("features", [64, 60])
def test_gradients_larger_than_the_caches(features):
    """They are written past these where rows are whole cache lines, as 64 features are and 60 are not."""
    draw = Draw(Sizes(batch=(40,), samples=5, others=900, features=features, classes=5))
    support, queries, labels = draw.samples(5), draw.samples(900), torch.arange(5).expand(40, 5)
    targets = draw.labels(900)
    found = []
    for module in (fastda, fastda.reference):

        def loss(support, queries, module=module):
            return module.prototypical_loss(support, labels, queries, targets, 5, temperature=8.0)

        found.append(values_and_gradients(loss, support, queries))
    assert_close(*found, rtol=1e-5, atol=1e-7)


@pytest.mark.compiled_core
def test_a_single_plain_episode_is_checked_in_the_compiled_core(monkeypatch):
    """Anything else is checked in Python, with the same result."""
    draw = Draw(Sizes(samples=12, others=9, features=5, classes=3))
    support, labels, queries, targets = draw.samples(12), draw.labels(12), draw.samples(9), draw.labels(9)
    checked = []
    check = fastda.ops.prototypes.check_episode
    monkeypatch.setattr(fastda.ops.prototypes, "check_episode", lambda *args: checked.append(1) or check(*args))
    loss = fastda.prototypical_loss(support, labels, queries, targets, 3, temperature=2)
    assert not checked
    others = [
        ((support, labels.int(), queries, targets, 3), {"temperature": 2}),
        ((support, labels, queries, targets, 3), {"temperature": torch.tensor(2.0)}),
        ((support[None], labels[None], queries[None], targets[None], 3), {"temperature": 2}),
    ]
    for count, (episode, options) in enumerate(others, 1):
        assert_close(fastda.prototypical_loss(*episode, **options), loss, rtol=0, atol=0)
        assert len(checked) == count
    for temperature in (0.0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="^temperature: expected a number > 0, got "):
            fastda.prototypical_loss(support, labels, queries, targets, 3, temperature=temperature)
    with pytest.raises(ValueError, match="^query_labels: expected shape"):
        fastda.prototypical_loss(support, labels, queries, targets[:-1], 3)


def test_an_episode_of_many_classes():
    draw = Draw(Sizes(samples=700, others=60, features=8, classes=300), torch.float64)
    support, labels, queries, targets = draw.samples(700), draw.labels(700), draw.samples(60), draw.labels(60)
    found = []
    for module in (fastda, fastda.reference):
        leaves = [x.clone().requires_grad_() for x in (support, queries)]
        loss = module.prototypical_loss(leaves[0], labels, leaves[1], targets, 300)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
        with pytest.raises(IndexError, match="^query_labels: expected labels in 0 ... 299 .* got -1;"):
            module.prototypical_loss(support, labels, queries, targets.clone().fill_(-1), 300)
    assert_close(*found)


@pytest.mark.compiled_core
@pytest.mark.parametrize("classes", [100_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_memory_of_a_cross_entropy_over_a_million_classes(classes):
    """Beyond inputs and gradients less than 64 MB for a million; queries × classes alone is 256 MB."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(64, 128, generator=generator).requires_grad_()
    prototypes = torch.randn(classes, 128, generator=generator).requires_grad_()
    targets = torch.randint(classes, (64,), generator=generator)
    used = memory(fastda.prototype_cross_entropy, (queries, prototypes, targets), "cpu")
    assert used["peak"] > prototypes.numel() * 4  # the gradient, which is not counted below
    assert used["extra"] < 64e6 * max(classes / 1e6, 0.2)


@pytest.mark.parametrize("op", ["prototype_cross_entropy", "nearest_prototype"])
def test_half_precision_of_many_classes_is_that_of_float32(op):
    """Features are raised block by block."""
    queries, prototypes, targets = many(torch.bfloat16, empty=(7,))
    arguments = (queries, prototypes, *([targets.clamp_min(8)] if op == "prototype_cross_entropy" else []))
    raised = tuple(x.float() if x.is_floating_point() else x for x in arguments)
    assert_close(getattr(fastda, op)(*arguments), getattr(fastda, op)(*raised))


# Other libraries, each under its own convention, on an episode small enough to be worked out by hand:
# class 0 has its mean at (1, 0), class 1 at (0, 4); the query (1, 1) is at squared distances 1 and 10 from them.

SUPPORT = torch.tensor([[0.0, 3.0], [0.0, 0.0], [2.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 0, 1])
QUERY = torch.tensor([[1.0, 1.0]], dtype=torch.float64)


def gradients_of_episode(module, **options):
    support, query = SUPPORT.clone().requires_grad_(), QUERY.clone().requires_grad_()
    loss = module.prototypical_loss(support, LABELS, query, torch.tensor([0]), 2, **options)
    return loss, *torch.autograd.grad(loss, (support, query))


@each_module
@pytest.mark.parametrize("peer", ["easyfsl", "learn2learn and torchmeta"])
def test_an_episode_by_hand(module, peer):
    """easyfsl's logits are −‖q − p‖, learn2learn's and torchmeta's −‖q − p‖²."""
    root = math.sqrt(10.0)
    other = 1 / (1 + math.exp(root - 1 if peer == "easyfsl" else 9.0))  # the probability of class 1
    loss, of_support, of_query = gradients_of_episode(
        module, metric="euclidean" if peer == "easyfsl" else "sqeuclidean"
    )
    assert loss.item() == pytest.approx(math.log1p(math.exp(1 - root if peer == "easyfsl" else -9.0)), rel=1e-12)
    # ∂loss/∂d is `other` for class 0, −`other` for class 1; ∂d/∂q is (0, 1) and (1, −3)/√10, or twice (0, 1), (1, −3)
    near, far = ((0.0, 1.0), (1 / root, -3 / root)) if peer == "easyfsl" else ((0.0, 2.0), (2.0, -6.0))
    assert of_query[0].tolist() == pytest.approx([other * (a - b) for a, b in zip(near, far)], rel=1e-12)
    for sample, label in enumerate(LABELS.tolist()):
        by_distance, slope = (other, near) if label == 0 else (-other, far)
        assert of_support[sample].tolist() == pytest.approx([-by_distance * x / 2 for x in slope], rel=1e-12)


@each_module
def test_class_means_of_other_libraries(module):
    """easyfsl: NaN for a gap in the labels; torchmeta: zeros; learn2learn: the labels that occur, numbered anew."""
    labels = 2 * LABELS  # 0 and 2
    means = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    gap = torch.full((1, 2), math.nan, dtype=torch.float64)
    easyfsl = module.class_means(SUPPORT, labels, 3)
    assert_close(easyfsl, torch.cat([means[:1], gap, means[1:]]), equal_nan=True)
    torchmeta = module.class_means(SUPPORT, labels, 3, empty="zero")
    assert_close(torchmeta, torch.cat([means[:1], torch.zeros_like(gap), means[1:]]))
    known, renumbered = labels.unique(return_inverse=True)
    assert_close(module.class_means(SUPPORT, renumbered, len(known)), means)


@each_module
@given(shots=st.integers(1, 4), queries=st.integers(1, 6), classes=st.integers(2, 6), seed=st.integers(0, 2**16))
def test_episodes_under_the_conventions_of_other_libraries(module, shots, queries, classes, seed):
    """Their formulas written out, in float64, on a batch of two episodes."""
    sizes = Sizes(batch=(2,), samples=shots * classes, others=queries, features=5, classes=classes)
    draw = Draw(sizes, torch.float64, seed)
    support, labels, query, targets = (
        draw.samples(shots * classes),
        draw.labels(shots * classes),
        draw.samples(queries),
        draw.labels(queries),
    )
    members = F.one_hot(labels, classes).double()
    means = members.mT @ support / members.sum(1).unsqueeze(-1)
    squared = torch.stack(
        [((query - means[:, c : c + 1]) ** 2).sum(-1) for c in range(classes)], 1
    )  # (B, C, Q), torchmeta's
    assert_close(module.prototypical_loss(support, labels, query, targets, classes), F.cross_entropy(-squared, targets))
    roots = squared.mT.sqrt().flatten(0, 1)  # (B·Q, C), easyfsl's
    for temperature in (1.0, 0.4):  # easyfsl multiplies by it
        got = module.prototypical_loss(
            support, labels, query, targets, classes, metric="euclidean", temperature=1 / temperature
        )
        assert_close(got, F.cross_entropy(-temperature * roots, targets.flatten()))
    similarity = F.cosine_similarity(query.unsqueeze(2), means.unsqueeze(1), dim=-1)  # easyfsl's "cosine distance"
    got = module.prototypical_loss(support, labels, query, targets, classes, metric="cosine")
    assert_close(got, F.cross_entropy(similarity.flatten(0, 1), targets.flatten()))


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("num_classes", [5, 20, 50])
def test_support_that_is_nan_gets_no_gradient_from_queries_that_are(num_classes, metric):
    support = torch.randn(2 * num_classes, 48)
    labels = torch.arange(2 * num_classes) % num_classes
    support[labels == 3] = math.nan
    queries, query_labels = torch.randn(60, 48), torch.arange(60) % num_classes
    query_labels[query_labels == 3] = 0
    queries[1, 2] = math.nan
    grads = []
    for module in (fastda, fastda.reference):
        x = support.clone().requires_grad_()
        module.prototypical_loss(x, labels, queries, query_labels, num_classes, metric=metric).backward()
        grads.append(x.grad[labels == 3])
    assert torch.equal(grads[0], torch.zeros_like(grads[0])) and torch.equal(*grads)
