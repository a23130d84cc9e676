"""What the fused ops are compared with.

Each case has the sides "fused" (`fastda.<op>`), "reference", "careful" (the best that a careful user writes by hand in
eager PyTorch), both of these compiled, and the peers that can be imported. Yardsticks compute something cheaper than
the op, and are no baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import fastda
from fastda import backend, reference

from . import fewshot
from .cases import Case
from .peers import PEERS, PeerMissing
from .training_steps import STEPS, dann_step, task_step

FUSED = "fused"


@dataclass(frozen=True)
class Side:
    """One way to compute a case. `truth` is what it must agree with, where that is not the op itself."""

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    truth: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    is_peer: bool = False

    @property
    def is_baseline(self) -> bool:
        return self.name != FUSED and self.truth is None


@dataclass(frozen=True)
class Absent:
    """A side that is not measured, and why."""

    name: str
    reason: str


# Careful code


def careful_coral(source: Tensor, target: Tensor) -> Tensor:
    """Gram matrices where the features outnumber the samples of both domains, else one difference of covariances."""
    num_source, num_target, num_features = source.shape[-2], target.shape[-2], source.shape[-1]
    source = (source - source.mean(-2, keepdim=True)) / (num_source - 1) ** 0.5
    target = (target - target.mean(-2, keepdim=True)) / (num_target - 1) ** 0.5
    if num_source + num_target < num_features:
        rows = torch.cat([source, target], -2)
        gram = (rows @ rows.mT).square()
        within = gram[..., :num_source, :num_source].sum((-2, -1)) + gram[..., num_source:, num_source:].sum((-2, -1))
        squared = within - 2 * gram[..., :num_source, num_source:].sum((-2, -1))
    else:
        difference = torch.cat([source, target], -2).mT @ torch.cat([source, -target], -2)
        squared = difference.square().sum((-2, -1))
    return squared.mean() / (4 * num_features**2)


def careful_covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(-2, keepdim=True)
    return (centred.mT / (x.shape[-2] - 1)) @ centred


def careful_class_means(support: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """`index_add` over all episodes at once, each with class numbers of its own."""
    batch = labels.shape[:-1]
    num_episodes = batch.numel()
    first = torch.arange(num_episodes, device=labels.device).view(*batch, 1) * num_classes
    rows = (labels + first).flatten()
    sums = support.new_zeros(num_episodes * num_classes, support.shape[-1])
    sums = sums.index_add(0, rows, support.reshape(-1, support.shape[-1]))
    counts = support.new_zeros(num_episodes * num_classes).index_add(0, rows, support.new_ones(rows.shape))
    return (sums / counts.unsqueeze(-1)).view(*batch, num_classes, -1)


def careful_logits(queries: Tensor, prototypes: Tensor) -> Tensor:
    """2q·p − ‖p‖²: the softmax does not need ‖q‖². Half-precision features keep their norms in float32."""
    if queries.dtype == torch.bfloat16:
        return (2 * queries) @ prototypes.mT - prototypes.float().square().sum(-1).unsqueeze(-2)
    squares = prototypes.square().sum(-1).unsqueeze(-2)
    product = torch.addmm if queries.dim() == 2 else torch.baddbmm
    return product(squares, queries, prototypes.mT, beta=-1, alpha=2)


def careful_cross_entropy(queries: Tensor, prototypes: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(careful_logits(queries, prototypes).flatten(0, -2), targets.flatten())


def careful_prototypical_loss(
    support: Tensor, support_labels: Tensor, queries: Tensor, query_labels: Tensor, num_classes: int
) -> Tensor:
    return careful_cross_entropy(queries, careful_class_means(support, support_labels, num_classes), query_labels)


def careful_nearest(queries: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    squared, indices = torch.addmm(prototypes.square().sum(-1), queries, prototypes.mT, alpha=-2).min(-1, keepdim=True)
    return squared + queries.square().sum(-1, keepdim=True), indices


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, lambd: float) -> Tensor:
        ctx.lambd = lambd
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.neg() * ctx.lambd, None


def careful_fork(x: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    return x, _Reversal.apply(x, lambd)


def careful_linear_fork(x: Tensor, weight: Tensor, bias: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    return x, F.linear(_Reversal.apply(x, lambd), weight, bias)


def careful_domain_loss(source_logits: Tensor, target_logits: Tensor) -> Tensor:
    """Right for domains of equal size only, as all cases are."""
    logits = torch.cat([source_logits, target_logits])
    labels = torch.cat([torch.ones_like(source_logits), torch.zeros_like(target_logits)])
    return F.binary_cross_entropy_with_logits(logits, labels)


CAREFUL_OPS = SimpleNamespace(
    coral_loss=careful_coral,
    gradient_reversal_linear=careful_linear_fork,
    domain_adversarial_loss=careful_domain_loss,
)
CAREFUL = {
    "coral_loss": careful_coral,
    "covariance": careful_covariance,
    "class_means": careful_class_means,
    "prototypical_loss": careful_prototypical_loss,
    "prototype_cross_entropy": careful_cross_entropy,
    "nearest_prototype": careful_nearest,
    "gradient_reversal_fork": careful_fork,
    "gradient_reversal_linear": careful_linear_fork,
    "domain_adversarial_loss": careful_domain_loss,
    **{name: partial(step, CAREFUL_OPS) for name, step in STEPS.items()},
}


# Yardsticks: features used twice, whose gradient is g₁ + g₂; a training step without reversal, or without adaptation


def _sum_of_gradients(x: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    return reference.gradient_reversal_fork(x, -1.0)


def _linear_without_reversal(x: Tensor, weight: Tensor, bias: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    return x, F.linear(x, weight, bias)


WITHOUT_REVERSAL = SimpleNamespace(
    gradient_reversal_linear=_linear_without_reversal, domain_adversarial_loss=fastda.domain_adversarial_loss
)
_TASK_ALONE = Side("task loss alone", task_step, task_step)

YARDSTICKS = {
    "gradient_reversal_fork": {
        "two view_as": Side("two view_as", lambda x, lambd: (x.view_as(x), x.view_as(x)), _sum_of_gradients),
        "no reversal": Side("no reversal", lambda x, lambd: (x, x), _sum_of_gradients),
    },
    "gradient_reversal_linear": {
        "no reversal": Side("no reversal", _linear_without_reversal, _linear_without_reversal)
    },
    "dann_step": {
        "no reversal": Side("no reversal", partial(dann_step, WITHOUT_REVERSAL), partial(dann_step, WITHOUT_REVERSAL)),
        "task loss alone": _TASK_ALONE,
    },
    "deep_coral_step": {"task loss alone": _TASK_ALONE},
}


# Sides


def side_names(case: Case) -> list[str]:
    """The names of all sides of a case, those that will turn out absent included; no peer is imported."""
    if case.op in fewshot.SIDES:
        return list(fewshot.SIDES[case.op])
    names = [FUSED, "reference", "reference compiled", "careful", "careful compiled"]
    return names + list(YARDSTICKS.get(case.op, {})) + list(PEERS.get(case.op, {}))


def op_of(module: ModuleType, name: str) -> Callable:
    """The op of that name, or the training step with the ops of the module."""
    return partial(STEPS[name], module) if name in STEPS else getattr(module, name)


def formula(case: Case) -> Callable:
    """The reference, or careful code where the reference's differences do not fit into memory."""
    if case.op in fewshot.SIDES:
        return fewshot.SIDES[case.op]["reference"]()
    return CAREFUL[case.op] if case.beyond_reference else op_of(reference, case.op)


def make_side(case: Case, name: str) -> Side | Absent:
    """The side of that name, or why it is absent. A compiled side compiles at its first call."""
    if case.op in fewshot.SIDES:
        try:
            return Side(name, fewshot.SIDES[case.op][name](), is_peer=name in fewshot.PEER_SIDES)
        except PeerMissing as missing:
            return Absent(name, str(missing))
    yardsticks = YARDSTICKS.get(case.op, {})
    if name in yardsticks:
        return yardsticks[name]
    if name in PEERS.get(case.op, {}):
        if case.device != "cpu":
            return Absent(name, "compared on the CPU only")
        try:
            return Side(name, PEERS[case.op][name](), is_peer=True)
        except PeerMissing as missing:
            return Absent(name, str(missing))
    written, _, compiled = name.partition(" ")
    if written == "reference" and case.beyond_reference:
        return Absent(name, f"its differences take {case.difference_bytes / 1e9:.1f} GB; careful code stands in for it")
    if written == FUSED:
        if case.beyond_reference and (reason := without_kernel(case)) is not None:
            return Absent(
                name,
                f"fastda.{case.op} is the reference here ({reason}), "
                f"whose differences take {case.difference_bytes / 1e9:.1f} GB",
            )
        return Side(name, op_of(fastda, case.op))
    call = {"reference": op_of(reference, case.op), "careful": CAREFUL[case.op]}[written]
    return Side(name, torch.compile(call, fullgraph=True, dynamic=False) if compiled else call)


def without_kernel(case: Case) -> str | None:
    """Why the op is the reference on the case's device; None if it has a kernel there."""
    for row in backend.serving():
        if (row.op, row.device) == (case.op, case.device) and row.backend == "reference":
            return row.reason
    return None
