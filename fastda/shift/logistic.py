"""Logistic regression: the linear classifier that tells domains, or classes, apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOLDS = 5
STEPS = 200


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier: probabilities of the classes, (N, C), from features (N, D)."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.deviation).float() @ self.weight.T + self.bias

    def probabilities(self, features: Tensor) -> Tensor:
        return self.logits(features).double().softmax(1)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, sample_weight: Tensor | None = None) -> Logistic:
    """Multinomial logistic regression on standardised features, with a Gaussian prior of deviation 1 on the weights.

    Deterministic: it starts at zero, and the problem is convex.
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation <= 1e-12 * features.abs().amax(0), torch.inf, deviation)
    inputs = ((features - mean) / deviation).float()
    weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    importance = torch.ones(len(labels), device=features.device) if sample_weight is None else sample_weight.float()
    importance = importance / importance.sum()
    prior = 0.5 / len(labels)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=STEPS, history_size=20, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            losses = F.cross_entropy(inputs @ weight.T + bias, labels, reduction="none")
            value = losses @ importance + prior * weight.square().sum()
            value.backward()
        return value

    optimizer.step(loss)
    return Logistic(mean, deviation, weight.detach(), bias.detach())


def balanced(labels: Tensor, num_classes: int) -> Tensor:
    """Weights under which all classes count the same."""
    counts = torch.bincount(labels, minlength=num_classes).double()
    return 1 / counts.clamp(min=1)[labels]


def folds_of(labels: np.ndarray, random: np.random.Generator, folds: int = FOLDS) -> np.ndarray:
    """A fold for each sample, at random, the classes spread evenly over them."""
    order = random.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), dtype=np.int64)
    fold[order] = np.arange(len(labels)) % folds
    return fold


def cross_fitted(
    source: Tensor, labels: np.ndarray, target: Tensor, num_classes: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities of source samples, each by a classifier that has not seen it, and of target samples.

    Each of the folds of the target is predicted by one of these classifiers, so that without a shift the predictions of
    both domains have one distribution.
    """
    source_fold = folds_of(labels, random)
    target_fold = random.permutation(len(target)) % FOLDS
    classes = torch.from_numpy(labels).to(source.device)
    found = [np.empty((len(x), num_classes)) for x in (source, target)]
    for fold in range(FOLDS):
        train = torch.from_numpy(source_fold != fold).to(source.device)
        classifier = fit_logistic(source[train], classes[train], num_classes)
        for domain, x, own in ((0, source, source_fold == fold), (1, target, target_fold == fold)):
            found[domain][own] = classifier.probabilities(x[torch.from_numpy(own).to(x.device)]).cpu().numpy()
    return found[0], found[1]
