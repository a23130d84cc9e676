"""The domain classifier of adversarial adaptation."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops import gradient_reversal_fork, gradient_reversal_linear
from ..reference import checks

NORMALISATIONS = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class DomainDiscriminator(nn.Sequential):
    """Tells source features from target features: hidden layers with ReLU, and one logit at the end.

    The logit is that of being source. Train it with :func:`fastda.domain_adversarial_loss`, on features whose gradient
    is reversed; `fork` has the reversal in its first layer, where it costs no pass over the features.

    Args:
        in_features: D, features of a sample.
        hidden_features: units of a hidden layer.
        num_layers: 2 or 3 linear layers, the last of them for the logit.
        dropout: probability of a hidden unit's being dropped in training, in [0, 1).
        normalisation: "none", "batch" or "layer", between a hidden layer and its ReLU. With "batch" give it both
            domains in one batch, so that the statistics do not tell them apart.

    Shape:
        `(N, D)` to `(N, 1)`; any leading dimensions but for normalisation="batch". float32, float64, bfloat16 or
        float16.

    Raises:
        TypeError, ValueError: an argument of another type, or outside of its bounds.

    Differentiable any number of times.

    Source: the classifier of Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016, for large
    networks: two hidden layers of 1024 units, with dropout.

    Example:
        >>> import torch, fastda
        >>> discriminator = fastda.nn.DomainDiscriminator(256, hidden_features=64)
        >>> features, logits = discriminator.fork(torch.randn(8, 256, requires_grad=True), lambd=0.3)
        >>> logits.shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 1024,
        *,
        num_layers: int = 3,
        dropout: float = 0.5,
        normalisation: str = "none",
    ) -> None:
        checks.whole_number("in_features", in_features, 1)
        checks.whole_number("hidden_features", hidden_features, 1)
        if checks.whole_number("num_layers", num_layers, 2) > 3:
            raise ValueError(f"num_layers: expected 2 or 3, got {num_layers}; write others with torch.nn.Sequential")
        if checks.number("dropout", dropout, least=0.0) >= 1:
            raise ValueError(f"dropout: expected a probability below 1, got {dropout}; 1 would drop every unit")
        normalise = NORMALISATIONS[checks.option("normalisation", normalisation, tuple(NORMALISATIONS))]
        layers: list[nn.Module] = []
        for width in [in_features, *[hidden_features] * (num_layers - 2)]:
            layers.append(nn.Linear(width, hidden_features))
            if normalise is not None:
                layers.append(normalise(hidden_features))
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(hidden_features, 1))

    def fork(self, x: Tensor, lambd: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
        """The features for the label predictor, and domain logits through which their gradient comes back times −λ.

        Args:
            x: features `(..., D)`.
            lambd: λ, as in :func:`fastda.gradient_reversal`.

        Returns:
            A view of `x`, and the logits `(..., 1)`.
        """
        first, *rest = self
        if type(first) is nn.Linear and not (first._forward_pre_hooks or first._forward_hooks or first._backward_hooks):
            features, hidden = gradient_reversal_linear(x, first.weight, first.bias, lambd)
        else:  # spectral normalisation, an adapter: the layer computes more than its weight says
            features, hidden = gradient_reversal_fork(x, lambd)
            hidden = first(hidden)
        for layer in rest:
            hidden = layer(hidden)
        return features, hidden
