"""torchmeta: prototypes and loss of prototypical networks, a batch of episodes at a time.

Left alone: matching networks and ridge regression, for which there is no op; datasets and meta-modules.
"""

from __future__ import annotations

import torch

from .. import ops
from .replacement import Replacement, features, labels

KNOWN = "1.8.0"
OPTIONS = {"ignore_index", "label_smoothing", "reduction"}


def get_prototypes(original, embeddings, targets, num_classes):
    """The prototype of a class without support is 0."""
    if not (features(embeddings, dims=3) and labels(targets, dims=2)):
        return original(embeddings, targets, num_classes)
    return ops.class_means(embeddings, targets, num_classes, empty="zero").to(embeddings.dtype)


def prototypical_loss(original, prototypes, embeddings, targets, **kwargs):
    """Cross-entropy of −‖q − p‖², its options those of `torch.nn.functional.cross_entropy`; no logits are held."""
    served = features(prototypes, embeddings, dims=3) and labels(targets, dims=2) and kwargs.keys() <= OPTIONS
    if not served:
        return original(prototypes, embeddings, targets, **kwargs)
    return ops.prototype_cross_entropy(embeddings, prototypes, targets, **kwargs)


def _probe_prototypes(function, normal):
    yield function(normal(2, 5, 3), torch.tensor([[2, 0, 1, 0, 1], [3, 3, 0, 0, 1]]), 4)


def _probe_loss(function, normal):
    targets = torch.tensor([[2, 0, 1, 0], [1, 1, 0, 2]])
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.1}, {"ignore_index": 1}):
        yield function(normal(2, 3, 4), normal(2, 4, 4), targets, **options)


MODULE = "torchmeta.utils.prototype"
REPLACEMENTS = (
    Replacement(MODULE, "get_prototypes", "class_means", get_prototypes, _probe_prototypes),
    Replacement(MODULE, "prototypical_loss", "prototype_cross_entropy", prototypical_loss, _probe_loss, since="1.8.0"),
)
