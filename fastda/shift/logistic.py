"""Logistic regression: the linear classifier that tells domains, or classes, apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..threads import libraries_on_one_thread
from .samples import require_scipy

FOLDS = 5
STEPS = 200


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier: probabilities of the classes, (N, C), from features (N, D) in float64."""

    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation @ self.weight.T + self.bias

    def probabilities(self, features: Tensor) -> Tensor:
        return self.logits(features).softmax(1)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, sample_weight: Tensor | None = None) -> Logistic:
    """Multinomial logistic regression on standardised features, with a Gaussian prior of deviation 1 on the weights.

    Deterministic: it starts at zero, and the problem is convex. The gradient is written out, since a network of one
    layer needs no autograd, and scipy's L-BFGS takes a third of the time of torch's on small data.
    """
    minimize = require_scipy("logistic regression", "optimize").minimize
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = torch.where(deviation <= 1e-12 * features.abs().amax(0), torch.inf, deviation)
    inputs = (features - mean) / deviation
    importance = torch.ones_like(inputs[:, 0]) if sample_weight is None else sample_weight
    importance = importance / importance.sum()
    targets = torch.nn.functional.one_hot(labels, num_classes) * importance[:, None]
    prior = 0.5 / len(labels)
    shape = num_classes, inputs.shape[1] + 1  # the bias is the last column

    def loss_and_gradient(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(parameters).view(shape).to(inputs.device)
        weight, bias = parameters[:, :-1], parameters[:, -1]
        log_probabilities = (inputs @ weight.T + bias).log_softmax(1)
        loss = prior * weight.square().sum() - (targets * log_probabilities).sum()
        difference = importance[:, None] * log_probabilities.exp() - targets
        gradient = torch.cat([difference.T @ inputs + 2 * prior * weight, difference.sum(0)[:, None]], 1)
        return loss.item(), gradient.flatten().cpu().numpy()

    start = np.zeros(shape[0] * shape[1])
    options = {"maxiter": STEPS, "gtol": 1e-5}
    with libraries_on_one_thread("logistic regression", "shift", "blas"):
        found = minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options)
    parameters = torch.from_numpy(found.x).view(shape).to(inputs.device)
    return Logistic(mean, deviation, parameters[:, :-1], parameters[:, -1])


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
