"""Reptile: towards the parameters that each task would learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..reference.checks import whole_number
from .inner_loop import InnerLoop, Parameters, check_constant, check_tasks
from .meta_gradient import with_gradient


class Reptile(InnerLoop):
    r"""Reptile: train on each task for a few steps, and move the initial parameters towards where they end.

    .. math:: \theta \leftarrow \theta + \varepsilon \, \frac1T \sum_i (\theta'_i - \theta)

    Calling it returns the mean loss of the inner steps; its `backward()` gives the parameters the gradient θ − mean
    θ'ᵢ, so that `torch.optim.SGD(lr=ε)` is the rule above. No second derivative and no queries are needed; all tasks
    are computed at once.

    Args:
        inner_batch_size: each inner step sees so many samples of the task, the next ones each time, from the first
            again where they end; None: all of them. Reptile learns more from steps that see different samples.
        network, loss_function, inner_lr, inner_steps, adapted, not_adapted, max_grad_norm, norm_statistics, chunk_size,
            compile, process_group: as for :class:`MAML`.

    Source: Nichol, Achiam & Schulman, On First-Order Meta-Learning Algorithms, 2018.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.fewshot import Reptile
        >>> reptile = Reptile(nn.Linear(1, 1), nn.functional.mse_loss, inner_lr=0.1, inner_steps=5)
        >>> optimizer = torch.optim.SGD(reptile.parameters(), lr=0.5)
        >>> slopes, inputs = torch.randn(8, 1, 1), torch.randn(8, 6, 1)
        >>> reptile(inputs, slopes * inputs).backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        network: nn.Module,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 5,
        inner_batch_size: int | None = None,
        adapted: Sequence[str] | None = None,
        not_adapted: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        norm_statistics: str = "batch",
        chunk_size: int | None = None,
        compile: bool = False,
        process_group=None,
    ) -> None:
        super().__init__(
            network,
            loss_function,
            inner_lr=inner_lr,
            inner_steps=inner_steps,
            adapted=adapted,
            not_adapted=not_adapted,
            max_grad_norm=max_grad_norm,
            norm_statistics=norm_statistics,
            chunk_size=chunk_size,
            compile=compile,
            process_group=process_group,
        )
        if inner_batch_size is not None:
            whole_number("inner_batch_size", inner_batch_size, 1)
        self.inner_batch_size = inner_batch_size

    def inner_samples(self, step: int, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        count = support.shape[1]
        if self.inner_batch_size is None or self.inner_batch_size >= count:
            return support, labels
        first = step * self.inner_batch_size
        rows = torch.arange(first, first + self.inner_batch_size, device=support.device) % count
        return support[:, rows], labels[:, rows]

    def forward(self, support: Tensor, support_labels: Tensor, *queries: Tensor) -> Tensor:
        """The mean over tasks and inner steps of the loss, with the gradient of Reptile.

        Args:
            support: (tasks, K, *sample). support_labels: (tasks, K, ...).
            queries: not used, so that an `Episode` may be unpacked.
        """
        check_tasks(support=support, support_labels=support_labels)
        check_constant(support=support, support_labels=support_labels)
        parameters = self.meta_parameters()
        leaves = [parameters[name] for name in parameters if name in self._adapted]
        run = partial(self.compiled(self._ends_and_loss), parameters, self.rates())
        sums, count = self.sum_over_tasks(run, (support, support_labels), leaves)
        *ends, loss = [x / count for x in sums]
        if not (torch.is_grad_enabled() and leaves):
            return loss
        with torch.no_grad():
            gradients = [x - end for x, end in zip(leaves, ends)]
        return with_gradient(loss, gradients, 1, leaves)

    def _ends_and_loss(self, parameters: Parameters, rates: float, *tasks: Tensor) -> list[Tensor]:
        """The sums over tasks of where the adapted parameters end, and of the mean loss of the steps."""
        _, own, losses = self.adapt_parameters(parameters, rates, *tasks, self.inner_steps, first_order=True)
        ends = [own[name].sum(0) for name in parameters if name in own]
        return [*ends, torch.stack(losses).mean(0).sum()]
