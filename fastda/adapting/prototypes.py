"""Classes by prototypes: their means in the features of a network, moved from the source to the target."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data_files.labels import UNKNOWN
from ..ops import class_means, prototype_log_softmax

PRIOR = 5
"""Labelled target samples that a prototype of the source counts as."""
MOST_FITTED = 2000  # samples that the temperature is fitted to


class Prototypes(nn.Module):
    """Log-probabilities of features, by the cosine of their angle to a prototype of each class.

    Args:
        centre, stretch: (D,): features are f ↦ (f − centre) · stretch before they are compared.
        prototypes: (C, D).
        temperature: zero-dimensional, above 0.
    """

    def __init__(self, centre: Tensor, stretch: Tensor, prototypes: Tensor, temperature: Tensor) -> None:
        super().__init__()
        for name, value in (("centre", centre), ("stretch", stretch), ("prototypes", prototypes)):
            self.register_buffer(name, value)
        self.register_buffer("temperature", temperature)

    @classmethod
    def like(cls, prototypes: Tensor) -> Prototypes:
        """To load a state into."""
        empty = torch.empty_like(prototypes[0])
        return cls(empty, empty.clone(), torch.empty_like(prototypes), torch.empty_like(prototypes[0, 0]))

    def forward(self, features: Tensor) -> Tensor:
        features = (features - self.centre) * self.stretch
        return prototype_log_softmax(features, self.prototypes, metric="cosine", temperature=self.temperature)


def target_prototypes(
    source: Tensor,
    source_labels: Tensor,
    held_out: Tensor,
    target: Tensor,
    target_labels: Tensor,
    num_classes: int,
) -> Prototypes:
    r"""The source's prototypes, moved to the target, and drawn to the labelled samples that it has.

    The target's features are given the mean and the deviations of the source's, one by one. Then, with unit vectors
    s, t of the centred features,

    .. math:: p_c = \frac{\sum_{y_i = c} t_i + 5 \, \bar s_c}{n_c + 5}

    The temperature is the one under which the labels of the held-out source samples are most likely.

    Args:
        source: (Ns, D), features. source_labels: (Ns,). held_out: (Ns,), bool: not for the prototypes.
        target: (Nt, D). target_labels: (Nt,), negative where unknown.
        num_classes: C.

    Source: means of centred features of unit length: Wang, Chao, Weinberger & van der Maaten, SimpleShot, 2019; each
    domain by its own mean and deviation: Li et al., Revisiting batch normalization for practical domain adaptation,
    ICLR workshops 2017; the temperature: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    source, target = source.double(), target.double()
    source_mean, centre = source.mean(0), target.mean(0)
    deviations = [x.std(0, correction=0) for x in (source, target)]
    stretch = torch.where(deviations[1] > 1e-6 * deviations[0], deviations[0] / deviations[1], 0)
    one, other = F.normalize(source - source_mean), F.normalize((target - centre) * stretch)
    means = F.normalize(class_means(one[~held_out], source_labels[~held_out], num_classes, empty="zero"))
    temperature = _likeliest_temperature(one[held_out] @ means.T, source_labels[held_out])
    known = target_labels != UNKNOWN
    sums = torch.zeros_like(means).index_add_(0, target_labels[known], other[known])
    counts = torch.bincount(target_labels[known], minlength=num_classes)[:, None]
    prototypes = F.normalize((sums + PRIOR * means) / (counts + PRIOR))
    return Prototypes(
        centre.float(), stretch.float(), prototypes.float(), torch.tensor(temperature, dtype=torch.float32)
    )


def _likeliest_temperature(cosines: Tensor, labels: Tensor) -> float:
    """Of 121 from 0.001 to 1000, on a logarithmic scale."""
    if len(cosines) == 0:
        return 0.2
    temperatures = torch.logspace(-3, 3, 121, dtype=torch.float64).tolist()
    losses = [float(F.cross_entropy(cosines[:MOST_FITTED] / t, labels[:MOST_FITTED])) for t in temperatures]
    return temperatures[min(range(len(losses)), key=lambda i: losses[i] if math.isfinite(losses[i]) else math.inf)]
