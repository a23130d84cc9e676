"""Gradient reversal as a layer, with a λ that follows a schedule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import gradient_reversal
from ..reference import checks


class GradientReversal(nn.Module):
    r"""The identity, whose gradient is multiplied by −λ; λ is fixed, or follows a schedule.

    .. math:: y = x, \qquad \frac{\partial L}{\partial x} := -\lambda \frac{\partial L}{\partial y}

    λ is the buffer `lambd`, so that it is saved, restored and moved with the model, and a change of it neither
    synchronises nor recompiles; `step` overwrites it in place, so that a captured CUDA graph sees the new value. Only
    `step` changes it: a forward pass, in evaluation or in training, does not.

    Args:
        lambd: the fixed λ, a finite number; not together with a schedule.
        by_progress: λ as a function of the share of training that is done, in [0, 1], such as
            :func:`fastda.schedules.dann_lambda`.
        by_step: λ as a function of the number of steps done, such as :func:`fastda.schedules.warm_start_lambda`.
        max_steps: the number of training steps, from which `step()` reckons the progress.

    Shape:
        Features of any shape, float32, float64, bfloat16 or float16, to a view of them.

    Raises:
        TypeError, ValueError: more than one of `lambd`, `by_progress` and `by_step`, or a λ that is not a finite
            number.

    Differentiable any number of times, as :func:`fastda.gradient_reversal` is.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch, fastda
        >>> reversal = fastda.nn.GradientReversal(by_progress=fastda.schedules.dann_lambda, max_steps=100)
        >>> for _ in range(10):  # after each step of the optimiser
        ...     reversal.step()
        >>> x = torch.ones(2, requires_grad=True)
        >>> reversal(x).sum().backward()
        >>> x.grad
        tensor([-0.4621, -0.4621])
    """

    lambd: Tensor
    steps: Tensor

    def __init__(
        self,
        lambd: float | None = None,
        *,
        by_progress: Callable[[float], float] | None = None,
        by_step: Callable[[int], float] | None = None,
        max_steps: int | None = None,
    ) -> None:
        super().__init__()
        choices = {"lambd": lambd, "by_progress": by_progress, "by_step": by_step}
        given = [name for name, choice in choices.items() if choice is not None]
        if len(given) > 1:
            raise ValueError(
                f"{given[1]}: expected either a fixed λ or one schedule, got {' and '.join(given)}; choose one"
            )
        self.by_progress, self.by_step = by_progress, by_step
        self.max_steps = max_steps if max_steps is None else checks.whole_number("max_steps", max_steps, 1)
        self._steps = 0  # of the buffer, which may be on a GPU
        first = by_progress(0.0) if by_progress else by_step(0) if by_step else 1.0 if lambd is None else lambd
        self.register_buffer("lambd", torch.tensor(float(checks.number("lambd", first))))
        self.register_buffer("steps", torch.tensor(0))

    def step(self, progress: float | None = None) -> None:
        """Count a training step, and set λ to what the schedule says of it.

        Args:
            progress: the share of training that is done, for a schedule `by_progress`; by default the number of steps
                over `max_steps`, at most 1.

        Raises:
            ValueError: `progress` for another schedule, or none of `progress` and `max_steps`; λ is not a finite
                number.
        """
        if progress is not None and self.by_progress is None:
            raise ValueError(f"progress: expected None without a schedule by_progress, got {progress}; call step()")
        if progress is None and self.by_progress is not None:
            if self.max_steps is None:
                raise ValueError(
                    "progress: expected a share of training in [0, 1], got None; pass one, or give the layer max_steps"
                )
            progress = min((self._steps + 1) / self.max_steps, 1.0)
        schedule, argument = (self.by_progress, progress) if self.by_progress else (self.by_step, self._steps + 1)
        if schedule is not None:
            self.lambd.fill_(checks.number("lambd", schedule(argument)))
        self._steps += 1
        self.steps.fill_(self._steps)

    def forward(self, x: Tensor) -> Tensor:
        return gradient_reversal(x, self.lambd)

    def extra_repr(self) -> str:
        schedules = (("by_progress", self.by_progress), ("by_step", self.by_step))
        named = [f"{name}={getattr(schedule, '__name__', schedule)}" for name, schedule in schedules if schedule]
        if self.max_steps is not None:
            named.append(f"max_steps={self.max_steps}")
        lambd = "meta" if self.lambd.is_meta else f"{float(self.lambd):.4g}"
        return ", ".join([f"lambd={lambd}", *named])

    def _load_from_state_dict(self, *args, **options) -> None:
        super()._load_from_state_dict(*args, **options)
        if not self.steps.is_meta:
            self._steps = int(self.steps)
