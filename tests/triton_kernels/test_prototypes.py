"""Prototypes on Triton, interpreted on CPU tensors: as exact as the reference, over metrics, sizes and layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from ops_under_test import BY_NAME, METRICS, Draw, Sizes
from strategies import LAYOUTS, describe, lay_out
from tolerance import assert_as_accurate_as_reference, is_floating, map_floating, results
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import fastda
import fastda.reference
from fastda import backend
from fastda.kernels import tiles

pytestmark = pytest.mark.usefixtures("on_triton", "poisoned_memory", "one_thread")
SERVED = [BY_NAME[name] for name in backend.KERNELS["triton"] if name in backend.PROTOTYPES]
each_served = pytest.mark.parametrize("op", SERVED, ids=str)
each_metric = pytest.mark.parametrize("metric", METRICS)
AGAINST = [op for op in SERVED if "prototypes" in op.arguments()]
each_of_prototypes = pytest.mark.parametrize("op", AGAINST, ids=str)
EPISODE, MEANS = BY_NAME["prototypical_loss"], BY_NAME["class_means"]
CROSS_ENTROPY, DISTANCE = BY_NAME["prototype_cross_entropy"], BY_NAME["pairwise_distance"]
NEAREST = BY_NAME["nearest_prototype"]


def check(op, arguments):
    assert_as_accurate_as_reference(op.of(fastda), op.of(fastda.reference), arguments)


@st.composite
def calls(draw, op):
    around = (1, 2, 15, 16, 17, 33)
    options = {name: draw(st.sampled_from(values)) for name, values in op.options.items()}
    # A direction of one feature is a sign, and its gradient 0 in the reference: test_cosine_of_one_feature.
    fewest = 2 if options.get("metric") == "cosine" else 1
    sizes = Sizes(
        batch=draw(st.sampled_from([(), (2,), (1, 2), (0,)])),
        samples=draw(st.sampled_from((0, *around))),
        others=draw(st.sampled_from((0, *around))),
        features=draw(st.sampled_from([n for n in (0, *around, 65) if n == 0 or n >= fewest])),
        classes=draw(st.sampled_from((2, 3, 5, 17))),
        labels=draw(st.sampled_from(("balanced", "unbalanced", "gaps", "one class"))),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    arguments = op.arguments(Draw(sizes, dtype, draw(st.integers(0, 2**16))), **options)
    for name, x in arguments.items():
        if is_floating(x) and name not in op.options:
            arguments[name] = lay_out(x, draw(st.sampled_from(LAYOUTS)))
    return arguments


@each_served
@given(data=st.data())
@settings(max_examples=2)
def test_values_and_gradients(op, data):
    arguments = data.draw(calls(op))
    note(describe(arguments))
    check(op, arguments)


@each_of_prototypes
def test_cosine_of_one_feature(op):
    """A direction is a sign, whose gradient is 0; here to rounding."""
    options = {name: values[0] for name, values in op.options.items()} | {"metric": "cosine"}
    arguments = op.arguments(Draw(Sizes(samples=5, others=5, features=1, classes=3)), **options)
    found = results(op.of(fastda), arguments)
    for name in ("queries", "prototypes"):
        terms = 5 / arguments[name].abs()  # as many as there are others, each of about 1 / ‖x‖
        assert (found[f"gradient of {name}"].abs() <= 8 * torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.slow
@each_served
@given(data=st.data())
@settings(max_examples=200)
def test_values_and_gradients_at_length(op, data):
    arguments = data.draw(calls(op))
    note(describe(arguments))
    check(op, arguments)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles and chunks from few queries and classes."""
    monkeypatch.setattr(tiles, "class_tile", lambda *_: tiles.Blocks(16, 16, 16, 4, 2))
    monkeypatch.setattr(tiles, "pull", lambda *_: (tiles.Blocks(16, 16, 16, 4, 2), 16))
    monkeypatch.setattr(tiles, "WEIGHTS", {True: 0, False: 0})


def several_tiles(op, metric, dtype=torch.float32, batch=(), **options):
    """More than one tile of queries, classes and features, and a class that is empty."""
    temperature = {"temperature": torch.tensor(0.5)} if "temperature" in op.options else {}
    draw = Draw(Sizes(batch=batch, others=18, features=19, classes=35), dtype)
    arguments = op.arguments(draw, metric=metric, **temperature, **options)
    arguments["prototypes"][..., 3, :] = torch.nan
    if "targets" in arguments:
        arguments["targets"][arguments["targets"] == 3] = 4
    return arguments


@each_metric
def test_several_tiles_and_chunks(metric, small_tiles):
    batch = (2,) if metric == "sqeuclidean" else ()
    check(CROSS_ENTROPY, several_tiles(CROSS_ENTROPY, metric, batch=batch, label_smoothing=0.2, ignore_index=0))


@pytest.mark.slow
@each_metric
@each_of_prototypes
def test_several_tiles_and_chunks_of_each_op(op, metric, small_tiles):
    check(op, several_tiles(op, metric, batch=(2,)))


@pytest.mark.parametrize(
    "metric, dtype",
    [
        ("sqeuclidean", torch.bfloat16),
        ("euclidean", torch.float16),
        ("cosine", torch.bfloat16),
        *(pytest.param(metric, torch.float16, marks=pytest.mark.slow) for metric in ("sqeuclidean", "cosine")),
        pytest.param("euclidean", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_half_precision_products(metric, dtype, small_tiles, half_products):
    """Right to the rounding of the weights; the interpreter rounds to bfloat16 towards zero."""
    arguments = several_tiles(CROSS_ENTROPY, metric, dtype)
    got = results(fastda.prototype_cross_entropy, arguments)
    expected = results(fastda.reference.prototype_cross_entropy, map_floating(arguments, lambda _, x: x.double()))
    for name, result in got.items():
        allowed = 1e-5 if name in ("output 0", "gradient of temperature") else 4 * torch.finfo(dtype).eps
        assert (result.double() - expected[name]).norm() <= allowed * expected[name].norm(), name


@pytest.mark.parametrize(
    "metric, dtype, k",
    [
        ("sqeuclidean", torch.float32, 1),
        ("sqeuclidean", torch.bfloat16, 3),
        ("euclidean", torch.float64, 40),
        pytest.param("euclidean", torch.float64, 3, marks=pytest.mark.slow),
        pytest.param("sqeuclidean", torch.float32, 40, marks=pytest.mark.slow),
    ],
)
def test_nearest_in_order(metric, dtype, k, small_tiles):
    """Ties go to the lower index, over tiles and chunks of classes; NaN comes last, and empty classes after it."""
    draw = Draw(Sizes(), dtype)
    queries, some = draw.normal(2, 18, 5), draw.normal(2, 20, 5)
    some[:, 2], some[:, 7, 1], some[:, 5, 0] = torch.nan, torch.nan, torch.inf
    prototypes = torch.cat((some, some), 1)
    got = fastda.nearest_prototype(queries, prototypes, metric=metric, k=k)
    expected = fastda.reference.nearest_prototype(queries, prototypes, metric=metric, k=k)
    assert torch.equal(got[1], expected[1])
    assert_close(got[0], expected[0], equal_nan=True)


@each_metric
def test_gradients_of_several_neighbours(metric, small_tiles, heuristic):
    """Which are found in slots and by sorting alike."""
    arguments = several_tiles(NEAREST, metric) | {"k": 3}
    check(NEAREST, arguments)
    found = fastda.nearest_prototype(**arguments)
    heuristic("MOST_SLOTS", 2)
    for one, other in zip(found, fastda.nearest_prototype(**arguments)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_products_far_from_zero(dtype, small_tiles, half_products):
    """Squares of 10⁵ beside distances of 10: float32 sums of products that are not centred are off by 0.02 and more."""
    draw = Draw(Sizes(features=64))
    queries, prototypes = (draw.normal(20, 64, mean=40.0, deviation=0.3).to(dtype) for _ in range(2))
    got = fastda.pairwise_distance(queries, prototypes)
    exact = fastda.reference.pairwise_distance(queries.double(), prototypes.double())
    assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)
    assert (fastda.pairwise_distance(queries, queries, metric="euclidean").diagonal() == 0).all()


@pytest.fixture
def tf32_products(monkeypatch):
    """Products that are to be taken in TF32 read 10 bits of mantissa of their operands; the interpreter reads all."""
    import numpy as np
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    exact = interpreter.InterpreterBuilder.create_dot

    def read(operand):
        bits = operand.data.astype(np.float32).view(np.int32) & -0x2000
        return interpreter.TensorHandle(bits.view(np.float32), operand.dtype)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision == ir.INPUT_PRECISION.TF32:
            a, b = read(a), read(b)
        return exact(self, a, b, d, input_precision, max_num_imprecise_acc)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_float16_gradients_far_from_zero(metric, small_tiles, half_products, tf32_products):
    """Weights that TF32 products round, and sums of them do not, would leave their rounding times the mean."""
    draw = Draw(Sizes(features=64))
    queries, prototypes = (draw.normal(20, 64, mean=40.0, deviation=0.3).half() for _ in range(2))
    arguments = {"queries": queries, "prototypes": prototypes, "metric": metric}
    got = results(fastda.pairwise_distance, arguments)
    expected = results(fastda.reference.pairwise_distance, map_floating(arguments, lambda _, x: x.double()))
    for name in ("gradient of queries", "gradient of prototypes"):
        allowed = torch.finfo(torch.float16).eps * expected[name].norm()
        assert (got[name].double() - expected[name]).norm() <= allowed, name


@pytest.mark.parametrize("value", [1.0, -3.0, 1e-30, 0.0, torch.inf, -torch.inf, torch.nan])
def test_rounded_to_tf32(value):
    """To nearest, within half of the last of 10 bits of mantissa; what is not finite stays, NaN of all bits too."""
    from rounding_kernels import round_kernel

    x = value * (1 + torch.rand(64, generator=torch.Generator().manual_seed(0)))
    if value != value:
        x = torch.full((64,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    out = torch.empty(64)
    round_kernel[(1,)](x, out)
    assert_close(out, x, rtol=2.0**-11, atol=0.0, equal_nan=True)
    assert (out.view(torch.int32) % 2**13 == 0)[out.isfinite()].all()


def with_a_bad_element(op, bad, place):
    arguments = op.arguments(Draw(Sizes(batch=(2,), features=16)))
    names = list(op.differentiable(arguments))
    arguments[names[place % len(names)]].view(-1)[3] = bad
    return arguments


@each_served
@pytest.mark.parametrize("place", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nan_propagates_as_in_the_reference(op, place):
    check(op, with_a_bad_element(op, torch.nan, place))


@each_served
@pytest.mark.parametrize("place", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_inf_propagates_as_in_the_reference(op, place):
    """But for whether its own gradient is infinite or NaN: Σ w (x − y) of an infinite x, with w of any signs."""
    arguments = with_a_bad_element(op, torch.inf, place)
    got, expected = results(op.of(fastda), arguments), results(op.of(fastda.reference), arguments)
    for name, result in got.items():
        if name.startswith("gradient"):
            assert torch.equal(result.isfinite(), expected[name].isfinite())
            result, expected[name] = (x.where(x.isfinite(), 0) for x in (result, expected[name]))
        assert_close(result, expected[name], equal_nan=True)


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
def test_distances_far_from_zero_and_of_equal_points(metric):
    draw = Draw(Sizes(features=64))
    queries, prototypes = (draw.normal(5, 64, mean=10.0, deviation=0.01) for _ in range(2))
    prototypes[2] = queries[1]
    arguments = {"queries": queries, "prototypes": prototypes, "metric": metric}
    check(DISTANCE, arguments)
    got = results(fastda.pairwise_distance, arguments)["output 0"]
    assert got[1, 2] == 0 and (got > 0).sum() == 24
    check(NEAREST, arguments | {"k": 2})
    distances, indices = fastda.nearest_prototype(**arguments)
    assert torch.equal(indices.squeeze(-1), got.argmin(-1)) and distances[1] == 0
    labels = torch.arange(5)
    episode = {"support": prototypes, "support_labels": labels, "queries": queries, "query_labels": labels}
    check(EPISODE, episode | {"num_classes": 5, "metric": metric})


def near_duplicates(dtype):
    """Each query 10⁻⁴ from a prototype of its own, both far from the others."""
    draw = Draw(Sizes(), dtype)
    prototypes = draw.normal(20, 33)
    return prototypes[torch.arange(24) % 20] + 1e-4 * draw.normal(24, 33), prototypes


def far_clusters(dtype):
    """Four clusters of classes, 30 apart, with members 1.4 apart."""
    draw = Draw(Sizes(), dtype)
    of_clusters, nearby = draw.normal(4, 33) * (30 / 66**0.5), draw.normal(44, 33) / 33**0.5
    points = of_clusters[torch.arange(44) % 4] + nearby
    return points[20:], points[:20]


@pytest.mark.parametrize("op", [*AGAINST, EPISODE], ids=str)
@pytest.mark.parametrize(
    "points, metric, dtype",
    [
        (near_duplicates, "euclidean", torch.float32),
        (far_clusters, "sqeuclidean", torch.float64),
        (near_duplicates, "sqeuclidean", torch.float16),
        pytest.param(near_duplicates, "sqeuclidean", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(near_duplicates, "euclidean", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(near_duplicates, "euclidean", torch.float16, marks=pytest.mark.slow),
        pytest.param(far_clusters, "euclidean", torch.float16, marks=pytest.mark.slow),
        pytest.param(near_duplicates, "euclidean", torch.float64, marks=pytest.mark.slow),
        pytest.param(far_clusters, "euclidean", torch.float32, marks=pytest.mark.slow),
        pytest.param(near_duplicates, "sqeuclidean", torch.float32, marks=pytest.mark.slow),
        pytest.param(far_clusters, "sqeuclidean", torch.float32, marks=pytest.mark.slow),
    ],
)
def test_pairs_much_nearer_to_each_other_than_to_the_centre(points, op, metric, dtype, small_tiles):
    """Products of centred points cancel there, in distances and in gradients."""
    queries, prototypes = points(dtype)
    labels = (torch.arange(24) + 4) % 20  # of the same cluster, but not of the nearest
    if op is EPISODE:
        support = {"support": prototypes, "support_labels": torch.arange(20), "queries": queries}
        arguments = support | {"query_labels": labels, "num_classes": 20, "reduction": "none"}
    else:
        arguments = {"queries": queries, "prototypes": prototypes}
        arguments |= {"targets": labels} if op is CROSS_ENTROPY else {}
    check(op, arguments | {"metric": metric})


@each_metric
def test_the_zero_vector(metric):
    draw = Draw(Sizes(others=4, classes=3))
    arguments = DISTANCE.arguments(draw, metric=metric)
    arguments["queries"][1] = 0
    arguments["prototypes"][:2] = 0
    check(DISTANCE, arguments)
    labels = torch.tensor([0, 1, 2, 2])
    episode = {"support": arguments["prototypes"], "support_labels": labels[:3], "queries": arguments["queries"]}
    check(EPISODE, episode | {"query_labels": labels, "num_classes": 3, "metric": metric})


def test_labels_out_of_range_make_their_row_nan():
    """As on a GPU: raising would synchronise. Nothing goes to a gradient."""
    labels = torch.tensor([3, -1, 2**40])
    arguments = CROSS_ENTROPY.arguments(Draw(Sizes(batch=(2,))), reduction="none")
    arguments["targets"][1, 1:4] = labels
    found = results(fastda.prototype_cross_entropy, arguments)
    assert found["output 0"].isnan().nonzero().tolist() == [[1, 1], [1, 2], [1, 3]]
    assert (found["gradient of queries"][1, 1:4] == 0).all() and found["gradient of prototypes"].isfinite().all()
    arguments = EPISODE.arguments(Draw(Sizes(batch=(4,))), reduction="none")
    arguments["query_labels"][0, 1:4], arguments["support_labels"][1:, 0] = labels, labels
    found = results(fastda.prototypical_loss, arguments)
    assert found["output 0"].isnan().sum(-1).tolist() == [3, 5, 5, 5]
    assert (found["gradient of queries"][0, 1:4] == 0).all() and (found["gradient of support"][1:] == 0).all()
    arguments = MEANS.arguments(Draw(Sizes(batch=(4,))), empty="zero")
    arguments["labels"][1:, 0] = labels
    found = results(fastda.class_means, arguments)
    assert found["output 0"].isnan().flatten(1).all(-1).tolist() == [False, True, True, True]
    assert (found["gradient of support"][1:] == 0).all()


def test_class_means_of_sorted_labels(heuristic):
    """Where there are many of both, the samples of a class are found by sorting the labels."""
    heuristic("SCANNED_LABELS", 0)
    for labels in ("unbalanced", "gaps"):
        check(MEANS, MEANS.arguments(Draw(Sizes(batch=(2,), samples=70, features=5, classes=4, labels=labels))))


@each_served
def test_the_same_call_gives_the_same_bits(op):
    arguments = op.arguments(Draw(Sizes(samples=20, others=17)))
    first, second = (results(op.of(fastda), arguments) for _ in range(2))
    for name, result in first.items():
        assert torch.equal(result.nan_to_num(7.0), second[name].nan_to_num(7.0)), name


@each_served
def test_a_gradient_for_one_input_alone(op):
    arguments = op.arguments(Draw(Sizes(others=17)))
    everything = results(op.of(fastda), arguments)
    for name in op.differentiable(arguments):
        others = tuple(other for other in op.differentiable(arguments) if other != name)
        alone = results(op.of(fastda), arguments, constant=others)
        assert torch.equal(alone[f"gradient of {name}"], everything[f"gradient of {name}"])


@pytest.mark.parametrize("episodes", [(), (64,)])
def test_a_batch_of_episodes_takes_two_launches_forward_and_two_backward(episodes):
    """Counted on the meta device."""
    from fastda.kernels.triton import problem, prototype_classes

    support, queries = (torch.empty(*episodes, n, 640, device="meta") for n in (5, 75))
    labels = [torch.empty(*episodes, n, device="meta", dtype=torch.int64) for n in (5, 75)]
    tensors = support, queries, torch.empty(episodes, device="meta"), *labels
    problem.noted.clear()
    loss, *saved = prototype_classes.prototypical_loss(*tensors, 5, "sqeuclidean", "mean")
    assert len(problem.noted) == 2
    constants = (5, "sqeuclidean", "mean", True, True, True)
    prototype_classes.prototypical_loss_backward(loss, *tensors, *saved, *constants)
    assert len(problem.noted) == 4
    problem.noted.clear()


class AllocatedBytes(TorchDispatchMode):
    """Of the tensors that are made, freed or not; on the meta device a GPU's."""

    def __enter__(self):
        self.bytes = 0
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "empty" in str(function):
            self.bytes += result.nbytes
        return result


def test_memory_of_a_cross_entropy_of_many_classes():
    """Beyond inputs and results at most 1 % of queries × classes in float32."""
    from fastda.kernels.triton import problem, prototypes

    queries, classes = (torch.empty(n, 512, device="meta", dtype=torch.bfloat16) for n in (8192, 100_000))
    tensors = queries, classes, torch.empty((), device="meta"), torch.empty(8192, device="meta", dtype=torch.int64)
    with AllocatedBytes() as forward:
        results = prototypes.prototype_cross_entropy(*tensors, -100, 0.0, "sqeuclidean", "mean")
    with AllocatedBytes() as backward:
        grads = prototypes.prototype_cross_entropy_backward(
            results[0], *tensors, *results[1:], -100, 0.0, "sqeuclidean", "mean", True, True, False
        )
    problem.noted.clear()
    assert forward.bytes < backward.bytes - sum(grad.nbytes for grad in grads[:2]) < 0.0125 * 8192 * 100_000 * 4


def test_memory_of_the_nearest_of_many_classes():
    """Beyond inputs and results less than 1 % of queries × classes in float32; of many neighbours some per cent."""
    from fastda.kernels.triton import nearest_prototype, problem

    queries, classes = (torch.empty(n, 640, device="meta") for n in (256, 100_000))
    for k, share in ((1, 0.01), (32, 0.05)):
        with AllocatedBytes() as allocated:
            results = nearest_prototype.nearest_prototype(queries, classes, k, "sqeuclidean")
        problem.noted.clear()
        assert allocated.bytes - sum(x.nbytes for x in results) < share * 256 * 100_000 * 4


@each_metric
def test_second_derivatives_and_vmap(metric):
    arguments = EPISODE.arguments(Draw(Sizes(batch=(2,)), torch.float64), metric=metric)
    support, labels, queries, targets, num_classes = list(arguments.values())[:5]
    support.requires_grad_()

    def second(module):
        loss = module.prototypical_loss(support, labels, queries, targets, num_classes, metric=metric)
        (gradient,) = torch.autograd.grad(loss, support, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), support)[0]

    assert_close(second(fastda), second(fastda.reference))

    def each(module):
        def loss(support, *rest):
            return module.prototypical_loss(support, *rest, num_classes, metric=metric)

        return torch.func.vmap(torch.func.grad(loss))(support, labels, queries, targets)

    per_episode = [each(module) for module in (fastda, fastda.reference)]
    assert_close(*per_episode)


def test_a_direct_call_is_checked():
    x, labels, t = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64), torch.ones(())
    ops = torch.ops.fastda
    with pytest.raises(ValueError, match="labels: expected int64 of shape"):
        ops.class_means(x, labels[:2], 3, "nan")
    with pytest.raises(ValueError, match="queries: expected the batch dimensions and features of support"):
        ops.prototypical_loss(x, torch.ones(3, 6), t, labels, labels, 3, "sqeuclidean", "mean")
    with pytest.raises(ValueError, match="prototypes: expected the batch dimensions and features of queries"):
        ops.pairwise_distance(x, torch.ones(3, 6), "sqeuclidean")
    with pytest.raises(ValueError, match="k: expected 1 ... 3"):
        ops.nearest_prototype(x, x, 4, "sqeuclidean")
    with pytest.raises(TypeError, match="prototypes: expected torch.float32"):
        ops.pairwise_distance(x, x.double(), "sqeuclidean")
