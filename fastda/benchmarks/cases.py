"""What is measured: sizes, inputs, the work that cannot be avoided, and the figures to reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fewshot, training_steps

FORMULA = ("reference", "reference compiled")
BY_HAND = ("careful", "careful compiled")
LARGEST_REFERENCE = 2e9  # bytes of differences beyond which the naive reference is no honest opponent
DRY_RUN_SIZE = 8


@dataclass(frozen=True)
class Figure:
    """A figure to reach.

    `quantity` is "speed" (time of the fastest side of `against`, every baseline by default, over the time of the fused
    op; at least `bound`), "memory" (bytes beyond arguments and results over those of the queries × classes matrix; at
    most `bound`), "megabytes" (millions of those bytes; at most `bound`), "seconds" (of the fused op on two cores
    or more; at most `bound`) or "limit" (share of the machine's limit; at least `bound`).
    """

    bound: float
    against: tuple[str, ...] | None = None
    quantity: str = "speed"

    def __str__(self) -> str:
        if self.quantity == "memory":
            return f"extra memory ≤ {self.bound:.0%} of the Q×C matrix"
        if self.quantity == "megabytes":
            return f"extra memory, MB ≤ {self.bound:g}"
        if self.quantity == "seconds":
            return f"seconds on two cores ≤ {self.bound:g}"
        if self.quantity == "limit":
            return f"≥ {self.bound:.0%} of the limit"
        return f"≥ {self.bound:g} × {' / '.join(self.against) if self.against else 'best baseline'}"


@dataclass(frozen=True)
class Work:
    """What no implementation can avoid: floating-point operations, and bytes read and written."""

    flops: float
    bytes: float


@dataclass(frozen=True, eq=False)
class Case:
    """One row of the benchmarks."""

    name: str
    topic: str
    op: str
    sizes: dict[str, int]
    make: Callable[[dict[str, int], Callable[..., Tensor], Callable[..., Tensor]], tuple]
    count: Callable[[dict[str, int], int], Work]
    figures: tuple[Figure, ...] = ()
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    differentiable: bool = True
    phase: str = "both"  # what the figures, and the share of the limit, are about
    constants: tuple[int, ...] = ()  # positions of floating arguments that get no gradient
    patience: float = 1.0  # how many times the budget the sides that decide about its figures take

    @property
    def work(self) -> Work:
        return self.count(self.sizes, self.dtype.itemsize)

    def arguments(self, seed: int = 0) -> tuple:
        """What the op is called with; features ask for gradients where the case has a backward pass."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        def labels(num_classes: int, *shape: int) -> Tensor:
            """Each class equally often, in random order."""
            count = shape[-1]
            each = torch.arange(count, device=self.device) % num_classes
            return each[torch.rand(shape, generator=generator, device=self.device).argsort(-1)]

        arguments = self.make(self.sizes, normal, labels)
        for i, x in enumerate(arguments):
            if isinstance(x, Tensor) and x.is_floating_point():
                x.requires_grad_(self.differentiable and i not in self.constants)
        return arguments

    @property
    def difference_bytes(self) -> int:
        """Size of the reference's tensor of differences between queries and prototypes."""
        if "queries" not in self.sizes:
            return 0
        axes = ("episodes", "queries", "classes", "features")
        return math.prod(self.sizes.get(axis, 1) for axis in axes) * self.dtype.itemsize

    @property
    def beyond_reference(self) -> bool:
        """Whether the differences are so large that careful code has to stand in for the reference."""
        return self.difference_bytes > LARGEST_REFERENCE

    @property
    def logits_bytes(self) -> int:
        """Size of the float32 matrix of queries × classes."""
        return self.sizes["queries"] * self.sizes["classes"] * 4

    def tiny(self, device: str) -> Case:
        """The same path with sizes of a few elements, for a dry run."""
        sizes = {name: min(size, DRY_RUN_SIZE) for name, size in self.sizes.items()}
        return dataclasses.replace(self, name=f"{self.name}, tiny", sizes=sizes, device=device)


@dataclass(frozen=True)
class Sweep:
    """Time against one size, which doubles from case to case; some sides only, with all cores."""

    name: str
    axis: str  # the size that grows
    cases: tuple[Case, ...]
    sides: tuple[str, ...]
    growth_from: int  # the size from which the growth a doubling is fitted: below, what a call costs anyway hides it

    def tiny(self, device: str) -> Sweep:
        """The same with sizes of a few elements, for a dry run."""
        cases = []
        for case in self.cases:
            sizes = case.tiny(device).sizes | {self.axis: case.sizes[self.axis] // 64}
            cases.append(dataclasses.replace(case, name=f"{case.name}, tiny", sizes=sizes, device=device))
        return dataclasses.replace(self, cases=tuple(cases), growth_from=self.growth_from // 64)


@dataclass(frozen=True)
class GroupFigure:
    """A figure for the geometric mean over several cases."""

    name: str
    cases: tuple[str, ...]
    figure: Figure


# Inputs


def _domains(sizes, normal, labels) -> tuple[Tensor, Tensor]:
    """Two domains that differ in mean and spread."""
    shape = (sizes["samples"], sizes["features"])
    if "batch" in sizes:
        shape = (sizes["batch"], *shape)
    return normal(*shape), 1.2 * normal(*shape) + 0.5


def _samples(sizes, normal, labels) -> tuple[Tensor]:
    shape = (sizes["samples"], sizes["features"])
    return (normal(*((sizes["batch"], *shape) if "batch" in sizes else shape)),)


def _embedding(normal, *shape: int) -> Tensor:
    """Features whose squared distances differ by a few units, so that the softmax is not one-hot."""
    return normal(*shape) * shape[-1] ** -0.25


def _episode(sizes, normal, labels) -> tuple:
    batch = (sizes["episodes"],) if "episodes" in sizes else ()
    num_classes, features = sizes["classes"], sizes["features"]
    num_support = num_classes * sizes["shots"]
    return (
        _embedding(normal, *batch, num_support, features),
        labels(num_classes, *batch, num_support),
        _embedding(normal, *batch, sizes["queries"], features),
        labels(num_classes, *batch, sizes["queries"]),
        num_classes,
    )


def _sure_episode(sizes, normal, labels) -> tuple:
    """Features of variance 1, of which a softmax is sure: most probabilities are too small to be normal numbers."""
    support, support_labels, queries, *rest = _episode(sizes, normal, labels)
    scale = sizes["features"] ** 0.25
    return scale * support, support_labels, scale * queries, *rest


def _episode_of_classes_apart(sizes, normal, labels) -> tuple:
    """Features as a trained network has them: each class around a point of its own, which is nearer than the others."""
    support, support_labels, queries, query_labels, num_classes = _episode(sizes, normal, labels)
    middle = _embedding(normal, num_classes, sizes["features"]) / 2  # not so far apart that answers are sure
    support, queries = middle[support_labels] + support / 4, middle[query_labels] + queries / 4
    return support, support_labels, queries, query_labels, num_classes


_EPISODES = {"": _episode, "sure answers": _sure_episode, "classes apart": _episode_of_classes_apart}


def _many_classes(sizes, normal, labels) -> tuple:
    queries = _embedding(normal, sizes["queries"], sizes["features"])
    prototypes = _embedding(normal, sizes["classes"], sizes["features"])
    return queries, prototypes, labels(sizes["classes"], sizes["queries"])


def _nearest(sizes, normal, labels) -> tuple:
    return _many_classes(sizes, normal, labels)[:2]


def _support(sizes, normal, labels) -> tuple:
    num_support = sizes["classes"] * sizes["shots"]
    return normal(num_support, sizes["features"]), labels(sizes["classes"], num_support), sizes["classes"]


def _features_and_lambda(sizes, normal, labels) -> tuple:
    return normal(sizes["samples"], sizes["features"]), 0.3


def _domain_logits(sizes, normal, labels) -> tuple:
    return 3 * normal(sizes["samples"]), 3 * normal(sizes["samples"])


def _features_and_lambda_on_device(sizes, normal, labels) -> tuple:
    return normal(sizes["samples"], sizes["features"]), normal(1).fill_(0.3)


def _linear_fork(sizes, normal, labels) -> tuple:
    samples, features, hidden = sizes["samples"], sizes["features"], sizes["hidden"]
    return normal(samples, features), normal(hidden, features) * features**-0.5, normal(hidden), 0.3


def _training_step(sizes, normal, labels) -> tuple:
    """Images of both domains, labels for all of them, and the network."""
    shape = (sizes["samples"], 1, sizes["side"], sizes["side"])
    images = normal(*shape), 1.2 * normal(*shape) + 0.5
    return (*images, labels(sizes["classes"], 2 * sizes["samples"]), *training_steps.parameters(sizes, normal))


def _maml(sizes, normal, labels) -> tuple:
    """Sine curves would need more than normal numbers; curves of any shape cost the same."""
    shape = sizes["tasks"], sizes["shots"], 1
    return (*(normal(*shape) for _ in range(4)), *fewshot.parameters(sizes, normal))


def _episodes_with_classes(sizes, normal, labels) -> tuple:
    """Episodes whose classes lie so far apart that most queries are answered rightly."""
    support, support_labels, queries, query_labels, num_classes = _episode(sizes, normal, labels)
    centres = 0.25 * normal(sizes["episodes"], num_classes, sizes["features"]) * sizes["features"] ** -0.25
    each = [
        x + centres.gather(1, y.unsqueeze(-1).expand(x.shape))
        for x, y in ((support, support_labels), (queries, query_labels))
    ]
    return each[0], support_labels, each[1], query_labels


# Work. A product is counted once forward and twice backward; of a symmetric matrix only half is counted.


def _coral_work(sizes, itemsize) -> Work:
    samples, features = 2 * sizes["samples"], sizes["features"]
    batch = sizes.get("batch", 1)
    products = 3 * samples * features * min(samples, features)
    return Work(batch * products, batch * 2 * samples * features * itemsize)


def _covariance_work(sizes, itemsize) -> Work:
    samples, features = sizes["samples"], sizes["features"]
    batch = sizes.get("batch", 1)
    matrix_bytes = 2 * features**2 * 4  # the covariance and its incoming gradient are float32
    return Work(batch * 3 * samples * features**2, batch * (2 * samples * features * itemsize + matrix_bytes))


def _episode_work(sizes, itemsize) -> Work:
    rows = sizes["classes"] * sizes["shots"] + sizes["queries"]
    episodes = sizes.get("episodes", 1)
    flops = 6 * sizes["queries"] * sizes["classes"] * sizes["features"]
    return Work(episodes * flops, episodes * 2 * rows * sizes["features"] * itemsize)


def _cross_entropy_work(sizes, itemsize) -> Work:
    """Three products: the logits, and one for each gradient."""
    queries, classes, features = sizes["queries"], sizes["classes"], sizes["features"]
    return Work(6 * queries * classes * features, 2 * (queries + classes) * features * itemsize)


def _recomputing_cross_entropy_work(sizes, itemsize) -> Work:
    """Four products: a kernel that keeps no queries × classes matrix forms the logits again for the gradient."""
    work = _cross_entropy_work(sizes, itemsize)
    return Work(work.flops / 3 * 4, work.bytes)


def _nearest_work(sizes, itemsize) -> Work:
    queries, classes, features = sizes["queries"], sizes["classes"], sizes["features"]
    return Work(2 * queries * classes * features, (queries + classes) * features * itemsize)


def _class_means_work(sizes, itemsize) -> Work:
    """Forward: the support is read, the means are written."""
    classes, shots, features = sizes["classes"], sizes["shots"], sizes["features"]
    return Work(classes * shots * features, classes * (shots + 1) * features * itemsize)


def _fork_work(sizes, itemsize) -> Work:
    """Two incoming gradients are read, one is written."""
    elements = sizes["samples"] * sizes["features"]
    return Work(2 * elements, 3 * elements * itemsize)


def _linear_fork_work(sizes, itemsize) -> Work:
    """The fork's gradients, the layer's weight and its gradient; one product forward, two backward."""
    samples, features, hidden = sizes["samples"], sizes["features"], sizes["hidden"]
    return Work(6 * samples * features * hidden, (3 * samples * features + 2 * hidden * features) * itemsize)


def _training_step_work(sizes, itemsize) -> Work:
    """The products of the network, for both domains: one forward, two backward, but no gradient for the images."""
    first, second = training_steps.CHANNELS
    pixels, features = sizes["side"] ** 2, sizes["features"]
    convolution = first * 9 * pixels
    rest = second * first * 9 * pixels / 4 + second * (sizes["side"] // 4) ** 2 * features
    images = 2 * sizes["samples"]
    return Work(images * (4 * convolution + 6 * rest), 2 * images * pixels * itemsize)


def _maml_work(sizes, itemsize) -> Work:
    """Of each task, the products of both passes and of the second derivative: by formula ten times the network's."""
    points = sizes["tasks"] * sizes["shots"]
    products = 2 * points * (fewshot.HIDDEN**2 + 2 * fewshot.HIDDEN)
    return Work(10 * products, 4 * points * itemsize)


def _evaluation_work(sizes, itemsize) -> Work:
    """Support and queries are read, once; one product."""
    rows = sizes["episodes"] * (sizes["classes"] * sizes["shots"] + sizes["queries"])
    flops = 2 * sizes["episodes"] * sizes["queries"] * sizes["classes"] * sizes["features"]
    return Work(flops, rows * sizes["features"] * itemsize)


def _domain_loss_work(sizes, itemsize) -> Work:
    """Logits are read, gradients written; a dozen operations a logit."""
    return Work(2 * 12 * sizes["samples"], 2 * 2 * sizes["samples"] * itemsize)


# The rows


def _case(label: str, topic: str, op: str, sizes: dict[str, int], make, count, figures, **options) -> Case:
    """A case whose name is `label` with the sizes filled in, and says what is not usual about dtype and device."""
    name = label.format(**sizes)
    name += " bf16" if options.get("dtype") == torch.bfloat16 else ""
    name += " GPU" if options.get("device") == "cuda" else ""
    if options.get("device") != "cuda":  # on a GPU times hardly vary
        options.setdefault("patience", 3)
    return Case(name, topic, op, sizes, make, count, figures, **options)


def _coral(samples: int, features: int, *figures: Figure, batch: int | None = None, **options) -> Case:
    sizes = {"samples": samples, "features": features} | ({"batch": batch} if batch else {})
    label = "coral {batch} batches of {samples}×{features}" if batch else "coral {samples}×{features}"
    return _case(label, "coral", "coral_loss", sizes, _domains, _coral_work, figures, **options)


def _covariance(samples: int, features: int, *figures: Figure, batch: int | None = None, **options) -> Case:
    sizes = {"samples": samples, "features": features} | ({"batch": batch} if batch else {})
    label = "covariance {batch} batches of {samples}×{features}" if batch else "covariance {samples}×{features}"
    return _case(label, "covariance", "covariance", sizes, _samples, _covariance_work, figures, **options)


def _episodes(
    classes: int,
    shots: int,
    queries: int,
    features: int,
    *figures: Figure,
    episodes: int | None = None,
    kind: str = "",
    **options,
) -> Case:
    sizes = {"classes": classes, "shots": shots, "queries": queries, "features": features}
    label = "{classes}-way {shots}-shot Q {queries} D {features}" + (f", {kind}" if kind else "")
    if episodes:
        sizes, label = sizes | {"episodes": episodes}, "{episodes} episodes " + label
    return _case(label, "prototypes", "prototypical_loss", sizes, _EPISODES[kind], _episode_work, figures, **options)


def _cross_entropy(queries: int, classes: int, features: int, *figures: Figure, count=_cross_entropy_work, **options):
    sizes = {"queries": queries, "classes": classes, "features": features}
    label = "cross-entropy Q {queries} × C {classes} × D {features}"
    return _case(label, "prototypes", "prototype_cross_entropy", sizes, _many_classes, count, figures, **options)


def _nearest_classes(*figures: Figure, **options) -> Case:
    label, op = "nearest of {classes} classes Q {queries} D {features}", "nearest_prototype"
    sizes = {"queries": 256, "classes": 100_000, "features": 640}
    options |= {"differentiable": False, "phase": "forward"}
    return _case(label, "prototypes", op, sizes, _nearest, _nearest_work, figures, **options)


def _means(*figures: Figure, **options) -> Case:
    label, op = "class means {classes}×{shots}×{features}", "class_means"
    sizes = {"classes": 1000, "shots": 5, "features": 640}
    return _case(label, "prototypes", op, sizes, _support, _class_means_work, figures, phase="forward", **options)


def _fork(samples: int, features: int, *figures: Figure, **options) -> Case:
    sizes = {"samples": samples, "features": features}
    label, op = "reversal fork {samples}×{features}", "gradient_reversal_fork"
    return _case(label, "gradient_reversal", op, sizes, _features_and_lambda, _fork_work, figures, **options)


def _domain_loss(samples: int, *figures: Figure) -> Case:
    label, op = "domain-adversarial loss {samples}+{samples}", "domain_adversarial_loss"
    return _case(label, "domain_loss", op, {"samples": samples}, _domain_logits, _domain_loss_work, figures)


def _linear(samples: int, features: int, hidden: int, *figures: Figure) -> Case:
    sizes = {"samples": samples, "features": features, "hidden": hidden}
    label, op = "reversal linear {samples}×{features} to {hidden}", "gradient_reversal_linear"
    return _case(label, "gradient_reversal", op, sizes, _linear_fork, _linear_fork_work, figures)


def _step(label: str, op: str, *figures: Figure) -> Case:
    sizes = {"samples": 64, "side": 28, "features": 128, "hidden": 64, "classes": 10}
    label += " {samples}+{samples} images {side}×{side}"
    options = {"constants": (0, 1), "patience": 60}
    return _case(label, "training", op, sizes, _training_step, _training_step_work, figures, **options)


def _maml_step(op: str, end: str, *figures: Figure) -> Case:
    sizes = {"tasks": 25, "shots": 10}
    label = "MAML sinusoid, {tasks} tasks, K {shots}, one step" + end
    return _case(label, "fewshot", op, sizes, _maml, _maml_work, figures, differentiable=False, phase="forward")


_WIDE = (Figure(3, FORMULA), Figure(1.6, BY_HAND))
_LAUNCH_BOUND = (Figure(2, ("reference compiled",)), Figure(5, ("reference",)))

CPU_CASES = (
    _coral(32, 256, *_WIDE),
    _coral(32, 2048, *_WIDE),
    _coral(64, 1024, *_WIDE),
    _coral(128, 2048, *_WIDE),
    _coral(256, 2048, *_WIDE),
    _coral(64, 4096, *_WIDE, Figure(8, quantity="megabytes")),
    _coral(1024, 512, Figure(1.6)),
    _coral(4096, 256, Figure(1.6)),
    _coral(64, 256, Figure(1.6), batch=16),
    _covariance(4096, 512, Figure(1.3)),
    _covariance(256, 128, Figure(1.3), batch=16),
    _episodes(5, 1, 75, 640, Figure(2.5)),
    _episodes(5, 5, 75, 1600, Figure(2.5)),
    _episodes(20, 5, 300, 64, Figure(2.5)),
    _episodes(5, 1, 75, 640, Figure(2.5), episodes=64),
    _episodes(60, 5, 300, 1600, Figure(1.5)),
    _episodes(60, 5, 300, 1600, Figure(1.5), kind="sure answers"),
    _episodes(60, 5, 300, 1600, Figure(1), kind="classes apart"),
    _cross_entropy(
        512,
        10_000,
        512,
        Figure(1.2, ("reference", "careful")),
        Figure(1.0, ("reference compiled", "careful compiled")),
        Figure(0.25, quantity="memory"),
        patience=40,
    ),
    _nearest_classes(
        Figure(1.3, ("reference", "careful")),
        Figure(1.05, ("reference compiled", "careful compiled")),
        Figure(0.10, quantity="memory"),
    ),
    _means(Figure(20, ("easyfsl",)), Figure(2, ("careful",))),
    _fork(64, 256, Figure(1.4, ("careful",)), Figure(1.0, ("two view_as",))),
    _fork(256, 2048, Figure(1.8, ("careful",))),
    _fork(4096, 2048, Figure(1.8, ("careful",)), Figure(0.95, ("no reversal",)), patience=10),
    _linear(256, 2048, 1024, Figure(0.95, ("no reversal",))),
    _domain_loss(64, Figure(2)),
    _domain_loss(4096, Figure(1.8)),
    _step("DANN step", "dann_step", Figure(0.99, ("no reversal",)), Figure(0.97, ("task loss alone",))),
    _step("Deep CORAL step", "deep_coral_step", Figure(0.97, ("task loss alone",))),
    _maml_step("maml_step", "", Figure(7, ("learn2learn",))),
    _maml_step("compiled_maml_step", ", compile=True", Figure(30, ("learn2learn",))),
    _case(
        "{episodes} episodes {classes}-way {shots}-shot Q {queries} D {features} evaluated",
        "fewshot",
        "evaluated_episodes",
        {"episodes": 1000, "classes": 5, "shots": 5, "queries": 75, "features": 640},
        _episodes_with_classes,
        _evaluation_work,
        (Figure(1.5, ("careful",)), Figure(0.06, quantity="seconds")),
        differentiable=False,
        phase="forward",
    ),
)

GPU_CASES = (
    _coral(64, 2048, *_LAUNCH_BOUND, device="cuda"),
    _coral(128, 4096, *_LAUNCH_BOUND, device="cuda"),
    _episodes(5, 1, 75, 640, *_LAUNCH_BOUND, device="cuda"),
    _episodes(5, 1, 75, 640, *_LAUNCH_BOUND, episodes=64, device="cuda"),
    _coral(16384, 2048, Figure(0.45, quantity="limit"), device="cuda", dtype=torch.bfloat16),
    _covariance(65536, 1024, Figure(0.45, quantity="limit"), device="cuda", dtype=torch.bfloat16),
    _cross_entropy(
        8192,
        100_000,
        512,
        Figure(0.5, quantity="limit"),
        Figure(0.01, quantity="memory"),
        count=_recomputing_cross_entropy_work,
        device="cuda",
        dtype=torch.bfloat16,
    ),
    _nearest_classes(Figure(0.10, quantity="memory"), device="cuda"),
    _nearest_classes(Figure(0.10, quantity="memory"), device="cuda", dtype=torch.bfloat16),
    _means(Figure(2, ("careful",)), device="cuda"),
    _fork(131_072, 2048, Figure(0.85, quantity="limit"), device="cuda"),
    _case(
        "reversal fork {samples}×{features}, λ on the device",
        "gradient_reversal",
        "gradient_reversal_fork",
        {"samples": 131_072, "features": 2048},
        _features_and_lambda_on_device,
        _fork_work,
        (Figure(0.85, quantity="limit"),),
        device="cuda",
        constants=(1,),
    ),
)

GROUP_FIGURES = (
    GroupFigure(
        "coral, features outnumber samples",
        tuple(case.name for case in CPU_CASES if case.op == "coral_loss" and case.figures[:2] == _WIDE),
        Figure(15, FORMULA),
    ),
)

SWEEPS = (
    Sweep(
        "coral sweep: 32 samples a domain",
        "features",
        tuple(_coral(32, features) for features in (256, 512, 1024, 2048, 4096, 8192)),
        ("fused", "reference", "careful"),
        growth_from=1024,
    ),
)

TOPICS = ("coral", "covariance", "prototypes", "gradient_reversal", "domain_loss", "training", "fewshot")


def select(patterns: Sequence[str] = (), device: str = "cpu") -> tuple[list[Case], list[Sweep]]:
    """The cases and sweeps of a device whose topic is, or whose name contains, one of the patterns; all without any."""
    cases = {"cpu": CPU_CASES, "cuda": GPU_CASES}[device]
    sweeps = SWEEPS if device == "cpu" else ()
    known = [(case, case.topic, case.name) for case in cases]
    known += [(sweep, sweep.cases[0].topic, sweep.name) for sweep in sweeps]
    for pattern in patterns:
        if not any(pattern == topic or pattern in name for _, topic, name in known):
            topics, names = ", ".join(TOPICS), ", ".join(name for *_, name in known)
            raise ValueError(
                f"cases: expected a topic ({topics}) or part of a case's name, got {pattern!r}; the cases are {names}"
            )
    chosen = [
        row
        for row, topic, name in known
        if not patterns or any(pattern == topic or pattern in name for pattern in patterns)
    ]
    return [row for row in chosen if isinstance(row, Case)], [row for row in chosen if isinstance(row, Sweep)]
