"""Model selection: scores of a validation set, higher is better; those of the target need no labels.

========================== =========================================================================================
`source_accuracy`           of the source; says little about the target, and is often the best of the unsupervised ones
`target_accuracy`           needs target labels: then selection is no longer unsupervised, which results have to say
`negative_entropy`          how sure the predictions are; a collapsed model is sure too
`information_maximisation`  sure predictions, spread over the classes
`snd`                       soft neighbourhood density: predictions that agree form dense groups
========================== =========================================================================================
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import checks

CHUNK = 2**24  # similarities in memory at a time


def negative_entropy(logits: Tensor) -> float:
    r"""Minus the mean entropy of the predictions, in nats: 0 for certain ones, −log C for uniform ones.

    .. math:: \frac1N \sum_n \sum_c p_{nc} \log p_{nc}

    Args:
        logits: (N, C), floating.

    Source: Morerio, Cavazza & Murino, Minimal-Entropy Correlation Alignment for Unsupervised Deep Domain Adaptation,
    ICLR 2018 (entropy on the target for choosing hyperparameters).

    Example:
        >>> import torch
        >>> from fastda.training import negative_entropy
        >>> round(negative_entropy(torch.zeros(3, 2)), 3)
        -0.693
    """
    return -_entropy(_log_probabilities(logits)).mean().item()


def information_maximisation(logits: Tensor) -> float:
    r"""Mutual information between inputs and predictions, in nats: entropy of the mean prediction less mean entropy.

    .. math:: H\Big(\frac1N \sum_n p_n\Big) - \frac1N \sum_n H(p_n)

    Args:
        logits: (N, C), floating.

    Source: Musgrave, Belongie & Lim, Three New Validators and a Large-Scale Benchmark Ranking for Unsupervised Domain
    Adaptation, 2022; the criterion is Krause, Perona & Gomes's, NeurIPS 2010.

    Example:
        >>> import torch
        >>> from fastda.training import information_maximisation
        >>> sure_and_spread, collapsed = torch.eye(3) * 50, torch.tensor([[50.0, 0, 0]] * 3)
        >>> round(information_maximisation(sure_and_spread), 3), round(information_maximisation(collapsed), 3)
        (1.099, 0.0)
    """
    log_probabilities = _log_probabilities(logits)
    mean = log_probabilities.logsumexp(0) - math.log(len(logits))
    return (_entropy(mean) - _entropy(log_probabilities).mean()).item()


def soft_neighbourhood_density(logits: Tensor, temperature: float = 0.05) -> float:
    r"""Entropy of each sample's similarities to the others, in nats: high where samples lie in dense groups.

    .. math:: \frac1N \sum_n H\big(\operatorname{softmax}_{m \neq n}(\langle \hat p_n, \hat p_m \rangle / \tau)\big)

    with p̂ the predicted probabilities scaled to length 1.

    Args:
        logits: (N, C), floating; N at least 2.
        temperature: τ.

    Source: Saito et al., Tune It the Right Way: Unsupervised Validation of Domain Adaptation via Soft Neighborhood
    Density, ICCV 2021.

    Example:
        >>> import torch
        >>> from fastda.training import soft_neighbourhood_density
        >>> round(soft_neighbourhood_density(50 * torch.eye(2).repeat_interleave(4, 0)), 3)  # each has three neighbours
        1.099
    """
    checks.number("temperature", temperature, above=0)
    log_probabilities = _log_probabilities(logits)
    count = len(log_probabilities)
    if count < 2:
        raise ValueError(f"logits: expected at least 2 samples, got {count}; validate on more")
    directions = torch.nn.functional.normalize(log_probabilities.exp(), dim=1)
    entropies = []
    rows = max(1, CHUNK // count)
    for start in range(0, count, rows):
        similarities = directions[start : start + rows] @ directions.T / temperature
        similarities[torch.arange(len(similarities)), torch.arange(start, start + len(similarities))] = -math.inf
        entropies.append(_entropy(similarities.log_softmax(1)))
    return torch.cat(entropies).mean().item()


def _log_probabilities(logits: Tensor) -> Tensor:
    checks.floating("logits", logits)
    if logits.dim() != 2 or not len(logits):
        raise ValueError(
            f"logits: expected shape (samples, classes), got {checks.describe(logits)}; flatten it to that"
        )
    return logits.double().log_softmax(1)


def _entropy(log_probabilities: Tensor) -> Tensor:
    return torch.special.entr(log_probabilities.exp()).sum(-1)


VALIDATORS = ("source_accuracy", "target_accuracy", "negative_entropy", "information_maximisation", "snd")
"""What `fit` can select by."""

OF_TARGET = {
    "negative_entropy": negative_entropy,
    "information_maximisation": information_maximisation,
    "snd": soft_neighbourhood_density,
}
