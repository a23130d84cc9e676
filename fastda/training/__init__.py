"""Training: the loop, evaluation, model selection, checkpoints, several processes."""

from .data import Batches, PartlyLabelled
from .evaluation import Evaluation, evaluate, predict
from .fit import fit
from .loop import Fit
from .validators import VALIDATORS, information_maximisation, negative_entropy, soft_neighbourhood_density

__all__ = [
    "Batches",
    "Evaluation",
    "Fit",
    "PartlyLabelled",
    "VALIDATORS",
    "evaluate",
    "fit",
    "information_maximisation",
    "negative_entropy",
    "predict",
    "soft_neighbourhood_density",
]
