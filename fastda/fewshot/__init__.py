"""Few-shot and meta-learning: episodes, prototypical networks, MAML and Reptile, batched over tasks."""

from .episodes import Episode, EpisodeSampler, collate
from .evaluation import EpisodeAccuracy, evaluate_episodes
from .maml import MAML
from .prototypical import PrototypicalNetwork
from .reptile import Reptile

__all__ = [
    "MAML",
    "Episode",
    "EpisodeAccuracy",
    "EpisodeSampler",
    "PrototypicalNetwork",
    "Reptile",
    "collate",
    "evaluate_episodes",
]
