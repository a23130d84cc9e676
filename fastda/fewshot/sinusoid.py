"""The sinusoid experiment of the MAML paper (Finn, Abbeel & Levine, ICML 2017, section 5.1).

A task is a sine curve, its amplitude drawn from [0.1, 5] and its phase from [0, π]; from K points with x in [−5, 5] the
rest of the curve is to be found. Network, step size, optimiser, batch and number of iterations are the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from .episodes import Episode
from .maml import MAML

ITERATIONS = 70_000
TASKS = 25  # of a meta-batch
INNER_LR = 0.01
META_LR = 0.001
HIDDEN = 40  # units of each of the two hidden layers
LIMIT = 5.0  # of |x|
TEST_TASKS = 600
TEST_POINTS = 100
TEST_STEPS = tuple(range(11))
METHODS = ("MAML", "first-order MAML", "pretraining")


@dataclass(frozen=True)
class Curve:
    """Sine curves: amplitude and phase, (tasks, 1, 1) each."""

    amplitude: Tensor
    phase: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.amplitude * torch.sin(x - self.phase)


def draw_curves(count: int, generator: torch.Generator) -> Curve:
    amplitude, phase = torch.rand(2, count, 1, 1, generator=generator)
    return Curve(0.1 + 4.9 * amplitude, math.pi * phase)


def draw_tasks(count: int, shots: int, generator: torch.Generator) -> Episode:
    """A meta-batch: K support points and K queries of each of `count` curves."""
    curves = draw_curves(count, generator)
    x = LIMIT * (2 * torch.rand(count, 2 * shots, 1, generator=generator) - 1)
    y = curves(x)
    return Episode(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


def make_network(seed: int) -> nn.Sequential:
    """The paper's network, with its initial weights: normal with deviation 0.01, cut off at two deviations."""
    with torch.random.fork_rng(devices=[]):  # initialisation draws from the global generator: leave it as it was
        network = nn.Sequential(
            nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1)
        )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if name.endswith("weight"):
            nn.init.trunc_normal_(parameter, std=0.01, a=-0.02, b=0.02, generator=generator)
        else:
            nn.init.zeros_(parameter)
    return network


def train(
    method: str,
    *,
    shots: int,
    iterations: int = ITERATIONS,
    seed: int = 0,
    compile: bool = False,
    after_step: Callable[[], object] = lambda: None,
) -> MAML:
    """Train one of METHODS; the network comes back in a `MAML`, which adapts it to test tasks.

    Pretraining regresses on the points of all tasks together, with as many of them a step.
    """
    network = make_network(seed)
    maml = MAML(network, mse_loss, inner_lr=INNER_LR, first_order=method == "first-order MAML", compile=compile)
    optimizer = torch.optim.Adam(network.parameters(), lr=META_LR, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        tasks = draw_tasks(TASKS, shots, generator)
        if method == "pretraining":
            x, y = torch.cat([tasks.support, tasks.queries]), torch.cat([tasks.support_labels, tasks.query_labels])
            loss = mse_loss(network(x), y)
        else:
            loss = maml(*tasks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after_step()
    return maml


@dataclass(frozen=True)
class NewTasks:
    """Test curves with K support points each; the queries are spread evenly over the interval."""

    curves: Curve
    support: Tensor
    support_values: Tensor
    queries: Tensor
    query_values: Tensor


def draw_new_tasks(shots: int, seed: int, count: int = TEST_TASKS) -> NewTasks:
    generator = torch.Generator().manual_seed(2**32 + seed)  # a stream that training never draws from
    curves = draw_curves(count, generator)
    support = LIMIT * (2 * torch.rand(count, shots, 1, generator=generator) - 1)
    queries = torch.linspace(-LIMIT, LIMIT, TEST_POINTS).view(1, -1, 1).repeat(count, 1, 1)
    return NewTasks(curves, support, curves(support), queries, curves(queries))


def task_errors(maml: MAML, tasks: NewTasks, steps: int) -> Tensor:
    """Mean squared error on each test task after so many gradient steps: (tasks,)."""
    predicted = maml.predict(tasks.support, tasks.support_values, tasks.queries, steps)
    return (predicted - tasks.query_values).square().mean((1, 2))
