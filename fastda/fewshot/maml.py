"""MAML and its relatives (FOMAML, Meta-SGD, ANIL, BOIL), batched over tasks, with exact second-order gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..reference.checks import option
from .inner_loop import InnerLoop, Parameters, check_constant, check_tasks
from .meta_gradient import with_gradient


class MAML(InnerLoop):
    r"""Model-agnostic meta-learning: initial parameters from which a few gradient steps solve a new task.

    .. math:: \theta'_i = \theta - \alpha \nabla_\theta L(\text{support}_i; \theta), \qquad
              L_\text{meta}(\theta) = \frac1T \sum_i L(\text{queries}_i; \theta'_i)

    Calling it returns the meta-loss, whose `backward()` gives the meta-gradient to the network's parameters; any
    `torch.optim` optimiser steps them. All tasks are computed at once: the forward passes under `torch.func.vmap`, both
    gradients by plain autograd, which is right for every normalisation layer. `torch.func.grad` for the inner gradient
    would not be, in PyTorch 2.13: reverse mode over `vmap(grad)` is off by up to 6 % for BatchNorm, LayerNorm and
    affine InstanceNorm, silently.

    Args:
        network: the learner; its parameters are the meta-parameters. Those with `requires_grad=False` stay as they are.
        loss_function: of outputs and labels of one task, a scalar: `torch.nn.functional.cross_entropy`, `mse_loss`, ...
        inner_lr: α.
        inner_steps: steps of the inner loop in training; `predict` and `adapt` take other numbers too.
        first_order: leave out second derivatives (FOMAML).
        learn_inner_lr: learn α, one for each element of each adapted parameter, starting from `inner_lr` (Meta-SGD);
            they are parameters of this module.
        adapted: names of the parameters or modules that the inner loop adapts, all by default. ANIL adapts the head
            alone: `adapted=["head"]`.
        not_adapted: those that it leaves alone instead. BOIL adapts all but the head: `not_adapted=["head"]`.
        max_grad_norm: in the inner loop, the gradients of a task are scaled down to this norm where they exceed it.
        norm_statistics: what BatchNorm normalises by. "batch": the samples that are passed through it together, the
            support or the queries of one task, in training and in use; "kept": its running statistics. They are never
            updated.
        reduction: the meta-loss is the "mean" or the "sum" over the tasks.
        chunk_size: so many tasks are computed at a time, which bounds the memory; the result is the same but for
            rounding (and for the draws of dropout).
        compile: compile the whole step with `torch.compile`; the first call takes up to half a minute, and so does
            the first with other shapes. A network with linear layers over maps or sequences is compiled for each set
            of shapes, of which PyTorch allows eight (`torch._dynamo.config.recompile_limit`).
        process_group: a `torch.distributed` group whose processes share the tasks of a batch, each passing its own:
            all get the loss and the gradient of the whole batch, however many tasks each has.
            `torch.distributed.group.WORLD` is all of them, and None, one process alone, before `init_process_group`.
            All processes have to call together.

    Raises:
        TypeError, ValueError: arguments that do not fit, named.

    The meta-loss can be differentiated once, with respect to parameters. Dropout draws anew for each task and pass.
    Attention runs in its plain form, since the fused one has no second derivative. `torch.vmap` cannot handle LSTM, GRU
    and spectral norm.

    Source: Finn, Abbeel & Levine, Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017.
    Meta-SGD: Li, Zhou, Chen & Li 2017. ANIL: Raghu, Raghu, Bengio & Vinyals, ICLR 2020. BOIL: Oh, Yoo, Kim & Yun,
    ICLR 2021.

    Example: learn to fit straight lines from three points
        >>> import torch
        >>> from torch import nn
        >>> from fastda.fewshot import MAML
        >>> maml = MAML(nn.Linear(1, 1), nn.functional.mse_loss, inner_lr=0.1)
        >>> optimizer = torch.optim.Adam(maml.parameters(), lr=0.01)
        >>> slopes, inputs = torch.randn(8, 1, 1), torch.randn(8, 6, 1)
        >>> support, queries = inputs.split(3, dim=1)
        >>> loss = maml(support, slopes * support, queries, slopes * queries)
        >>> loss.backward()
        >>> optimizer.step()
        >>> line = maml.adapt(support[0], slopes[0] * support[0])
        >>> line(queries[0]).shape
        torch.Size([3, 1])
    """

    def __init__(
        self,
        network: nn.Module,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        first_order: bool = False,
        learn_inner_lr: bool = False,
        adapted: Sequence[str] | None = None,
        not_adapted: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        norm_statistics: str = "batch",
        reduction: str = "mean",
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
        self.first_order = first_order
        self.reduction = option("reduction", reduction, ("mean", "sum"))
        self.inner_rates = None
        if learn_inner_lr:
            parameters = dict(network.named_parameters())
            self.inner_rates = nn.ParameterDict(
                {_key(name): torch.full_like(parameters[name], inner_lr) for name in self._adapted}
            )

    def rates(self) -> Parameters | float:
        if self.inner_rates is None:
            return super().rates()
        return {name: self.inner_rates[_key(name)] for name in self._adapted}

    def forward(self, support: Tensor, support_labels: Tensor, queries: Tensor, query_labels: Tensor) -> Tensor:
        """The meta-loss of a batch of tasks.

        Args:
            support: (tasks, K, *sample). support_labels: (tasks, K, ...).
            queries: (tasks, Q, *sample). query_labels: (tasks, Q, ...).

        Returns:
            A scalar.
        """
        check_tasks(support=support, support_labels=support_labels, queries=queries, query_labels=query_labels)
        check_constant(support=support, support_labels=support_labels, queries=queries, query_labels=query_labels)
        parameters, rates = self.meta_parameters(), self.rates()
        leaves = [*parameters.values(), *(rates.values() if self.inner_rates is not None else ())]
        differentiate = torch.is_grad_enabled() and bool(leaves)
        run = self.compiled(self._gradients_and_loss if differentiate else self._loss)
        tasks = support, support_labels, queries, query_labels
        (*gradients, total), count = self.sum_over_tasks(
            partial(run, parameters, rates), tasks, leaves if differentiate else []
        )
        divisor = 1 if self.reduction == "sum" or self._all_at_once else count
        return with_gradient(total, gradients, divisor, leaves) if differentiate else total / divisor

    @property
    def _all_at_once(self) -> bool:
        """Whether all tasks pass together, so that their mean need not wait for the sums over others."""
        return self.chunk_size is None and self.process_group is None

    def _reduce(self, losses: Tensor) -> Tensor:
        """The sum of tasks' losses, or their mean where these are all tasks and it is asked for."""
        return losses.mean() if self.reduction == "mean" and self._all_at_once else losses.sum()

    def _loss(self, parameters: Parameters, rates: Parameters | float, *tasks: Tensor) -> list[Tensor]:
        """The meta-loss of these tasks, reduced."""
        return [self._reduce(self.query_losses(parameters, rates, *tasks, first_order=True))]

    def _gradients_and_loss(self, parameters: Parameters, rates: Parameters | float, *tasks: Tensor) -> list[Tensor]:
        """The gradients of the reduced meta-loss of these tasks for parameters and learned rates, and itself."""
        # Not of the parameters themselves, whose hooks wait for the backward pass of the meta-loss.
        parameters = {name: x.detach().requires_grad_() for name, x in parameters.items()}
        leaves = list(parameters.values())
        if self.inner_rates is not None:
            rates = {name: x.detach().requires_grad_() for name, x in rates.items()}
            leaves += rates.values()
        with torch.enable_grad():
            loss = self._reduce(self.query_losses(parameters, rates, *tasks, first_order=self.first_order))
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        return [*gradients, loss.detach()]

    def query_losses(
        self,
        parameters: Parameters,
        rates: Parameters | float,
        support: Tensor,
        support_labels: Tensor,
        queries: Tensor,
        query_labels: Tensor,
        *,
        first_order: bool = False,
    ) -> Tensor:
        """The loss of each task's queries after adapting to its support, (tasks,). Any derivative can be taken."""
        shared, own, _ = self.adapt_parameters(
            parameters, rates, support, support_labels, self.inner_steps, first_order
        )
        return self.over_tasks(self.task_loss, shared, own, queries, query_labels)


def _key(name: str) -> str:
    """A parameter's name without the dots, which `ParameterDict` refuses."""
    return name.replace(".", "/")
