"""The tensor in what a network returns."""

from __future__ import annotations

from torch import Tensor

OF_NETWORK = ("logits", "pooler_output")
OF_LAYER = (*OF_NETWORK, "last_hidden_state")


def as_tensor(name: str, output, attributes: tuple[str, ...] = OF_NETWORK) -> Tensor:
    """The output, out of Hugging Face's wrapping if need be."""
    if isinstance(output, Tensor):
        return output
    for attribute in attributes:
        if isinstance(getattr(output, attribute, None), Tensor):
            return getattr(output, attribute)
    raise TypeError(
        f"{name}: expected a tensor from it, got {type(output).__name__}; wrap it in a module that returns the tensor"
    )
