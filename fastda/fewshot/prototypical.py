"""Prototypical networks: each class is the mean of its support in feature space."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..files import write_atomically
from ..nn.modes import evaluating
from ..nn.outputs import as_tensor
from ..reference import checks
from ..reference.prototypes import METRICS

CENTRINGS = ("none", "support", "base")
FITTED = ("prototypes", "counts", "classes", "centre")
WRITTEN = "expected a file that save_prototypes wrote"


class PrototypicalNetwork(nn.Module):
    r"""A classifier that learns a class from a few samples: prototypes are class means of features.

    .. math:: p_c = \frac1{|S_c|} \sum_{s \in S_c} f(x_s), \qquad P(c \mid x) \propto e^{-d(f(x), p_c) / T}

    Trained over episodes with `loss`, evaluated by calling it, and used with `fit_support` and `predict`. Without a
    trained backbone of your own any feature extractor will do: `PrototypicalNetwork(backbone, centring="base",
    normalise=True)` is SimpleShot.

    Args:
        backbone: from samples (n, *sample) to features (n, D); more dimensions are flattened. `torch.nn.Identity()` for
            features that are computed already. Of Hugging Face's outputs, the logits or the pooled output is taken.
        metric: d: "sqeuclidean", "euclidean" or "cosine" (1 − similarity).
        temperature: T. A cosine lies in [0, 2]: take 0.1 or learn it.
        learn_temperature: make T a parameter of the module, starting from `temperature`; it stays positive.
        centring: what is subtracted from all features. "none"; "support": the mean of the support, of each episode
            its own; "base": the mean feature of the base classes, which `fit_centre` takes. It matters with
            `normalise` and "cosine".
        normalise: divide features by their Euclidean length, after centring.

    Raises:
        TypeError, ValueError: arguments that do not fit, named.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017; Wang, Chao, Weinberger &
    van der Maaten, SimpleShot, 2019.

    Example: two classes from two samples each, and a third one later
        >>> import torch
        >>> from fastda.fewshot import PrototypicalNetwork
        >>> network = PrototypicalNetwork(torch.nn.Identity())
        >>> support = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
        >>> _ = network.fit_support(support, torch.tensor([7, 7, 3, 3]))
        >>> network.predict(torch.tensor([[3.0, 1.0]]))
        tensor([3])
        >>> _ = network.add_support(torch.tensor([[2.0, 9.0]]), torch.tensor([5]))
        >>> network.predict(torch.tensor([[3.0, 1.0], [2.0, 8.0]]))
        tensor([3, 5])
    """

    prototypes: Tensor | None
    counts: Tensor | None
    classes: Tensor | None
    centre: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        *,
        metric: str = "sqeuclidean",
        temperature: float = 1.0,
        learn_temperature: bool = False,
        centring: str = "none",
        normalise: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            raise TypeError(
                f"backbone: expected a torch.nn.Module, got {checks.describe(backbone)}; wrap the function in a Module"
            )
        self.backbone = backbone
        self.metric = checks.option("metric", metric, METRICS)
        self.centring = checks.option("centring", centring, CENTRINGS)
        self.normalise = normalise
        temperature = checks.number("temperature", temperature, above=0)
        self.fixed_temperature = None if learn_temperature else temperature
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learn_temperature else None
        for name in FITTED:
            self.register_buffer(name, None)

    def extra_repr(self) -> str:
        temperature = float(torch.as_tensor(self.temperature).detach())
        learned = ", learn_temperature=True" if self.log_temperature is not None else ""
        fitted = "" if self.classes is None else f", {len(self.classes)} classes fitted"
        return (
            f"metric={self.metric!r}, temperature={temperature:g}{learned}, "
            f"centring={self.centring!r}, normalise={self.normalise}{fitted}"
        )

    @property
    def temperature(self) -> float | Tensor:
        """T, a number or a zero-dimensional tensor with gradient."""
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    # Episodes

    def forward(
        self, support: Tensor, support_labels: Tensor, queries: Tensor, num_classes: int | None = None
    ) -> Tensor:
        """Log-probabilities of the classes of each query of an episode, or of a batch of episodes.

        Args:
            support: (..., S, *sample). support_labels: (..., S), 0 ... C − 1. queries: (..., Q, *sample).
            num_classes: C; None reads it off the support labels (which waits for a GPU). A class without support has
                probability 0.

        Returns:
            (..., Q, C).
        """
        support, queries = self._features_of_episode(support, support_labels, queries)
        prototypes = ops.class_means(support, support_labels, _count(support_labels, num_classes))
        return ops.prototype_log_softmax(queries, prototypes, metric=self.metric, temperature=self.temperature)

    def loss(
        self,
        support: Tensor,
        support_labels: Tensor,
        queries: Tensor,
        query_labels: Tensor,
        num_classes: int | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """Cross-entropy of the queries, by the fused :func:`fastda.prototypical_loss`.

        An `Episode` unpacks into the arguments. Support and queries of all episodes go through the backbone together,
        so that BatchNorm in training mode sees them all. The other arguments are those of `forward`; `reduction` is
        "mean" over all queries, "sum" or "none".
        """
        support, queries = self._features_of_episode(support, support_labels, queries)
        return ops.prototypical_loss(
            support,
            support_labels,
            queries,
            query_labels,
            _count(support_labels, num_classes),
            metric=self.metric,
            temperature=self.temperature,
            reduction=reduction,
        )

    def _features_of_episode(self, support: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Centred and normalised features (..., S, D) and (..., Q, D)."""
        for name, x in (("support", support), ("support_labels", labels), ("queries", queries)):
            checks.tensor(name, x)
        dims = labels.dim()
        if dims < 1 or support.shape[:dims] != labels.shape or queries.shape[: dims - 1] != labels.shape[:-1]:
            raise ValueError(
                f"support, support_labels, queries: expected shapes (..., S, *sample), (..., S) and (..., Q, *sample), "
                f"got {tuple(support.shape)}, {tuple(labels.shape)} and {tuple(queries.shape)}; use one batch"
            )
        shapes = support.shape[:dims], queries.shape[:dims]
        support, queries = (x.reshape(shape.numel(), *x.shape[dims:]) for x, shape in zip((support, queries), shapes))
        if self.backbone.training:  # together, for layers that look at the whole batch
            features = self._backbone(torch.cat([support, queries]))
            support, queries = features.split([shape.numel() for shape in shapes])
        else:
            support, queries = self._backbone(support), self._backbone(queries)
        support, queries = (x.view(*shape, x.shape[1]) for x, shape in zip((support, queries), shapes))
        centre = support.mean(-2, keepdim=True) if self.centring == "support" else self.centre
        return self._transformed(support, centre), self._transformed(queries, centre)

    def _backbone(self, inputs: Tensor) -> Tensor:
        features = as_tensor("backbone", self.backbone(inputs))
        if features.dim() < 2 or len(features) != len(inputs):
            raise ValueError(
                f"backbone: expected features of shape ({len(inputs)}, ...) from it, got {checks.describe(features)}; "
                f"wrap it in a module that returns them"
            )
        return features.flatten(1)

    def _transformed(self, features: Tensor, centre: Tensor | None) -> Tensor:
        if self.centring != "none":
            if centre is None:
                needed = "fit_centre(base samples)" if self.centring == "base" else "fit_support"
                raise RuntimeError(f"centring={self.centring!r}: expected a centre, got none yet; call {needed} first")
            features = features - centre
        return F.normalize(features, dim=-1) if self.normalise else features

    # Use

    @torch.no_grad()
    def fit_centre(self, inputs: Tensor, *, batch_size: int | None = None) -> PrototypicalNetwork:
        """Take the mean feature of samples of the base classes, for `centring="base"`; classes are forgotten."""
        if self.centring != "base":
            raise RuntimeError(
                f"centring: expected 'base', got {self.centring!r}; make the network with centring='base'"
            )
        self.forget()
        self.centre = self._raw_features(inputs, batch_size).mean(0)
        return self

    @torch.no_grad()
    def fit_support(self, support: Tensor, labels: Tensor, *, batch_size: int | None = None) -> PrototypicalNetwork:
        """Learn classes from labelled samples; what was learnt before is forgotten.

        Args:
            support: (S, *sample).
            labels: (S,), any integers; `predict` answers with them.
            batch_size: so many samples go through the backbone at a time; None: all.
        """
        labels = self._check_support(support, labels)
        features = self._raw_features(support, batch_size)
        self.forget()
        if self.centring == "support":
            self.centre = features.mean(0)
        return self._learn(features, labels)

    @torch.no_grad()
    def add_support(self, support: Tensor, labels: Tensor, *, batch_size: int | None = None) -> PrototypicalNetwork:
        """Learn more: new classes are added, and more samples of a class refine its mean. Nothing is trained again."""
        self._check_fitted()
        labels = self._check_support(support, labels)
        features = self._raw_features(support, batch_size)
        if features.shape[1] != self.prototypes.shape[1]:
            raise ValueError(
                f"support: expected the {self.prototypes.shape[1]} features of the prototypes, "
                f"got {features.shape[1]}; take samples and backbone as for fit_support"
            )
        return self._learn(features, labels)

    def _learn(self, features: Tensor, labels: Tensor) -> PrototypicalNetwork:
        features = self._transformed(features, self.centre)
        new, index = labels.unique(return_inverse=True)
        means = ops.class_means(features, index, len(new))
        counts = torch.zeros_like(new).scatter_add(0, index, torch.ones_like(index))
        if self.classes is not None:
            new, index = torch.cat([self.classes, new]).unique(return_inverse=True)
            weights = torch.cat([self.counts, counts])
            sums = torch.cat([self.prototypes, means]) * weights.unsqueeze(-1)
            counts = torch.zeros_like(new).scatter_add(0, index, weights)
            means = torch.zeros_like(sums[: len(new)]).index_add(0, index, sums) / counts.unsqueeze(-1)
        self.prototypes, self.counts, self.classes = means, counts, new
        return self

    def forget(self) -> None:
        """Forget the classes (and with `centring="support"` their centre)."""
        self.prototypes = self.counts = self.classes = None
        if self.centring == "support":
            self.centre = None

    @torch.no_grad()
    def predict(self, queries: Tensor, *, k: int | None = None, batch_size: int | None = None) -> Tensor:
        """The labels of the nearest prototypes, as `fit_support` was given them.

        Args:
            queries: (Q, *sample).
            k: None: the nearest alone, (Q,); a number: the k nearest, (Q, k), nearest first.
            batch_size: so many samples go through the backbone at a time; None: all.
        """
        features = self._query_features(queries, batch_size)
        _, indices = ops.nearest_prototype(features, self.prototypes, metric=self.metric, k=1 if k is None else k)
        labels = self.classes[indices]
        return labels.squeeze(-1) if k is None else labels

    @torch.no_grad()
    def predict_proba(self, queries: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Probabilities (Q, C) of the classes, in the order of the attribute `classes` (ascending labels)."""
        features = self._query_features(queries, batch_size)
        return ops.prototype_softmax(features, self.prototypes, metric=self.metric, temperature=self.temperature)

    @torch.no_grad()
    def embed(self, inputs: Tensor, *, batch_size: int | None = None) -> Tensor:
        """Centred and normalised features (n, D), which prototypes are compared with."""
        return self._transformed(self._raw_features(inputs, batch_size), self.centre)

    def _query_features(self, queries: Tensor, batch_size: int | None) -> Tensor:
        self._check_fitted()
        return self.embed(queries, batch_size=batch_size)

    def _raw_features(self, inputs: Tensor, batch_size: int | None) -> Tensor:
        checks.tensor("inputs", inputs)
        if batch_size is not None:
            checks.whole_number("batch_size", batch_size, 1)
        with evaluating(self.backbone):
            parts = [self._backbone(some) for some in inputs.split(batch_size or max(1, len(inputs)))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _check_support(self, support: Tensor, labels: Tensor) -> Tensor:
        checks.tensor("support", support)
        if support.dim() < 2 or len(support) == 0:
            raise ValueError(
                f"support: expected shape (samples, *sample) with at least one sample, got {checks.describe(support)}; "
                f"pass labelled samples"
            )
        return checks.labels("labels", labels, (len(support),), "support", support)

    def _check_fitted(self) -> None:
        if self.classes is None:
            raise RuntimeError("support: expected classes to compare with, got none yet; call fit_support first")

    # Saving

    def save_prototypes(self, path: str | Path) -> None:
        """Write classes, prototypes and centre to a file, without the backbone; whole or not at all."""
        self._check_fitted()
        state = {name: None if x is None else x.cpu() for name, x in self._fitted().items()}
        write_atomically(Path(path), lambda file: torch.save({**state, **self._settings()}, file))

    def load_prototypes(self, path: str | Path) -> PrototypicalNetwork:
        """Read what `save_prototypes` wrote; a ValueError where metric, centring or normalisation were others."""
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, KeyError, EOFError, RuntimeError) as error:
            raise ValueError(f"{path}: {WRITTEN}, got another file ({error})") from error
        if not isinstance(state, dict) or state.keys() != {*FITTED, *self._settings()}:
            raise ValueError(f"{path}: {WRITTEN}, got another file")
        for name, value in self._settings().items():
            if state[name] != value:
                raise ValueError(
                    f"{path}: expected prototypes with {name}={value!r}, got {state[name]!r}; make the network so"
                )
        device = next((x.device for x in self.parameters()), torch.device("cpu"))
        for name in FITTED:
            setattr(self, name, None if state[name] is None else state[name].to(device))
        return self

    def _fitted(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in FITTED}

    def _settings(self) -> dict[str, str | bool]:
        return {"metric": self.metric, "centring": self.centring, "normalise": self.normalise}

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        """Prototypes are part of the state, as many as there are there."""
        for name in FITTED:
            value = state_dict.get(f"{prefix}{name}")
            own = next((x.device for x in self.parameters()), torch.device("cpu"))
            self._buffers[name] = None if value is None else torch.empty_like(value, device=own)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _count(labels: Tensor, num_classes: int | None) -> int:
    if num_classes is None and labels.numel() == 0:
        raise ValueError("num_classes: expected a number where there is no support to read it off, got None; pass it")
    return int(labels.max()) + 1 if num_classes is None else num_classes
