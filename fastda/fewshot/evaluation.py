"""Accuracy over many episodes, with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..intervals import interval
from ..nn.modes import evaluating
from ..progress import progress_bar
from ..reference.checks import describe, number, tensor
from .episodes import Episode


@dataclass(frozen=True, eq=False)
class EpisodeAccuracy:
    """Mean accuracy over episodes and its interval, by Student's t over the episodes; shares from 0 to 1.

    Attributes:
        mean: of the accuracies.
        half_width: of the interval: mean ± half_width. NaN for a single episode.
        confidence: mean probability of the class that was predicted.
        level: of the interval, 0.95 unless another was asked for.
        accuracies: of each episode, (episodes,), float64.
    """

    mean: float
    half_width: float
    confidence: float
    level: float
    accuracies: Tensor

    def __str__(self) -> str:
        interval = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.2f}"
        return (
            f"{100 * self.mean:.2f}{interval} % ({100 * self.level:g} % interval, Student t over "
            f"{len(self.accuracies)} episodes)"
        )


def _episode(episode: Episode | Sequence[Tensor], device: torch.device | str | None) -> Episode:
    """An episode, also of a loader that knows only tuples, on its device."""
    if isinstance(episode, (tuple, list)) and len(episode) in (4, 5):
        episode = Episode(*episode)
    if not isinstance(episode, Episode):
        raise TypeError(
            f"episodes: expected Episodes, got {type(episode).__name__}; give the DataLoader collate_fn=sampler.collate"
        )
    return episode if device is None else episode.to(device)


def evaluate_episodes(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    episodes: Iterable[Episode],
    *,
    level: float = 0.95,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    process_group=None,
) -> EpisodeAccuracy:
    r"""Accuracy on episodes, with its confidence interval.

    .. math:: \bar a \pm t_{0.975,\, E - 1} \, s / \sqrt E

    with mean and standard deviation s of the accuracies of E episodes.

    Args:
        predict: from support, support labels and queries to logits or log-probabilities (..., Q, C): a
            :class:`PrototypicalNetwork`, the method `predict` of :class:`MAML`, or any function. A module is put into
            evaluation mode meanwhile.
        episodes: of :class:`EpisodeSampler`, singly or in batches, which are much faster: a `DataLoader`, or
            `sampler.take(features)`.
        level: of the interval, between 0 and 1.
        device: where to move the episodes; None leaves them.
        progress: a progress bar (tqdm): True, False, or None for one where tqdm is installed and the terminal shows it.
        process_group: a `torch.distributed` group over whose processes the episodes are spread: all get the result of
            all.

    Raises:
        TypeError: what is no function, no episode or no tensor.
        ValueError: no episodes, or scores of another shape.
        ModuleNotFoundError: scipy (or tqdm, which a bar was asked of) is missing: `pip install
            'fastda-kernels[fewshot]'`.

    Example:
        >>> import torch
        >>> from fastda.fewshot import EpisodeSampler, PrototypicalNetwork, evaluate_episodes
        >>> labels = torch.arange(200) % 10
        >>> features = torch.nn.functional.one_hot(labels, 10) + 0.1 * torch.randn(200, 10)
        >>> sampler = EpisodeSampler(labels, ways=5, shots=5, queries=15, episodes=100, batch_size=50)
        >>> print(evaluate_episodes(PrototypicalNetwork(torch.nn.Identity()), sampler.take(features)))
        100.00 ± 0.00 % (95 % interval, Student t over 100 episodes)
    """
    try:
        import scipy.special  # noqa: F401, missing: said before the work, not after it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "evaluate_episodes needs scipy, which is not installed: pip install 'fastda-kernels[fewshot]'", name="scipy"
        ) from error
    if not callable(predict):
        raise TypeError(
            f"predict: expected a module or a function, got {describe(predict)}; pass network or maml.predict"
        )
    if number("level", level, above=0, most=1) == 1:
        raise ValueError("level: expected a number > 0 and < 1, got 1; 0.95 is usual")
    if not isinstance(episodes, Iterable):
        raise TypeError(
            f"episodes: expected a DataLoader or sampler.take(features), got {describe(episodes)}; pass one of them"
        )
    module = getattr(predict, "__self__", predict)
    module = module if isinstance(module, torch.nn.Module) else torch.nn.Module()
    if process_group is not None and dist.get_rank(process_group) > 0:
        progress = False  # one bar for all processes
    total = len(episodes) if hasattr(episodes, "__len__") else None
    accuracies, confidences = [], []
    with torch.no_grad(), evaluating(module), progress_bar(progress, total=total, unit="batch") as bar:
        for episode in episodes:
            support, support_labels, queries, query_labels = _episode(episode, device)
            scores = predict(support, support_labels, queries)
            tensor("predict", scores)
            if scores.shape[:-1] != query_labels.shape:
                raise ValueError(
                    f"predict: expected scores of shape (*{tuple(query_labels.shape)}, classes), "
                    f"got {describe(scores)}; return a score for each class of each query"
                )
            largest, classes = scores.max(-1)
            accuracies.append((classes == query_labels).double().mean(-1).flatten())
            confidences.append((largest - scores.logsumexp(-1)).exp().double().mean(-1).flatten())
            bar.update()
    if not accuracies:
        raise ValueError("episodes: expected at least one, got none; a generator can be used only once")
    found = torch.stack([torch.cat(accuracies), torch.cat(confidences)]).cpu()
    if process_group is not None:
        parts: list = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(parts, found, group=process_group)
        found = torch.cat(parts, 1)
    values, confidence = found[0], found[1].mean().item()
    return EpisodeAccuracy(*interval(values, level), confidence, level, values)
