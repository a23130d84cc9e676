"""Episodes: N classes, K labelled support samples and Q queries of each, drawn from any dataset with labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler, default_collate

from ..reference.checks import describe, tensor, whole_number


@dataclass(frozen=True, eq=False)
class Episode:
    """One task, or a batch of tasks: what is known of each class, and what is asked.

    Unpacks into its first four fields, which is how the ops, `MAML` and `PrototypicalNetwork` take them:
    `fastda.prototypical_loss(*episode, num_classes=5)`. For regression the labels are the values of the function.

    Attributes:
        support: labelled samples, (..., S, *sample); `...` is the batch of episodes, if there is one.
        support_labels: (..., S), classes relabelled 0 ... N − 1.
        queries: samples to be classified, (..., Q, *sample).
        query_labels: (..., Q).
        classes: (..., N), the labels that these classes have in the dataset.
    """

    support: Tensor
    support_labels: Tensor
    queries: Tensor
    query_labels: Tensor
    classes: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.support, self.support_labels, self.queries, self.query_labels))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Episode:
        """The same episode on another device."""
        tensors = (*self, self.classes)
        return Episode(*(x if x is None else x.to(device, non_blocking=non_blocking) for x in tensors))

    def pin_memory(self) -> Episode:
        """In page-locked memory: what `DataLoader(pin_memory=True)` calls."""
        return Episode(*(x if x is None else x.pin_memory() for x in (*self, self.classes)))


def collate(samples: Sequence[tuple], *, ways: int, shots: int, queries: int, batched: bool = False) -> Episode:
    """Make an episode, or a batch of episodes, of the samples that :class:`EpisodeSampler` chose.

    `EpisodeSampler.collate` is this function with the sampler's own numbers filled in.

    Args:
        samples: pairs of input and label (more is ignored), in the sampler's order: for each episode the support,
            class by class, then the queries, class by class. Inputs are tensors, arrays or numbers of one shape.
        ways, shots, queries: classes of an episode, and support samples and queries of each class.
        batched: whether the episodes get a batch dimension in front; without it there has to be one.

    Raises:
        TypeError: samples that are not pairs, labels that are not integers, inputs that make no tensor.
        ValueError: a number of samples that makes no whole episodes, or samples of a class whose labels differ.

    Example:
        >>> import torch
        >>> from fastda.fewshot import collate
        >>> samples = [(torch.zeros(2), 7), (torch.ones(2), 3), (torch.zeros(2), 7), (torch.ones(2), 3)]
        >>> episode = collate(samples, ways=2, shots=1, queries=1)
        >>> episode.classes, episode.query_labels
        (tensor([7, 3]), tensor([0, 1]))
    """
    for name, value in (("ways", ways), ("shots", shots), ("queries", queries)):
        whole_number(name, value, 1)
    size = ways * (shots + queries)
    if len(samples) == 0 or len(samples) % size or (len(samples) != size and not batched):
        expected = f"a multiple of {size}" if batched else f"{size}"
        raise ValueError(
            f"samples: expected {expected} of them, ways·(shots + queries), got {len(samples)}; "
            f"collate with the numbers of the sampler"
        )
    batch = (len(samples) // size,)
    inputs, labels = _stacked(samples)
    labels = labels.view(*batch, size)
    support_labels, query_labels = labels.split([ways * shots, ways * queries], -1)
    classes = support_labels[..., ::shots]
    if not (
        torch.equal(support_labels, classes.repeat_interleave(shots, -1))
        and torch.equal(query_labels, classes.repeat_interleave(queries, -1))
    ):
        raise ValueError(
            "samples: expected one label for all samples of a class, got several; "
            "make the sampler from the labels of the dataset that is loaded"
        )
    support, asked = inputs.view(*batch, size, *inputs.shape[1:]).split([ways * shots, ways * queries], 1)
    episode = _relabelled(support, asked, classes)
    return episode if batched else _first(episode)


def _stacked(samples: Sequence[tuple]) -> tuple[Tensor, Tensor]:
    """The inputs and the labels of all samples."""
    first = samples[0]
    if not isinstance(first, (tuple, list)) or len(first) < 2:
        raise TypeError(
            f"samples: expected pairs of input and label, got {type(first).__name__}; let the dataset give both"
        )
    try:
        inputs = default_collate([sample[0] for sample in samples])
    except (TypeError, RuntimeError) as error:
        inputs = error
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"samples: expected tensors, arrays or numbers of one shape as inputs, got {type(first[0]).__name__} "
            f"({inputs if isinstance(inputs, Exception) else 'no tensor'}); let the dataset's transform make them"
        )
    try:
        return inputs, torch.tensor([int(sample[1]) for sample in samples])
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"samples: expected integers as labels, got {type(first[1]).__name__} ({error}); let the dataset give them"
        ) from error


def _relabelled(support: Tensor, queries: Tensor, classes: Tensor) -> Episode:
    """Episodes of support and queries (E, samples, ...), which are in the sampler's order: class by class."""
    batch, ways = classes.shape
    support_labels, query_labels = (
        torch.arange(ways).repeat_interleave(x.shape[1] // ways).repeat(batch, 1) for x in (support, queries)
    )
    return Episode(support, support_labels, queries, query_labels, classes)


def _first(episodes: Episode) -> Episode:
    return Episode(*(x[0] for x in (*episodes, episodes.classes)))


class EpisodeSampler(Sampler):
    """Chooses the samples of N-way K-shot episodes; a `batch_sampler` for `torch.utils.data.DataLoader`.

    An episode is drawn without replacement: N classes, then K + Q samples of each. It is a function of the seed, the
    epoch and its number alone, so that it depends neither on the number of workers nor on the number of processes,
    and training can go on where it stopped.

    Args:
        labels: the label of each sample: a tensor, array or sequence of integers, or a dataset that has them as
            `targets` or `labels` (torchvision's datasets do), a `TensorDataset` with labels last, or a `Subset` or
            `ConcatDataset` of such datasets. Any integers will do, also with gaps.
        ways: N, classes of an episode.
        shots: K, support samples of each class.
        queries: Q, queries of each class.
        episodes: how many of them make an epoch, all processes together.
        batch_size: None gives single episodes, a number batches of so many, all processes together.
        seed: of the draws.
        num_replicas: number of processes that share the episodes, each batch among them, or single episodes in turn.
            None: those of `torch.distributed`, if it is initialised, else one.
        rank: of this process among them.

    Each pass over the sampler, finished or not, is one epoch further. `set_epoch(epoch, batch)` goes to any place:
    `set_epoch(0)` before each evaluation gives the same episodes each time.

    Raises:
        TypeError: no labels to be found.
        ValueError: fewer than N classes, a class with fewer than K + Q samples, episodes that cannot be shared equally.

    Example: 2-way 1-shot episodes of a dataset
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from fastda.fewshot import EpisodeSampler
        >>> dataset = TensorDataset(torch.randn(12, 8), torch.arange(12) % 3)
        >>> sampler = EpisodeSampler(dataset, ways=2, shots=1, queries=3, episodes=10, batch_size=5)
        >>> loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=sampler.collate)
        >>> episodes = next(iter(loader))
        >>> episodes.support.shape, episodes.query_labels.shape
        (torch.Size([5, 2, 8]), torch.Size([5, 6]))
    """

    def __init__(
        self,
        labels: object,
        ways: int,
        shots: int,
        queries: int,
        episodes: int,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        for name, value in (("ways", ways), ("shots", shots), ("queries", queries), ("episodes", episodes)):
            whole_number(name, value, 1)
        if batch_size is not None:
            whole_number("batch_size", batch_size, 1)
        whole_number("seed", seed, 0)
        self.ways, self.shots, self.queries, self.episodes = ways, shots, queries, episodes
        self.batch_size, self.seed = batch_size, seed
        self.num_replicas, self.rank = _replicas(num_replicas, rank)
        if (batch_size or episodes) % self.num_replicas or (batch_size and episodes % batch_size):
            raise ValueError(
                f"episodes, batch_size: expected whole batches that {self.num_replicas} process(es) can share equally, "
                f"got {episodes} episodes in batches of {batch_size or 1}; choose multiples"
            )
        self.labels = labels_of(labels)
        self.classes, of_class, counts = np.unique(self.labels, return_inverse=True, return_counts=True)
        self._check_counts(counts)
        self._members = np.split(np.argsort(of_class, kind="stable"), np.cumsum(counts)[:-1])
        self.set_epoch(0)

    def _check_counts(self, counts: np.ndarray) -> None:
        if len(counts) < self.ways:
            raise ValueError(
                f"labels: expected at least {self.ways} classes (ways), got {len(counts)}; ask for fewer ways"
            )
        small = np.flatnonzero(counts < self.shots + self.queries)
        if len(small):
            found = ", ".join(f"{counts[i]} in class {self.classes[i]}" for i in small[:3])
            found += f", and {len(small) - 3} more such classes" if len(small) > 3 else ""
            raise ValueError(
                f"labels: expected at least {self.shots + self.queries} samples in each class (shots + queries), "
                f"got {found}; leave out these classes, or ask for fewer shots or queries"
            )

    def __len__(self) -> int:
        """Batches of this process in an epoch."""
        return self.episodes // self._together

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._batches():
            yield rows.flatten().tolist()

    def _batches(self) -> Iterator[np.ndarray]:
        """Indices (episodes of this process, samples of an episode) of each batch of the epoch that is next."""
        epoch, start = self.epoch, self._start
        self.epoch, self._start = epoch + 1, 0
        for batch in range(start, len(self)):
            self._given = epoch, batch + 1
            mine = range(batch * self._together + self.rank, (batch + 1) * self._together, self.num_replicas)
            yield np.stack([self._draw(epoch, number) for number in mine])
        self._given = epoch + 1, 0

    def _draw(self, epoch: int, number: int) -> np.ndarray:
        """The samples of one episode: support, class by class, then queries, class by class."""
        random = np.random.default_rng((self.seed, epoch, number))
        chosen = random.choice(len(self.classes), self.ways, replace=False)
        each = self.shots + self.queries
        samples = np.stack([random.choice(self._members[c], each, replace=False) for c in chosen])
        return np.concatenate([samples[:, : self.shots].ravel(), samples[:, self.shots :].ravel()])

    @property
    def collate(self) -> partial:
        """The `collate_fn` that fits: :func:`collate` with this sampler's numbers."""
        batched = self.batch_size is not None
        return partial(collate, ways=self.ways, shots=self.shots, queries=self.queries, batched=batched)

    def take(self, inputs: Tensor) -> Iterable[Episode]:
        """The episodes of an epoch from a tensor (samples, ...) that holds all inputs, images or features, in memory:
        what a `DataLoader` would give, without collecting sample by sample. Like one, it has a length, and each pass
        over it is an epoch.

        Example: features computed once serve all episodes
            >>> import torch
            >>> from fastda.fewshot import EpisodeSampler
            >>> features, labels = torch.randn(40, 16), torch.arange(40) % 4
            >>> sampler = EpisodeSampler(labels, ways=4, shots=5, queries=5, episodes=3)
            >>> [tuple(episode.support.shape) for episode in sampler.take(features)]
            [(20, 16), (20, 16), (20, 16)]
        """
        tensor("inputs", inputs)
        if inputs.shape[:1] != self.labels.shape:
            raise ValueError(
                f"inputs: expected one row for each of the {len(self.labels)} labels, got {describe(inputs)}; "
                f"pass the inputs that belong to the labels"
            )
        return _Taken(self, inputs)

    def set_epoch(self, epoch: int, batch: int = 0) -> None:
        """Let the next pass be this epoch, beginning with this batch."""
        whole_number("epoch", epoch, 0)
        if whole_number("batch", batch, 0) > len(self):
            raise ValueError(f"batch: expected at most the {len(self)} of an epoch, got {batch}; go to the next epoch")
        self.epoch, self._start, self._given = epoch, batch, (epoch, batch)

    def state_dict(self) -> dict[str, int]:
        """The epoch under way, and how many of its episodes were given out, to all processes together.

        Workers of a `DataLoader` fetch ahead: where training stops in the middle of an epoch, note the batches that
        were used, and go on with `set_epoch(epoch, batch)` instead.
        """
        epoch, batch = self._given
        return {"seed": self.seed, "epoch": epoch, "episodes": batch * self._together}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where the sampler of `state` stood, be it with another number of processes or another batch size."""
        if not isinstance(state, dict) or not {"seed", "epoch", "episodes"} <= state.keys():
            raise ValueError(
                f"state: expected a dictionary with seed, epoch and episodes, got {describe(state)}; "
                f"pass what state_dict() gave"
            )
        batch, rest = divmod(whole_number("state['episodes']", state["episodes"], 0), self._together)
        if rest:
            raise ValueError(
                f"state: expected a multiple of {self._together} episodes given out (a batch of all processes), "
                f"got {state['episodes']}; choose another batch_size, or set_epoch({state['epoch']})"
            )
        self.set_epoch(state["epoch"], batch)
        self.seed = whole_number("state['seed']", state["seed"], 0)

    @property
    def _together(self) -> int:
        """Episodes of a batch, those of all processes."""
        return self.batch_size or self.num_replicas


@dataclass(frozen=True, eq=False)
class _Taken:
    """The episodes of a sampler, from inputs in memory."""

    sampler: EpisodeSampler
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Episode]:
        sampler, inputs = self.sampler, self.inputs
        labels = torch.from_numpy(sampler.labels)
        for rows in map(torch.from_numpy, sampler._batches()):
            both = rows.split([sampler.ways * sampler.shots, sampler.ways * sampler.queries], 1)
            classes = labels[both[0][:, :: sampler.shots]]
            support, queries = (inputs[some.to(inputs.device)] for some in both)  # apart, so that both are contiguous
            episode = _relabelled(support, queries, classes).to(inputs.device)
            yield episode if sampler.batch_size is not None else _first(episode)


def _replicas(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many processes share the episodes, and which of them this is."""
    initialised = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        num_replicas = dist.get_world_size() if initialised else 1
    if rank is None:
        rank = dist.get_rank() if initialised and num_replicas > 1 else 0
    whole_number("num_replicas", num_replicas, 1)
    if whole_number("rank", rank, 0) >= num_replicas:
        raise ValueError(
            f"rank: expected at most {num_replicas - 1} (num_replicas − 1), got {rank}; pass this process's rank"
        )
    return num_replicas, rank


def labels_of(source: object) -> np.ndarray:
    """The integer label of each sample of a dataset, or of what holds labels itself."""
    if hasattr(source, "indices") and hasattr(source, "dataset"):  # Subset
        return labels_of(source.dataset)[np.asarray(source.indices, dtype=np.int64)]
    if hasattr(source, "datasets"):  # ConcatDataset
        return np.concatenate([labels_of(part) for part in source.datasets])
    if hasattr(source, "tensors"):  # TensorDataset
        source = source.tensors[-1]
    for name in ("targets", "labels"):
        source = getattr(source, name, source)
    got = type(source).__name__
    if hasattr(source, "__array__") or (isinstance(source, Sequence) and not isinstance(source, str)):
        try:
            labels = np.asarray(source.cpu() if isinstance(source, Tensor) else source)
        except ValueError as error:  # rows of several lengths
            raise TypeError(f"labels: expected integers, one a sample, got {got} ({error}); flatten them") from error
        if labels.ndim == 1 and (np.issubdtype(labels.dtype, np.integer) or len(labels) == 0):
            return labels.astype(np.int64)
        got = f"{labels.dtype} of shape {labels.shape}"
    raise TypeError(
        f"labels: expected integers, one a sample, or a dataset that has them as targets or labels, got {got}; "
        f"pass them as a list: [label for _, label in dataset]"
    )
