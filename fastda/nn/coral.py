"""CORAL as Modules: between features, and over the layers of any model, which are watched."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import coral_loss, deep_coral_loss
from ..reference import checks
from ..reference.coral import SCALES
from ..reference.reduction import REDUCTIONS
from .outputs import OF_LAYER, as_tensor

POOLS = ("mean", "max", "flatten")


class CORALLoss(nn.Module):
    r"""How far apart the covariances of source and target features are; :func:`fastda.coral_loss` as a Module.

    .. math:: L = s \, \lVert C_s - C_t \rVert_F^2

    Args:
        correction, scale, mean_weight, reduction, process_group: as in :func:`fastda.coral_loss`.

    Shape:
        Features `(..., Ns, D)` and `(..., Nt, D)`, float32, float64, bfloat16 or float16, to a scalar, or `(...)` with
        `reduction="none"`.

    Raises:
        ValueError: an unknown option; at the call, what :func:`fastda.coral_loss` raises.

    Differentiable any number of times.

    Source: Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016.

    Example:
        >>> import torch
        >>> from fastda.nn import CORALLoss
        >>> source, target = torch.randn(32, 8, requires_grad=True), torch.randn(24, 8)
        >>> CORALLoss(scale="mean", mean_weight=1.0)(source, target).backward()
    """

    def __init__(
        self,
        *,
        correction: int = 1,
        scale: str = "paper",
        mean_weight: float = 0.0,
        reduction: str = "mean",
        process_group=None,
    ) -> None:
        super().__init__()
        _check(correction, scale, mean_weight)
        checks.option("reduction", reduction, REDUCTIONS)
        self.correction, self.scale, self.mean_weight = correction, scale, mean_weight
        self.reduction, self.process_group = reduction, process_group

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return coral_loss(
            source,
            target,
            correction=self.correction,
            scale=self.scale,
            mean_weight=self.mean_weight,
            reduction=self.reduction,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale!r}, mean_weight={self.mean_weight}"


class DeepCORALLoss(nn.Module):
    r"""CORAL loss over layers of a model, which are watched while the model runs; a term beside any objective.

    .. math:: L = \sum_l w_l \, s_l \, \lVert C_s^l - C_t^l \rVert_F^2

    Run the model once on both domains, source first, and call the loss with the number of source samples; or run it on
    the source, then on the target, and call the loss without arguments. What was watched is then forgotten. Passes
    without gradients (`torch.no_grad()`, as in evaluation) are not watched.

    Args:
        model: any module.
        layers: names of the modules to watch, as in `model.named_modules()`; one name, or several. A layer whose output
            is a tuple is taken by the first tensor in it, a Hugging Face output by its logits, pooled output or last
            hidden state.
        weights: w, one a layer; all 1 by default.
        correction, scale, mean_weight, process_group: as in :func:`fastda.coral_loss`. With the paper's scale useful
            weights of the whole loss are 100 to 1000.
        pool: how outputs of more than two dimensions become features: "mean" or "max" over positions, "flatten", or a
            function from the output to (samples, features). Positions are all dimensions after the channels for maps
            (N, C, H, W), and the tokens of sequences (N, T, D).

    Shape:
        Outputs of the layers (N, ...), float32, float64, bfloat16 or float16; the loss is a scalar, float64 for float64
        outputs, else float32.

    Raises:
        ValueError: a name that the model has not, no layers, or an unknown `scale` or `pool`; at the call, a model that
            ran not at all or too often, and what :func:`fastda.coral_loss` raises.

    Differentiable any number of times with respect to the outputs of the layers. Blind spot: covariances that agree
    while higher moments differ.

    Source: Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.nn import DeepCORALLoss
        >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        >>> coral = DeepCORALLoss(model, ["0", "3"])
        >>> source, target = torch.randn(16, 1, 8, 8), torch.randn(12, 1, 8, 8)
        >>> logits = model(torch.cat([source, target]))
        >>> loss = logits[:16].logsumexp(1).mean() + 1000 * coral(num_source=16)
        >>> loss.backward()
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        correction: int = 1,
        scale: str = "paper",
        mean_weight: float = 0.0,
        pool: str | Callable[[Tensor], Tensor] = "mean",
        process_group=None,
    ) -> None:
        super().__init__()
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.weights = None if weights is None else list(weights)
        if not self.layers or (self.weights is not None and len(self.weights) != len(self.layers)):
            raise ValueError(
                f"layers: expected at least one name, and one weight a name; got {len(self.layers)} names, "
                f"{'no' if weights is None else len(weights)} weights"
            )
        _check(correction, scale, mean_weight)
        if not callable(pool):
            checks.option("pool", pool, POOLS)
        self.correction, self.scale, self.mean_weight, self.pool = correction, scale, mean_weight, pool
        self.process_group = process_group
        self._watched = [_Watched() for _ in self.layers]
        self._handles = [
            _submodule(model, name).register_forward_hook(watched) for name, watched in zip(self.layers, self._watched)
        ]

    def forward(self, num_source: int | None = None) -> Tensor:
        """The loss between the domains of the last pass, of which `num_source` samples are source; or of the last two
        passes."""
        passes = 1 if num_source is not None else 2
        for name, watched in zip(self.layers, self._watched):
            if len(watched.outputs) != passes:
                count = len(watched.outputs)
                self.forget()
                raise ValueError(
                    f"layers: expected {name!r} to have run {'once' if passes == 1 else 'twice'} since the last loss, "
                    f"got {count} times; run the model on source and target together and pass num_source, or on one "
                    "after the other and pass nothing; evaluate under torch.no_grad()"
                )
        outputs = [[self._features(name, x) for x in w.outputs] for name, w in zip(self.layers, self._watched)]
        self.forget()
        if num_source is not None:
            outputs = [[x[:num_source], x[num_source:]] for (x,) in outputs]
        return deep_coral_loss(
            [source for source, _ in outputs],
            [target for _, target in outputs],
            weights=self.weights,
            correction=self.correction,
            scale=self.scale,
            mean_weight=self.mean_weight,
            process_group=self.process_group,
        )

    def forget(self) -> None:
        """Drop what was watched."""
        for watched in self._watched:
            watched.outputs.clear()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _features(self, name: str, output: object) -> Tensor:
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        output = as_tensor(f"output of {name!r}", output, OF_LAYER)
        features = self.pool(output) if callable(self.pool) else pool_positions(output, self.pool)
        if features.dim() != 2:
            raise ValueError(
                f"pool: expected (samples, features) from the output of {name!r}, got {checks.describe(features)}; "
                f"choose one of {', '.join(map(repr, POOLS))}"
            )
        return features

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, scale={self.scale!r}"


def _check(correction: int, scale: str, mean_weight: float) -> None:
    checks.whole_number("correction", correction, 0)
    checks.option("scale", scale, SCALES)
    checks.number("mean_weight", mean_weight, least=0)


def pool_positions(x: Tensor, pool: str) -> Tensor:
    """(N, C, *positions) or (N, tokens, D) → (N, C) or (N, D); "flatten" keeps all."""
    if x.dim() <= 2 or pool == "flatten":
        return x.flatten(1)
    positions = x.movedim(1, -1).flatten(1, -2) if x.dim() > 3 else x
    return positions.mean(1) if pool == "mean" else positions.amax(1)


class _Watched:
    """A forward hook that keeps outputs; an object, so that a copy of the model has hooks of its own."""

    def __init__(self) -> None:
        self.outputs: list[object] = []

    def __reduce__(self):
        return _Watched, ()

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if torch.is_grad_enabled():
            self.outputs.append(output)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    names = dict(model.named_modules())
    if name not in names or not name:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        close += [n for n in names if n.endswith(f".{name}") and n not in close]
        near = f"; near it are {', '.join(map(repr, close))}" if close else ""
        raise ValueError(
            f"layers: expected names of modules of {type(model).__name__}, got {name!r}{near} "
            "(see model.named_modules())"
        )
    return names[name]
