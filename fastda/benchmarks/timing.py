"""Time of several sides, taken in turn in one process.

Machines are noisy and slow down together, so sides alternate and two sides are compared round by round: what counts is
the median, over the rounds, of the ratio of their times. A disturbance longer than a round leaves it alone. Each round
has an order of its own, since a side is faster or slower for what the one before it left behind (memory, threads).
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch

from .baselines import Side
from .correctness import Check, asking, call, incoming_gradients

PHASES = ("forward", "backward", "both")
LEAST_ROUNDS = 3
MOST_ROUNDS = 200
TURN = 0.01  # seconds that a fast side measures before the next one's turn
MOST_SAMPLES = 10  # in one turn
SLOW = 0.15  # seconds beyond which a call does not notice what the side before left in the caches
GPU_SPAN = 2e-3  # seconds between two readings of the clock on a GPU, where reading it waits for the device
MOST_REPEATS = 50
LONGEST_REASON = 200  # characters
KEPT = 32 << 20  # bytes up to which glibc comes to keep freed blocks


@dataclass
class Times:
    """Samples of each phase, in seconds, of a side with these relative errors; and their median in each round."""

    errors: dict[str, float]
    samples: dict[str, list[float]] = field(default_factory=dict)
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, turn: Sequence[dict[str, float]]) -> None:
        """The samples of one round."""
        for phase in turn[0]:
            seconds = [sample[phase] for sample in turn]
            self.samples.setdefault(phase, []).extend(seconds)
            self.rounds.setdefault(phase, []).append(statistics.median(seconds))

    def over(self, other: Times, phase: str) -> float:
        """How many times as long as another side it takes: the median over the rounds."""
        return statistics.median(self._ratios(other, phase))

    def interval_over(self, other: Times, phase: str) -> tuple[float, float] | None:
        """The 95 % interval of that median, of order statistics alone; None of fewer than six rounds, which have none.

        The number of ratios below the true median is binomial, n draws of 1/2: about n/2 ± 1.96·√n/2.
        """
        ratios = sorted(self._ratios(other, phase))
        rank = int((len(ratios) - 1.96 * len(ratios) ** 0.5) / 2)
        return (ratios[rank], ratios[-1 - rank]) if len(ratios) >= 6 else None

    def _ratios(self, other: Times, phase: str) -> list[float]:
        return [own / its for own, its in zip(self.rounds[phase], other.rounds[phase])]

    def median(self, phase: str) -> float:
        return statistics.median(self.samples[phase])

    def quartiles(self, phase: str) -> tuple[float, float]:
        samples = self.samples[phase]
        if len(samples) == 1:
            return samples[0], samples[0]
        lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return lower, upper


@dataclass(frozen=True)
class Refused:
    """A side whose answer is wrong, or that raised: it has no time."""

    reason: str


class Stopwatch:
    """Takes one sample of a side: forward, backward, and their sum.

    The incoming gradients are random and stand before the clock starts. On a GPU several calls lie between two readings
    of the clock.
    """

    def __init__(self, function: Callable, arguments: tuple, seed: int = 0) -> None:
        self.function, self.arguments = function, arguments
        self.inputs = asking(arguments)
        self.on_gpu = any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments)
        self.incoming = incoming_gradients(call(function, arguments), seed) if self.inputs else ()
        self.repeats = 1
        self.sample()
        self.estimate = self.sample()["both"]
        if self.on_gpu:
            self.repeats = max(1, min(MOST_REPEATS, int(GPU_SPAN / self.estimate)))

    def _now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return perf_counter()

    def sample(self) -> dict[str, float]:
        """Seconds of one call; "backward" is absent where nothing asks for a gradient."""
        with torch.set_grad_enabled(bool(self.inputs)):  # before the clock starts: it takes as long as a small op
            start = self._now()
            outputs = [self.function(*self.arguments) for _ in range(self.repeats)]
            middle = self._now()
        if not self.inputs:
            seconds = (middle - start) / self.repeats
            return {"forward": seconds, "both": seconds}
        for one in outputs:
            torch.autograd.grad(one, self.inputs, self.incoming, allow_unused=True)
        end = self._now()
        return {
            "forward": (middle - start) / self.repeats,
            "backward": (end - middle) / self.repeats,
            "both": (end - start) / self.repeats,
        }

    def turn(self) -> list[dict[str, float]]:
        """What one turn of this side gives: the first call of a fast side only warms the caches."""
        if self.estimate > SLOW:
            return [self.sample()]
        self.sample()
        return [self.sample() for _ in range(max(1, min(MOST_SAMPLES, int(TURN / self.estimate))))]


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, as it does in a program that has freed one tensor of nearly 32 MiB.

    Its thresholds follow the largest block that was freed. Before that, it is chance, from one process to the next,
    whether a side's results are given back after each call and have to be fetched page by page in the next.
    """
    torch.empty(KEPT - (1 << 16), dtype=torch.uint8)


def compare(
    sides: Sequence[Side],
    checks: Callable[[Side], Check],
    budget: float,
    seed: int = 0,
    longer: Callable[[dict[str, Times | Refused]], Container[str]] = lambda found: (),
    patience: float = 1.0,
) -> tuple[dict[str, Times | Refused], int]:
    """Check each side and time those that are right, in turn; the times, and the number of rounds.

    `checks` gives the check a side has to pass; `budget` bounds the seconds of timing, but for the least rounds. The
    sides that `longer` then names, by what was found, go on by themselves, for `patience` times the budget.
    """
    found: dict[str, Times | Refused] = {}
    stopwatches: dict[str, Stopwatch] = {}
    for side in sides:
        try:
            check = checks(side)
            verdict = check.judge(side)
            if verdict.wrong is None:
                stopwatches[side.name] = Stopwatch(side.call, check.arguments, seed)
                found[side.name] = Times(verdict.errors)
            else:
                found[side.name] = Refused(verdict.wrong)
        except Exception as error:  # a peer or a compiler may fail in any way; the record says how
            found[side.name] = Refused(f"{type(error).__name__}: {error}".partition("\n")[0][:LONGEST_REASON])
    order = random.Random(seed)
    keep_freed_memory()

    def go(turns: dict[str, Stopwatch], budget: float, least: int, most: float) -> int:
        rounds, start = 0, perf_counter()
        while turns and rounds < most and (rounds < least or perf_counter() - start < budget):
            for name in order.sample(list(turns), len(turns)):
                found[name].add(turns[name].turn())
            rounds += 1
        return rounds

    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds = go(stopwatches, budget, LEAST_ROUNDS, MOST_ROUNDS)
        names = longer(found)
        few = {name: stopwatch for name, stopwatch in stopwatches.items() if name in names}
        rounds += go(few, (patience - 1) * budget, 0, (patience - 1) * MOST_ROUNDS)
    finally:
        if collecting:
            gc.enable()
    return found, rounds
