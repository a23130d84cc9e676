"""The inner loop of gradient-based meta-learning: how a network adapts to the support of a task, batched over tasks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import iscode, ismodule
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.nn.modules.batchnorm import _NormBase

from ..reference.checks import describe, number, option, tensor, whole_number
from ..reference.precision import accumulate
from .meta_gradient import sum_over_processes

NORM_STATISTICS = ("batch", "kept")
_numbers = itertools.count()
Parameters = dict[str, Tensor]


class InnerLoop(nn.Module):
    r"""A network, and how it adapts to a task: the base of :class:`MAML` and :class:`Reptile`.

    .. math:: \theta' = \theta - \alpha \nabla_\theta L(\text{support}; \theta), \text{inner\_steps times}

    A task is (support, support_labels, queries, query_labels), each with the tasks as its first dimension; an
    :class:`Episode` with a batch dimension unpacks into them. All tasks are computed at once: the forward passes under
    `torch.func.vmap`, so the network must be one that `vmap` can handle, and their gradients by plain autograd, which
    sees the batched operations alone. Gradients of any order go through.

    The arguments are those of :class:`MAML`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss_function: Callable[[Tensor, Tensor], Tensor],
        *,
        inner_lr: float = 0.01,
        inner_steps: int = 1,
        adapted: Sequence[str] | None = None,
        not_adapted: Sequence[str] | None = None,
        max_grad_norm: float | None = None,
        norm_statistics: str = "batch",
        chunk_size: int | None = None,
        compile: bool = False,
        process_group=None,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"network: expected a torch.nn.Module, got {describe(network)}; wrap the function in a Module"
            )
        if not callable(loss_function):
            raise TypeError(
                f"loss_function: expected a function of outputs and labels, got {describe(loss_function)}; "
                f"pass torch.nn.functional.cross_entropy or the like"
            )
        if isinstance(loss_function, nn.Module) and any(p.requires_grad for p in loss_function.parameters()):
            raise ValueError(
                f"loss_function: expected no parameters that learn, got some in {loss_function}; "
                f"put them into the network, or freeze them with requires_grad_(False)"
            )
        if adapted is not None and not_adapted is not None:
            raise ValueError("adapted, not_adapted: expected at most one of the two, got both; drop one")
        if max_grad_norm is not None:
            number("max_grad_norm", max_grad_norm, above=0)
        if chunk_size is not None:
            whole_number("chunk_size", chunk_size, 1)
        self.network = network
        self.loss_function = loss_function
        self.inner_lr = number("inner_lr", inner_lr, above=0)
        self.inner_steps = whole_number("inner_steps", inner_steps, 1)
        self.max_grad_norm = max_grad_norm
        self.norm_statistics = option("norm_statistics", norm_statistics, NORM_STATISTICS)
        self.chunk_size = chunk_size
        self.compile = compile
        run_as_it_is(type(self))
        self.process_group = process_group
        self._adapted = self._choose(adapted, not_adapted)
        self._shares_weights = len(list(network.named_parameters(remove_duplicate=False))) > len(
            list(network.parameters())
        )
        self._compiled: dict[str, Callable] = {}

    def _choose(self, adapted: Sequence[str] | None, not_adapted: Sequence[str] | None) -> list[str]:
        """The names of the parameters that the inner loop adapts."""
        names = [name for name, _ in self.network.named_parameters()]
        if not names:
            raise ValueError(f"network: expected parameters to adapt, got none in {self.network}; pass one with layers")
        if adapted is not None:
            return below("adapted", adapted, names)
        left_out = [] if not_adapted is None else below("not_adapted", not_adapted, names)
        if left_out == names:
            raise ValueError(
                "not_adapted: expected to leave parameters for the inner loop, got all of them; name fewer"
            )
        return [name for name in names if name not in left_out]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_compiled": {}}  # compiled code is neither copied nor saved

    def extra_repr(self) -> str:
        names = ("inner_lr", "inner_steps", "max_grad_norm", "norm_statistics", "chunk_size", "compile")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    # The network as a function of its parameters

    def meta_parameters(self) -> Parameters:
        """The parameters that ask for a gradient, by name."""
        return {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}

    def rates(self) -> Parameters | float:
        """The inner learning rate: one for all parameters, or one tensor for each that the inner loop adapts."""
        return self.inner_lr

    def call(self, parameters: Parameters, inputs: Tensor) -> Tensor:
        """The network's outputs with these parameters, for one task."""
        return functional_call(self.network, parameters, (inputs,), tie_weights=self._shares_weights)

    def task_loss(self, parameters: Parameters, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of the network with these parameters, for one task."""
        function = squared_error if self.loss_function is mse_loss else self.loss_function
        loss = function(self.call(parameters, inputs), labels)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(
                f"loss_function: expected a scalar for a task, got {describe(loss)}; average it, with reduction='mean'"
            )
        return loss

    # The inner loop of several tasks. Shared parameters are those of all tasks; own ones have a dimension of tasks.

    def over_tasks(self, function: Callable[..., Tensor], shared: Parameters, own: Parameters, *tensors: Tensor):
        """`function(parameters, *tensors)` of each task."""

        def one(values: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
            return function({**shared, **dict(zip(own, values))}, *tensors)

        return vmap(one, randomness="different")(tuple(own.values()), *tensors)

    def start(self, parameters: Parameters, support: Tensor, labels: Tensor) -> Parameters:
        """Where the adapted parameters of each task start, own ones: here the same for all tasks."""
        own = {name: x.expand(len(support), *x.shape) for name, x in parameters.items() if name in self._adapted}
        if not own:
            raise ValueError(
                f"network: expected a gradient to be required by parameters that the inner loop adapts, got none "
                f"among {', '.join(self._adapted)}; thaw them with requires_grad_(True)"
            )
        return own

    def inner_samples(self, step: int, support: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """What a step of the inner loop sees of the tasks."""
        return support, labels

    def adapt_parameters(
        self,
        parameters: Parameters,
        rates: Parameters | float,
        support: Tensor,
        labels: Tensor,
        steps: int,
        first_order: bool,
    ) -> tuple[Parameters, Parameters, list[Tensor]]:
        """The shared parameters, each task's own after `steps` steps, and its loss before each step; differentiable."""
        own = self.start(parameters, support, labels)
        shared = {name: x for name, x in parameters.items() if name not in own}
        losses = []
        for step in range(steps):
            gradients, values = self._gradients(shared, own, self.inner_samples(step, support, labels), first_order)
            losses.append(values)
            if self.max_grad_norm is not None:
                gradients = clip(gradients, self.max_grad_norm)
            if isinstance(rates, dict):
                own = {name: x - rates[name] * gradients[name] for name, x in own.items()}
            else:
                own = {name: x.add(gradients[name], alpha=-rates) for name, x in own.items()}
        return shared, own, losses

    def _gradients(
        self, shared: Parameters, own: Parameters, samples: tuple[Tensor, Tensor], first_order: bool
    ) -> tuple[Parameters, Tensor]:
        """The gradients of each task's loss for its own parameters, and the losses."""
        if first_order:
            shared = {name: x.detach() for name, x in shared.items()}
            own = {name: x.detach().requires_grad_() for name, x in own.items()}
        with torch.enable_grad():
            losses = self.over_tasks(self.task_loss, shared, own, *samples)
            gradients = torch.autograd.grad(
                losses,
                list(own.values()),
                torch.ones_like(losses),
                create_graph=not first_order,
                materialize_grads=True,
            )
        return dict(zip(own, gradients)), losses.detach() if first_order else losses

    # All tasks

    def chunks(self, *tasks: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The tasks, `chunk_size` of them at a time."""
        tasks = tuple(map(recorded, tasks))
        if self.chunk_size is None:
            return iter([tasks])
        return zip(*(x.split(self.chunk_size) for x in tasks))

    def sum_over_tasks(
        self, function: Callable[..., list[Tensor]], tasks: tuple[Tensor, ...], leaves: list[Tensor]
    ) -> tuple[list[Tensor], int | Tensor]:
        """The sums over all tasks, of all processes, of gradients for the leaves and of losses; the number of tasks.

        `function` gives these sums for some tasks.
        """
        if len(tasks[0]) == 0 and self.process_group is None:
            raise ValueError("support: expected at least one task, got none; skip batches without tasks")
        count, sums = len(tasks[0]), None
        with self.batched(compiled=self.compile):
            if count > 0:  # a process may have no task
                for some in self.chunks(*tasks):
                    found = function(*some)
                    sums = found if sums is None else [x + y for x, y in zip(sums, found)]
        if self.process_group is not None:
            dtype = accumulate(next(self.network.parameters()).new_empty(0)).dtype
            loss = torch.zeros((), dtype=dtype, device=tasks[0].device)
            sums = [*map(torch.zeros_like, leaves), loss] if sums is None else sums
            *sums, count = sum_over_processes([*sums, loss.new_tensor(count)], dtype, self.process_group)
        return sums, count

    @contextmanager
    def batched(self, compiled: bool = False) -> Iterator[None]:
        """What `vmap` and the gradients inside need: no running statistics are written, attention is not fused
        (compiled code sees to that itself), under autocast norms see the dtype of their parameters, and nothing is
        recorded but where it is asked for, which inference mode would refuse."""
        layers = [module for module in self.network.modules() if isinstance(module, _NormBase)]
        before = [(m.training, m.track_running_stats, m.running_mean, m.running_var) for m in layers]
        hooks = []
        if torch.is_autocast_enabled(next(self.network.parameters()).device.type):
            norms = (
                module for module in self.network.modules() if isinstance(module, (_NormBase, nn.LayerNorm, nn.RMSNorm))
            )
            hooks = [norm.register_forward_pre_hook(in_own_dtype) for norm in norms]
        try:
            for layer in layers:
                if self.norm_statistics == "kept":
                    layer.training = False
                else:
                    layer.training, layer.track_running_stats = True, False
                    layer.running_mean = layer.running_var = None
            inference = torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else nullcontext():
                with torch.no_grad(), nullcontext() if compiled else sdpa_kernel(SDPBackend.MATH):
                    yield
        finally:
            for hook in hooks:
                hook.remove()
            for m, state in zip(layers, before):
                m.training, m.track_running_stats, m.running_mean, m.running_var = state

    def compiled(self, function: Callable) -> Callable:
        """A method of this module, compiled if that was asked for."""
        if not self.compile:
            return function
        name = function.__name__
        if name not in self._compiled:
            self._compiled[name] = compiled_with_gradients(function)
        return self._compiled[name]

    # For use

    def predict(self, support: Tensor, support_labels: Tensor, queries: Tensor, steps: int | None = None) -> Tensor:
        """The network's outputs for the queries of each task, after adapting to its support; no gradient.

        Args:
            support: (tasks, K, *sample). support_labels: (tasks, K, ...). queries: (tasks, Q, *sample).
            steps: inner steps, 0 for none; None for `inner_steps`.

        Returns:
            (tasks, Q, *output).
        """
        check_tasks(support=support, support_labels=support_labels, queries=queries)
        if len(support) == 0:
            raise ValueError("support: expected at least one task, got none; skip batches without tasks")
        steps = self._steps(steps)
        parameters, rates, outputs = self.meta_parameters(), self.rates(), []
        with self.batched():
            for *labelled, asked in self.chunks(support, support_labels, queries):
                shared, own, _ = self.adapt_parameters(parameters, rates, *labelled, steps, first_order=True)
                outputs.append(self.over_tasks(self.call, shared, own, asked))
        return torch.cat(outputs)

    def adapt(self, support: Tensor, support_labels: Tensor, steps: int | None = None) -> nn.Module:
        """A copy of the network, adapted to one task: a plain module in evaluation mode, to use, save or train on.

        With `norm_statistics="batch"` its BatchNorm layers have no running statistics, and so go on normalising by what
        they are given.

        Args:
            support: (K, *sample), of one task. support_labels: (K, ...).
            steps: inner steps; None for `inner_steps`.
        """
        tensor("support", support)
        tensor("support_labels", support_labels)
        if support.dim() < 1 or len(support) == 0:
            raise ValueError(
                f"support: expected shape (K, *sample) with at least one sample, got {describe(support)}; "
                f"pass the labelled samples of one task"
            )
        check_labels("support", support, "support_labels", support_labels, dim=0)
        steps = self._steps(steps)
        with self.batched():
            labelled = [recorded(x).unsqueeze(0) for x in (support, support_labels)]
            _, own, _ = self.adapt_parameters(self.meta_parameters(), self.rates(), *labelled, steps, first_order=True)
        network = copy.deepcopy(self.network).eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if name in own:
                    parameter.copy_(own[name][0])
                parameter.grad = None
        if self.norm_statistics == "batch":
            for layer in network.modules():
                if isinstance(layer, _NormBase):
                    layer.track_running_stats = False
                    layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        return network

    def _steps(self, steps: int | None) -> int:
        return self.inner_steps if steps is None else whole_number("steps", steps, 0)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """`mse_loss` in plain operations: the derivative of its own is taken apart in Python under `vmap`, at each call."""
    if outputs.shape != labels.shape:
        return mse_loss(outputs, labels)  # which warns
    return (outputs - labels).square().mean()


def recorded(x: Tensor) -> Tensor:
    """A tensor that autograd can keep: a copy of one made in inference mode."""
    return x.clone() if x.is_inference() else x


def in_own_dtype(layer: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """The input in the dtype of the layer's parameters: second derivatives of norms under `vmap` refuse another."""
    (x,) = inputs
    return (x if layer.weight is None else x.to(layer.weight.dtype),)


def below(argument: str, paths: Sequence[str], names: list[str]) -> list[str]:
    """The parameters that are named, or that belong to a module that is named."""
    if isinstance(paths, str):
        raise TypeError(f"{argument}: expected a sequence of names, got {paths!r}; pass [{paths!r}]")
    if len(paths) == 0:
        raise ValueError(f"{argument}: expected at least one name, got none; pass None, or names")
    chosen: set[str] = set()
    for path in paths:
        found = [name for name in names if name == path or name.startswith(f"{path}.")]
        if not found:
            raise ValueError(
                f"{argument}: expected names of parameters or modules of the network, got {path!r}; "
                f"its parameters are {', '.join(names)}"
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def clip(gradients: Parameters, max_norm: float) -> Parameters:
    """Scaled so that in each task the norm of all together is at most `max_norm`; differentiable, at 0 too."""
    squared = sum(x.square().reshape(len(x), -1).sum(1) for x in gradients.values())
    too_large = squared > max_norm**2
    scale = torch.where(too_large, max_norm * torch.where(too_large, squared, 1.0).rsqrt(), 1.0)
    return {name: scale.view(-1, *[1] * (x.dim() - 1)) * x for name, x in gradients.items()}


def run_as_it_is(learner: type[nn.Module]) -> None:
    """Have `torch.compile` around a learner, or around a training step, run its forward pass uncompiled.

    Compiled from outside, the gradients that it takes would be wrong (torch 2.13). Once for a class; not at import,
    since it loads the compiler, as making an optimiser does.
    """
    if "_torchdynamo_disable" not in learner.forward.__dict__:
        learner.forward = torch.compiler.disable(learner.forward)


def compiled_with_gradients(function: Callable) -> Callable:
    """`function` compiled as one graph, the gradients that it takes in it included.

    For a second set of shapes, code for shapes of any size is compiled. Where PyTorch refuses that (2.13 does for
    linear layers over maps or sequences, under `vmap`), code is compiled for each set of shapes.
    """
    import torch._dynamo  # not before it is asked for: it takes a second

    def traced(*arguments):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*arguments)

    def compile(dynamic: bool | None) -> Callable:
        # A code and a name of its own: by these PyTorch tells what shapes it has seen, and limits its compilations.
        code = traced.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
        copied = FunctionType(code, globals(), None, None, traced.__closure__)
        return torch.compile(copied, fullgraph=True, dynamic=dynamic, options={"guard_filter_fn": guards_of_values})

    compiled, for_each_shape = compile(dynamic=None), compile(dynamic=False)

    def run(*arguments):
        nonlocal compiled
        try:
            return compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException:  # not compiled yet: the switch below takes time at each call
            pass
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            if compiled is not for_each_shape:
                try:
                    return compiled(*arguments)
                except torch._dynamo.exc.TorchDynamoException:
                    pass
            results = for_each_shape(*arguments)  # raises once more where it is not the shapes
        compiled = for_each_shape
        return results

    return run


def guards_of_values(guards: Sequence) -> list[bool]:
    """What compiled code checks at each call: not that global functions and modules are what they were, half of it."""
    return [not (guard.is_global and (callable(x := guard.value) or ismodule(x) or iscode(x))) for guard in guards]


def check_tasks(**tensors: Tensor) -> None:
    """Tensors that share the number of tasks; support and queries as many labels as samples."""
    shapes = [x.shape[:2] if isinstance(x, Tensor) else () for x in tensors.values()]  # in support, labels, …: pairs
    if all(len(shape) == 2 and shape[0] == shapes[0][0] and shape[1] > 0 for shape in shapes) and all(
        samples == labels for samples, labels in zip(shapes[::2], shapes[1::2])
    ):
        return
    (first_name, first), *_ = tensors.items()
    for name, x in tensors.items():
        tensor(name, x)
        if x.dim() < 2 or x.shape[1] == 0:
            raise ValueError(
                f"{name}: expected shape (tasks, samples, ...) with at least one sample, got {describe(x)}; "
                f"unsqueeze(0) makes one task a batch"
            )
        if len(x) != len(first):
            raise ValueError(
                f"{name}: expected the {len(first)} tasks of {first_name}, got {describe(x)}; pass as many"
            )
    for name, labels in (("support", "support_labels"), ("queries", "query_labels")):
        if labels in tensors:
            check_labels(name, tensors[name], labels, tensors[labels], dim=1)


def check_labels(name: str, samples: Tensor, labels_name: str, labels: Tensor, dim: int) -> None:
    """As many labels as samples, along this dimension."""
    if labels.shape[dim : dim + 1] != samples.shape[dim : dim + 1]:
        raise ValueError(
            f"{labels_name}: expected one label for each of the {samples.shape[dim]} samples of {name}, "
            f"got {describe(labels)}; pass as many"
        )


def check_constant(**tensors: Tensor) -> None:
    """The meta-gradient goes to parameters alone, so that nothing else may wait for one."""
    for name, x in tensors.items():
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor without gradient, got one that requires it, which it would not be given; "
                f"detach() it, or move what computes it into the network"
            )
