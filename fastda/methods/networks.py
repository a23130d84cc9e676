"""Calling any network with any batch: tensors, tuples, and the dictionaries of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def call(network: nn.Module, inputs):
    """A dictionary gives keyword arguments, a tuple or list positional ones."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def num_samples(inputs) -> int:
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs[0]
    return inputs.shape[0]


def _structure(inputs) -> str:
    if isinstance(inputs, Mapping):
        return f"a dictionary of {', '.join(sorted(inputs))}"
    return f"a tuple of {len(inputs)}" if isinstance(inputs, (tuple, list)) else "a tensor"


def concatenate(source, target):
    """Both domains in one batch, source first."""
    if _structure(source) != _structure(target):
        raise ValueError(
            f"target: expected inputs like the source's, {_structure(source)}, got {_structure(target)}; give both the "
            'same, or choose passes="separate"'
        )
    if isinstance(source, Mapping):
        return {key: concatenate(part, target[key]) for key, part in source.items()}
    if isinstance(source, (tuple, list)):
        return [concatenate(one, other) for one, other in zip(source, target)]
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"target: expected samples of the source's shape, {tuple(source.shape[1:])}, got "
            f'{tuple(target.shape[1:])}; resize them, or choose passes="separate"'
        )
    return torch.cat([source, target])
