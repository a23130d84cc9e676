"""Networks for data of one's own: a perceptron for features, a small convolutional one for images, or the user's."""

from __future__ import annotations

import difflib
import importlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..methods import split
from ..nn.modes import evaluating
from ..nn.outputs import as_tensor
from ..reference import checks

NUM_FEATURES = 64
"""What the domains are aligned on: the features before the last layer."""
PIXELS = 4  # side at which the convolutions stop
CHANNELS = (16, 32, 64, 64, 64, 64)
ROWS = 1024  # samples that are worked on at a time


@dataclass(frozen=True)
class Scale:
    """Inputs less a mean, divided by a deviation: of each feature, or of each channel of images.

    Both are those of the two domains together: a feature that hardly varies in the source alone, such as a pixel at the
    edge, would be blown up in the target. A feature that is constant becomes 0.

    Attributes:
        mean, deviation: (D,) or (C, 1, 1), float64, on the CPU.
    """

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, *domains: Tensor) -> Scale:
        """Of (N, D) or (N, C, H, W), each domain with the same weight, however many samples it has."""
        dims = (0,) if domains[0].dim() == 2 else (0, 2, 3)
        means = [x.mean(dims, keepdim=True, dtype=torch.float64) for x in domains]
        mean = sum(means) / len(means)
        variances = []
        for x in domains:
            total = sum((chunk.double() - mean).square().sum(dims, keepdim=True) for chunk in x.split(ROWS))
            variances.append(total * mean.numel() / x.numel())
        deviation = (sum(variances) / len(variances)).sqrt()
        largest = torch.stack([x.abs().amax(dims, keepdim=True) for x in domains]).amax(0).double()
        return cls(mean[0], torch.where(deviation <= 1e-7 * largest, math.inf, deviation)[0])

    def __call__(self, inputs: Tensor) -> Tensor:
        """float32, chunk by chunk, so that no copy in float64 is needed."""
        return torch.cat([((chunk.double() - self.mean) / self.deviation).float() for chunk in inputs.split(ROWS)])


def perceptron(num_inputs: int) -> nn.Module:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(num_inputs, NUM_FEATURES), nn.ELU())


def convolutional(shape: tuple[int, ...]) -> nn.Module:
    """The demo's network, with further layers where images are larger: each halves the sides, down to 4 pixels.

    GroupNorm treats each image by itself: target images reach the network through the adaptation loss alone, not
    through shared statistics.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for depth, out in enumerate(CHANNELS):
        kernel = 5 if depth == 0 else 3
        layers += [nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(4, out), nn.ELU()]
        channels, height, width = out, math.ceil(height / 2), math.ceil(width / 2)
        if depth > 0 and max(height, width) <= PIXELS:
            break
    if max(height, width) > PIXELS:
        layers.append(nn.AdaptiveAvgPool2d(PIXELS))
        height = width = PIXELS
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, NUM_FEATURES), nn.ELU())


def make_network(shape: tuple[int, ...], num_classes: int, network: str | None) -> tuple[nn.Module, nn.Module]:
    """Feature extractor and label predictor, untrained or as the user's function gives them.

    Args:
        shape: of a sample: (D,) or (C, H, W).
        num_classes: C.
        network: "package.module:function", or None for the default of the shape. The function is called with
            `input_shape` and `num_classes`, and returns a module from samples to logits whose last linear layer is the
            label predictor, or the pair (feature extractor, label predictor).

    Raises:
        ValueError: a function that does not exist or fails, or whose network gives something else.
    """
    if network is None:
        extractor = convolutional(shape) if len(shape) == 3 else perceptron(*shape)
        return extractor, nn.Linear(NUM_FEATURES, num_classes)
    function = find_function(network)
    call = f"{network}(input_shape={shape}, num_classes={num_classes})"
    try:
        made = function(input_shape=shape, num_classes=num_classes)
    except Exception as error:  # the user's code: whatever it raises
        raise ValueError(f"network: {call} failed with {type(error).__name__}: {error}; correct it") from error
    parts = made if isinstance(made, (tuple, list)) else (made,)
    if len(parts) not in (1, 2) or not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError(
            f"network: expected a torch.nn.Module from {call}, or a pair of feature extractor and label predictor, got "
            f"{checks.describe(made)}; return one of these"
        )
    extractor, predictor = parts if len(parts) == 2 else _split(parts[0], shape, num_classes, call)
    _check_outputs(extractor, predictor, shape, num_classes, call)
    return extractor, predictor


def find_function(network: str) -> Callable:
    """Import what "package.module:function" names, from the present folder too."""
    module_name, colon, name = network.partition(":")
    if not (colon and module_name and name.isidentifier()):
        raise ValueError(f"network: expected PACKAGE.MODULE:FUNCTION, got {network!r}; name a function of a module")
    if os.getcwd() not in sys.path and "" not in sys.path:  # an installed command does not have it there
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise ValueError(
            f"network: {module_name!r} could not be imported ({type(error).__name__}: {error}); is it in this folder, "
            "or installed?"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        close = difflib.get_close_matches(name, [n for n in vars(module) if callable(vars(module)[n])], n=3)
        near = f"; near it are {', '.join(close)}" if close else ""
        raise ValueError(f"network: expected a function {name!r} in {module_name}, got none{near}; name another")
    return function


def _split(model: nn.Module, shape: tuple[int, ...], num_classes: int, call: str) -> tuple[nn.Module, nn.Module]:
    """The model without its last linear layer, and that layer."""
    pair = "or return the pair (feature extractor, label predictor)"
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name]
    if not linear or model.get_submodule(linear[-1]).out_features != num_classes:
        last = f"one of {model.get_submodule(linear[-1]).out_features}" if linear else "none"
        raise ValueError(
            f"network: expected a last linear layer of {num_classes} outputs, one for each class, in the model of "
            f"{call}, got {last}; end it in nn.Linear(..., num_classes), {pair}"
        )
    with evaluating(model), torch.no_grad():
        whole = _run(model, _example(shape), call)
        extractor, predictor = split(model, linear[-1])
        with evaluating(predictor):
            parts = _run(predictor, _run(extractor, _example(shape), call), call)
    if parts.shape != whole.shape or not torch.equal(parts, whole):
        raise ValueError(
            f"network: expected {linear[-1]!r} to come last in the model of {call}, got one with more after it; put it "
            f"last, {pair}"
        )
    return extractor, predictor


def _check_outputs(extractor, predictor, shape: tuple[int, ...], num_classes: int, call: str) -> None:
    with evaluating(extractor), evaluating(predictor), torch.no_grad():
        features = _run(extractor, _example(shape), call)
        if features.dim() != 2 or len(features) != 2:
            raise ValueError(
                f"network: expected features of shape (2, features) for two samples from {call}, got "
                f"{tuple(features.shape)}; flatten or pool them before the last layer"
            )
        logits = _run(predictor, features, call)
    if logits.shape != (2, num_classes):
        raise ValueError(
            f"network: expected logits of shape (2, {num_classes}) for two samples from {call}, got "
            f"{tuple(logits.shape)}; give it as many outputs as classes"
        )


def _run(network: nn.Module, inputs: Tensor, call: str) -> Tensor:
    try:
        return as_tensor("network", network(inputs))
    except Exception as error:  # the user's code
        raise ValueError(
            f"network: that of {call} failed on inputs of shape {tuple(inputs.shape)} with {type(error).__name__}: "
            f"{error}; let it take these"
        ) from error


def _example(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
