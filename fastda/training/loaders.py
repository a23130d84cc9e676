"""Endless, resumable reading of a loader, and its division among processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from . import random_states


class Stream:
    """The batches of a loader, pass after pass. Its position can be saved, and found again to the bit.

    A position is the number of batches taken in the present pass, and the states of all generators when it began. To go
    back to it is to begin the pass again from those states, and to read as many batches.
    """

    def __init__(self, name: str, loader) -> None:
        self.name, self.loader = name, loader
        self.generators = generators_of(loader)
        self.passes = self.position = 0
        self.began: dict | None = None
        self.iterator: Iterator | None = None

    def next(self):
        """The next batch; begins a new pass where the last one has ended."""
        if self.iterator is None:
            self._begin()
        try:
            batch = next(self.iterator)
        except StopIteration:
            if self.position == 0:
                raise ValueError(_no_batch(self.name, self.passes)) from None
            self.passes, self.position = self.passes + 1, 0
            self._begin()
            return self.next()
        self.position += 1
        return batch

    def _begin(self) -> None:
        self.began = random_states.capture(self.generators)
        for sampler in _samplers(self.loader):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.passes)
        self.iterator = iter(self.loader)

    def state_dict(self) -> dict:
        return {"passes": self.passes, "position": self.position, "began": self.began}

    def load_state_dict(self, state: dict) -> None:
        """Go to the position; leaves the generators as the reading of the batches before it left them."""
        self.passes, self.position, self.iterator = state["passes"], 0, None
        if state["began"] is not None:
            random_states.restore(state["began"], self.generators)
            self._begin()
            self.began = state["began"]
            for _ in range(state["position"]):
                next(self.iterator)
            self.position = state["position"]

    def close(self) -> None:
        """Let go of the pass at hand, and of its workers."""
        self.iterator = None


def length(name: str, loader) -> int:
    """Batches in a pass."""
    found = _length(loader)
    if found is None:
        raise ValueError(
            f"steps_per_epoch: expected a number, since the {name} loader has no length, got None; pass one"
        )
    return found


def check_resumable(name: str, loader) -> None:
    """Workers that outlive a pass keep random states that cannot be seen from here."""
    if getattr(loader, "persistent_workers", False):
        raise ValueError(
            f"{name}: expected a loader with persistent_workers=False, so that training can be resumed to the bit, got "
            "True; turn it off, or pass checkpoint=None"
        )


def check_loader(name: str, loader) -> None:
    """Something to read batches from, as far as can be seen without reading."""
    single = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if single or isinstance(loader, (Tensor, str, Mapping)) or not hasattr(loader, "__iter__"):
        raise TypeError(
            f"{name}: expected a loader of batches, got {type(loader).__name__}; wrap the data set in a "
            "torch.utils.data.DataLoader"
        )
    if isinstance(loader, Sized) and _length(loader) == 0:
        raise ValueError(_no_batch(name))


def check_batches(name: str, loader, least: int) -> None:
    """The last batch of a pass would otherwise fail only after an epoch."""
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler or batches.drop_last or _length(batches.sampler) is None:
        return
    smallest = len(batches.sampler) % batches.batch_size or batches.batch_size
    if smallest < least:
        raise ValueError(
            f"{name}: expected batches of at least {least} samples, which a covariance needs, got a last one of "
            f"{smallest}; pass drop_last=True to the loader, or another batch_size"
        )


def _length(sized) -> int | None:
    """None where it has none: a DataLoader has the method, but not always the number."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _no_batch(name: str, passes: int = 0) -> str:
    if passes:
        return (
            f"{name}: expected a loader that can be read again, got no batch in pass {passes + 1}; pass a DataLoader "
            "or a list, not an iterator or generator"
        )
    return f"{name}: expected a loader with at least one batch, got none; give it data, or drop_last=False"


def _samplers(loader) -> list:
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = [batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)]
    candidates += [getattr(candidate, "sampler", None) for candidate in candidates]
    return list({id(s): s for s in candidates if s is not None}.values())


def generators_of(loader) -> list[torch.Generator]:
    """The generators that a loader and its samplers were given."""
    found = [getattr(part, "generator", None) for part in (loader, *_samplers(loader))]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def share(name: str, loader, rank: int, world: int, seed: int):
    """A loader of every `world`-th batch, from the `rank`-th on: together, the processes read what one would."""
    if any(isinstance(sampler, DistributedSampler) for sampler in _samplers(loader)):
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            f"{name}: expected a DataLoader over a map-style data set, to divide it among {world} processes, got "
            f"{type(loader).__name__} over {type(getattr(loader, 'dataset', loader)).__name__}; divide it by "
            "torch.distributed.get_rank() yourself and pass divide_loaders=False"
        )
    batched = loader.batch_sampler is not None
    batches = _Share(name, loader.batch_sampler if batched else loader.sampler, rank, world, seed)
    return DataLoader(
        loader.dataset,
        **({"batch_sampler": batches} if batched else {"batch_size": None, "sampler": batches}),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


class _Share(Sampler):
    """Every `world`-th of a sampler's batches. All processes draw the same order; batches that are too few for one each
    are left out."""

    def __init__(self, name: str, sampler, rank: int, world: int, seed: int) -> None:
        count = _length(sampler)
        if count is None or count < world:
            raise ValueError(
                f"{name}: expected at least one batch for each of the {world} processes, got "
                f"{'a sampler without a length' if count is None else count}; make the batches smaller, or divide the "
                "loader yourself and pass divide_loaders=False"
            )
        self.sampler, self.rank, self.world, self.seed, self.passes = sampler, rank, world, seed, 0

    def set_epoch(self, passes: int) -> None:
        self.passes = passes

    def __len__(self) -> int:
        return len(self.sampler) // self.world

    def __iter__(self):
        with random_states.seeded(self.seed + self.passes):
            batches = list(self.sampler)
        yield from batches[self.rank : len(self) * self.world : self.world]
