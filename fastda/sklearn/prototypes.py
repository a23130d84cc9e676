"""Nearest class mean, as a scikit-learn classifier."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from ..ops import class_means, nearest_prototype, prototype_softmax
from ..reference import checks
from ..reference.prototypes import METRICS
from .domains import DTYPES, split_domains


class PrototypeClassifier(ClassifierMixin, BaseEstimator):
    r"""The class of the nearest prototype, which is the mean of a class; the target draws the prototypes to itself.

    With samples of the target the prototypes are moved `refinements` times to the means of the target, each sample
    weighted by its probability of the class:

    .. math:: c_k \leftarrow \sum_j p_k(x_j) \, x_j \Big/ \sum_j p_k(x_j)

    That suits classes that stay nearest to their own prototypes. A shift that carries a class past another's prototype,
    such as a shear, can leave the two swapped, and worse than without the target: compare with `refinements=0`, or take
    :class:`CORALClassifier`.

    Args:
        metric: "sqeuclidean", "euclidean" or "cosine", as in :func:`fastda.prototype_softmax`.
        temperature: what the distances are divided by before the softmax, as in :func:`fastda.prototype_softmax`.
        refinements: how many times the prototypes are moved to the target; at 0 it is not looked at.

    Attributes:
        classes_: (C,), the labels of the source, sorted.
        prototypes_: (C, D) float64; NaN for a class that `partial_fit` has seen no sample of.
        class_count_: (C,), source samples of each class.
        n_features_in_: D.

    Source: Snell, Swersky & Zemel, Prototypical Networks for Few-shot Learning, NeurIPS 2017; the weighted means of the
    target are those of Liang, Hu & Feng, Do We Really Need to Access the Source Data?, ICML 2020.

    Example:
        >>> import numpy as np
        >>> from fastda.sklearn import PrototypeClassifier
        >>> X = np.array([[0.0, 0.0], [4.0, 0.0], [1.0, 5.0], [5.0, 5.0]])
        >>> classifier = PrototypeClassifier().fit(X, ["left", "right", "?", "?"], sample_domain=[1, 1, -1, -1])
        >>> classifier.predict([[2.5, 5.0], [3.5, 5.0]])
        array(['left', 'right'], dtype='<U5')
    """

    def __init__(self, *, metric: str = "sqeuclidean", temperature: float = 1.0, refinements: int = 10) -> None:
        self.metric = metric
        self.temperature = temperature
        self.refinements = refinements

    def fit(self, X, y, sample_domain=None):
        """Take the prototypes from the source, and move them to the target if there is any.

        Args:
            X: (N, D), the features of both domains.
            y: (N,), labels of any type; those of the target are not looked at.
            sample_domain: (N,), positive for the source and negative for the target; None if all are the source's.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: parameters or data that do not fit; each says what to do.
        """
        self._check_parameters()
        source, labels, target = split_domains(self, X, y, sample_domain)
        self.classes_, indices = np.unique(labels, return_inverse=True)
        self.class_count_ = np.bincount(indices)
        means = class_means(_tensor(source), torch.from_numpy(indices.astype(np.int64)), len(self.classes_))
        if len(target):
            means = self._refined(means, _tensor(target))
        self.prototypes_ = means.numpy()
        return self

    def partial_fit(self, X, y, classes=None):
        """Take further labelled samples of the source into the means.

        Args:
            X: (N, D) features.
            y: (N,) labels.
            classes: all labels that will ever come; at the first call, and by default those of its `y`.

        Returns:
            The estimator.

        Raises:
            ValueError: labels outside the classes; other numbers of features.
        """
        first = not hasattr(self, "classes_")
        self._check_parameters()
        X, y = validate_data(self, X, y, dtype=DTYPES, reset=first)
        check_classification_targets(y)
        if first:
            self.classes_ = np.unique(y if classes is None else classes)
            self.class_count_ = np.zeros(len(self.classes_), dtype=np.int64)
            self.prototypes_ = np.full((len(self.classes_), X.shape[1]), np.nan)
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise ValueError(
                f"y: expected one of {self.classes_.tolist()}, got {unknown[0]!r}; pass all to the first call"
            )
        indices = np.searchsorted(self.classes_, y)
        means = class_means(_tensor(X), torch.from_numpy(indices.astype(np.int64)), len(self.classes_)).numpy()
        count = np.bincount(indices, minlength=len(self.classes_))
        total = self.class_count_ + count
        share = (count / np.maximum(total, 1))[:, None]
        before = np.where(self.class_count_[:, None] > 0, self.prototypes_, means)
        self.prototypes_ = np.where(count[:, None] > 0, before + share * (means - before), self.prototypes_)
        self.class_count_ = total
        return self

    def predict(self, X) -> np.ndarray:
        """(N,) the class of each sample's nearest prototype."""
        X, seen, prototypes = self._queries(X)
        _, nearest = nearest_prototype(X, prototypes, metric=self.metric)
        return self.classes_[seen[nearest.reshape(len(X)).numpy()]]

    def predict_proba(self, X) -> np.ndarray:
        """(N, C) probabilities of the classes, in the order of `classes_`."""
        X, seen, prototypes = self._queries(X)
        probabilities = np.zeros((len(X), len(self.classes_)))
        probabilities[:, seen] = self._softmax(X, prototypes).numpy()
        return probabilities

    def _queries(self, X) -> tuple[Tensor, np.ndarray, Tensor]:
        """Features, the indices of the classes that have a prototype, and these."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=DTYPES, reset=False)
        seen = np.flatnonzero(self.class_count_)
        return _tensor(X), seen, _tensor(self.prototypes_[seen])

    def _refined(self, prototypes: Tensor, target: Tensor) -> Tensor:
        for _ in range(self.refinements):
            weights = self._softmax(target, prototypes)
            mass = weights.sum(0)[:, None]
            moved = weights.T @ target / mass
            prototypes = torch.where(mass > torch.finfo(mass.dtype).tiny, moved, prototypes)  # none near: it stays
        return prototypes

    def _softmax(self, X: Tensor, prototypes: Tensor) -> Tensor:
        return prototype_softmax(X, prototypes, metric=self.metric, temperature=self.temperature)

    def _check_parameters(self) -> None:
        checks.option("metric", self.metric, METRICS)
        checks.number("temperature", self.temperature, above=0)
        checks.whole_number("refinements", self.refinements, 0)


def _tensor(X: np.ndarray) -> Tensor:
    return torch.tensor(X, dtype=torch.float64)
