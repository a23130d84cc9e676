"""Deep CORAL: the covariances of both domains' features are made to agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..nn.coral import DeepCORALLoss
from .method import Method, Passed, Term


class CORALTerm(Term):
    """The CORAL loss over layers of the method, which may be of the feature extractor or of the label predictor.

    Args:
        layers: names as in `method.named_modules()`: "feature_extractor" is its output, "feature_extractor.layer4" a
            layer within, "label_predictor" the logits.
        weight: α; with the paper's scale useful ones are 100 to 1000.
        name: its name in the losses.
        options: those of :class:`fastda.nn.DeepCORALLoss`: `weights` of the layers, `scale`, `mean_weight`,
            `correction`, `pool`.
    """

    def __init__(
        self,
        layers: str | Sequence[str] = "feature_extractor",
        *,
        weight: float | Callable[[float], float] = 1000.0,
        name: str = "coral",
        **options,
    ) -> None:
        super().__init__(name, weight)
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        self.least_samples = options.get("correction", 1) + 1
        self.options = options

    def attach(self, method: Method) -> None:
        self.coral = DeepCORALLoss(method, self.layers, **self.options)
        self.passes = method.passes
        self.needs_target_logits = any(name.partition(".")[0] == "label_predictor" for name in self.layers)

    def begin(self) -> None:
        self.coral.forget()

    def forward(self, passed: Passed) -> Tensor:
        self.coral.process_group = passed.process_group
        return self.coral(len(passed.source_features) if self.passes == "joint" else None)


class DeepCORAL(Method):
    r"""Deep CORAL: L = L_task + α·L_CORAL, over any number of layers.

    Args:
        feature_extractor, label_predictor: as in :class:`Method`.
        layers: names as in `method.named_modules()`; by default the features, "feature_extractor".
        weight: α, a number or a function of the progress of training; with the paper's scale useful ones are 100 to
            1000.
        weights: one a layer, all 1 by default.
        scale, mean_weight, correction, pool: as in :class:`fastda.nn.DeepCORALLoss`.
        options: those of :class:`Method`.

    Source: Sun & Saenko, Deep CORAL: Correlation Alignment for Deep Domain Adaptation, ECCV workshops 2016.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.methods import DeepCORAL
        >>> method = DeepCORAL(nn.Linear(8, 4), nn.Linear(4, 3), layers=["feature_extractor", "label_predictor"])
        >>> losses = method.losses(torch.randn(6, 8), torch.randint(0, 3, (6,)), torch.randn(5, 8))
        >>> sum(losses.values()).backward()
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        label_predictor: nn.Module,
        *,
        layers: str | Sequence[str] = "feature_extractor",
        weight: float | Callable[[float], float] = 1000.0,
        weights: Sequence[float] | None = None,
        scale: str = "paper",
        mean_weight: float = 0.0,
        correction: int = 1,
        pool: str | Callable[[Tensor], Tensor] = "mean",
        **options,
    ) -> None:
        term = CORALTerm(
            layers,
            weight=weight,
            weights=weights,
            scale=scale,
            mean_weight=mean_weight,
            correction=correction,
            pool=pool,
        )
        super().__init__(feature_extractor, label_predictor, [term], **options)
