"""Endless, resumable reading of a loader, and its division among processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from . import random_states


class Stream:
    """The batches of a loader, pass after pass. Its position can be saved, and found again to the bit.

    A position is the number of batches taken in the present pass, and the states of all generators when it began: going
        back
    means beginning the pass again from those states, and reading as many batches.
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
                raise ValueError(
                    f"{self.name}: expected a loader with at least one batch, got none; give it data"
                ) from None
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
    try:
        return len(loader)
    except TypeError:
        raise ValueError(
            f"steps_per_epoch: expected a number, since the {name} loader has no length, got None; pass one"
        ) from None


def check_resumable(name: str, loader) -> None:
    """Workers that outlive a pass keep random states that cannot be seen from here."""
    if getattr(loader, "persistent_workers", False):
        raise ValueError(
            f"{name}: expected a loader with persistent_workers=False, so that training can be resumed to the bit, "
            "got True; "
            f"turn it off, or pass checkpoint=None"
        )


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
            "torch.distributed."
            f"get_rank() yourself and pass divide_loaders=False"
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
        if len(sampler) < world:
            raise ValueError(
                f"{name}: expected at least one batch for each of the {world} processes, got {len(sampler)}; "
                f"make the batches smaller"
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
