"""Training steps: what adaptation costs beyond the same passes without it.

A step takes a module that has the ops, images of both domains, labels, and the parameters of a small network: two
convolutions, a layer of features, a label predictor, a domain classifier. It returns the whole objective.
"""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

Ops = ModuleType | SimpleNamespace
CHANNELS = (32, 48)
LAMBDA = 0.3
CORAL_WEIGHT = 100.0


def parameters(sizes: dict[str, int], normal) -> tuple[Tensor, ...]:
    """Weights and biases of both convolutions, features, label predictor, and the domain classifier's two layers."""
    first, second = CHANNELS
    flat = second * (sizes["side"] // 4) ** 2
    features, hidden, classes = sizes["features"], sizes["hidden"], sizes["classes"]
    convolutions = (first, 1, 3, 3), (second, first, 3, 3)
    shapes = (*convolutions, (features, flat), (classes, features), (hidden, features), (1, hidden))
    weights = [normal(*shape) * (2 / shape[1:].numel()) ** 0.5 for shape in map(torch.Size, shapes)]
    return tuple(x for weight in weights for x in (weight, weight.new_zeros(len(weight))))


def extract(images: Tensor, *parameters: Tensor) -> Tensor:
    first, first_bias, second, second_bias, last, last_bias = parameters
    images = F.max_pool2d(F.conv2d(images, first, first_bias, padding=1).relu(), 2)
    images = F.max_pool2d(F.conv2d(images, second, second_bias, padding=1).relu(), 2)
    return F.linear(images.flatten(1), last, last_bias).relu()


def dann_step(ops: Ops, source: Tensor, target: Tensor, labels: Tensor, *parameters: Tensor) -> Tensor:
    *extractor, head, head_bias, domain, domain_bias, logit, logit_bias = parameters
    features = extract(torch.cat([source, target]), *extractor)
    features, hidden = ops.gradient_reversal_linear(features, domain, domain_bias, LAMBDA)
    logits = F.linear(hidden.relu(), logit, logit_bias)
    task = F.cross_entropy(F.linear(features[: len(source)], head, head_bias), labels[: len(source)])
    return task + ops.domain_adversarial_loss(logits[: len(source)], logits[len(source) :])


def deep_coral_step(ops: Ops, source: Tensor, target: Tensor, labels: Tensor, *parameters: Tensor) -> Tensor:
    *extractor, head, head_bias, _, _, _, _ = parameters
    source, target = extract(torch.cat([source, target]), *extractor).split([len(source), len(target)])
    task = F.cross_entropy(F.linear(source, head, head_bias), labels[: len(source)])
    return task + CORAL_WEIGHT * ops.coral_loss(source, target)


def task_step(source: Tensor, target: Tensor, labels: Tensor, *parameters: Tensor) -> Tensor:
    """The same passes over both domains, both labelled, without adaptation."""
    *extractor, head, head_bias, _, _, _, _ = parameters
    return F.cross_entropy(F.linear(extract(torch.cat([source, target]), *extractor), head, head_bias), labels)


STEPS = {"dann_step": dann_step, "deep_coral_step": deep_coral_step}
