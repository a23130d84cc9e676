"""learn2learn: class means and squared distances of its prototypical classifier.

Left alone: `cosine_distance`, one matrix product; `MAML` and `maml_update`, which adapt one task at a time in the
user's own loop, where all tasks at once (`fastda.fewshot.MAML`) need another loop.
"""

from __future__ import annotations

import torch

from .. import ops
from .replacement import Replacement, features
from .replacement import labels as are_labels

KNOWN = "0.2.0"


def compute_prototypes(original, support, labels):
    """Classes are the labels that occur, in ascending order."""
    if not (are_labels(labels) and features(support, dims=max(support.dim(), 1))):
        return original(support, labels)
    classes, labels = torch.unique(labels, return_inverse=True)
    shape = support.shape[1:]
    means = ops.class_means(support.reshape(len(support), shape.numel()), labels, len(classes))
    return means.to(support.dtype).reshape(len(classes), *shape)


def euclidean_distance(original, prototypes, queries):
    """‖q − p‖², of queries × prototypes; the prototypes come first among the arguments."""
    if not features(prototypes, queries):
        return original(prototypes, queries)
    return ops.pairwise_distance(queries, prototypes)


def _probe_prototypes(function, normal):
    for shape, values in (((5, 3), [7, 0, 4, 0, 4]), ((4, 2, 3), [1, 2, 2, 1])):
        yield function(normal(*shape), torch.tensor(values))


def _probe_distance(function, normal):
    yield function(normal(3, 4), normal(5, 4))


MODULE = "learn2learn.nn.protonet"
REPLACEMENTS = (
    Replacement(MODULE, "compute_prototypes", "class_means", compute_prototypes, _probe_prototypes),
    Replacement(
        MODULE,
        "PrototypicalClassifier.euclidean_distance",
        "pairwise_distance",
        euclidean_distance,
        _probe_distance,
    ),
)
