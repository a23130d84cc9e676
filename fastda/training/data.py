"""Batches: what loaders give, and what methods take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..reference import checks

BOOLEANS = (bool, torch.bool, np.dtype(bool))
LABEL_KEYS = ("labels", "label")
UNKNOWN = -100  # as in torch.nn.functional.cross_entropy


class PartlyLabelled(Dataset):
    """A data set of (inputs, label) of which only some labels are known; the others are negative.

    Args:
        dataset: any map-style data set of pairs.
        known: indices of the samples whose label may be seen, or one boolean a sample.

    Raises:
        IndexError: an index outside the data set.
        ValueError: booleans that are not one a sample.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from fastda.training import PartlyLabelled
        >>> scans = PartlyLabelled(TensorDataset(torch.zeros(3, 2), torch.tensor([7, 8, 9])), known=[1])
        >>> [int(label) for _, label in (scans[i] for i in range(len(scans)))]
        [-100, 8, -100]
    """

    def __init__(self, dataset: Dataset, known: Iterable[int]) -> None:
        known = list(known)
        if known and all(getattr(value, "dtype", type(value)) in BOOLEANS for value in known):
            if len(known) != len(dataset):
                raise ValueError(
                    f"known: expected indices, or one boolean for each of the {len(dataset)} samples, got {len(known)} "
                    "booleans; pass as many"
                )
            known = [index for index, value in enumerate(known) if value]
        self.dataset, self.known = dataset, frozenset(int(index) for index in known)
        outside = [index for index in sorted(self.known) if not 0 <= index < len(dataset)]
        if outside:
            raise IndexError(f"known: expected indices from 0 to {len(dataset) - 1}, got {outside[0]}; leave it out")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        inputs, label = self.dataset[index]
        known = index in self.known
        return inputs, (label if known else torch.full_like(label, UNKNOWN) if isinstance(label, Tensor) else UNKNOWN)


class Batches:
    """Whole batches of tensors in a new order each time, without a call for each sample.

    What is left over waits for the next pass.

    Args:
        batch_size: samples of a batch; all of them where there are fewer.
        tensors: (N, ...), of which a batch has the same rows.
        weights: (N,), how often a sample is drawn, with replacement; None: each once.

    Example:
        >>> import torch
        >>> from fastda.training import Batches
        >>> batches = Batches(4, torch.arange(10))
        >>> len(batches), [len(batch) for (batch,) in batches]
        (2, [4, 4])
    """

    def __init__(self, batch_size: int, *tensors: Tensor, weights: Tensor | None = None) -> None:
        self.tensors, self.weights, self.batch_size = tensors, weights, min(batch_size, len(tensors[0]))

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        count = len(self.tensors[0])
        if self.weights is None:
            order = torch.randperm(count)
        else:  # by the cumulative sum, since torch.multinomial takes at most 2²⁴ samples
            shares = self.weights.double().cumsum(0)
            order = torch.searchsorted(shares, torch.rand(count, dtype=torch.float64) * shares[-1], right=True)
            order = order.clamp_(max=count - 1)
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield tuple(tensor[chosen] for tensor in self.tensors)


def unpack(name: str, batch) -> tuple[object, Tensor | None]:
    """Inputs and labels (None where there are none) of a batch: a tensor, (inputs,), (inputs, labels), or a
    dictionary."""
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        return {k: v for k, v in batch.items() if k != key}, batch[key] if key else None
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"{name}: expected batches of (inputs, labels), got {len(batch)} entries; let the data set or "
                "collate_fn give these two, inputs being a tuple or a dictionary if the model takes several"
            )
        return batch[0], batch[1] if len(batch) == 2 else None
    if not isinstance(batch, Tensor):
        raise TypeError(f"{name}: expected batches of tensors, got {checks.describe(batch)}; use a collate_fn")
    return batch, None


def to_device(value, device: torch.device):
    """Tensors in tuples, lists and dictionaries, moved."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(part, device) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_device(part, device) for part in value]
    return value
