"""easyfsl: class means, and the negative distances of which its classifiers make their scores.

Left alone: `cosine_distance_to_prototypes`, a matrix product of normalised features, which there is nothing to gain on;
the distances that LaplacianShot and PTMAP take with `torch.cdist` inside of larger functions.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch

from .. import ops
from .replacement import Replacement, features, labels

KNOWN = "1.5.0"


def compute_prototypes(original, support_features, support_labels):
    """Classes are 0 … n − 1 for n different labels: other labels count for nothing, a class without support is NaN."""
    if not (labels(support_labels) and features(support_features, dims=max(support_features.dim(), 1))):
        return original(support_features, support_labels)
    present = support_labels.unique()
    n_way, shape = len(present), support_features.shape[1:]
    if not torch.equal(present, torch.arange(n_way, dtype=present.dtype, device=present.device)):
        counted = (support_labels >= 0) & (support_labels < n_way)
        support_features, support_labels = support_features[counted], support_labels[counted]
    means = ops.class_means(support_features.reshape(len(support_features), shape.numel()), support_labels, n_way)
    return means.to(support_features.dtype).reshape(n_way, *shape)


def l2_distance_to_prototypes(original, self, samples):
    """Scores are −‖q − p‖, not squared. The library's cdist has no second derivative for small episodes."""
    if not features(samples, self.prototypes):
        return original(self, samples)
    return -ops.pairwise_distance(samples, self.prototypes, metric="euclidean")


def _probe_prototypes(function, normal):
    for shape, values in (((5, 3), [2, 0, 1, 0, 1]), ((4, 2, 1, 3), [0, 1, 1, 0]), ((4, 2), [2, 0, 3, 0])):
        yield function(normal(*shape), torch.tensor(values))


def _probe_distance(function, normal):
    yield function(SimpleNamespace(prototypes=normal(3, 4)), normal(5, 4))


REPLACEMENTS = (
    Replacement("easyfsl.methods.utils", "compute_prototypes", "class_means", compute_prototypes, _probe_prototypes),
    Replacement(
        "easyfsl.methods.few_shot_classifier",
        "FewShotClassifier.l2_distance_to_prototypes",
        "pairwise_distance",
        l2_distance_to_prototypes,
        _probe_distance,
    ),
)
