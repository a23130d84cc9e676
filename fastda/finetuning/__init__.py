"""Fine-tuning a pretrained model: what to freeze, how fast each layer learns, when it thaws."""

from .freezing import feature_extraction, freeze, unfreeze, unfreeze_top
from .gradual import GradualUnfreezing
from .layers import Layer, find_layers
from .learning_rates import layerwise_lr_decay
from .normalisation import set_normalisation

__all__ = [
    "GradualUnfreezing",
    "Layer",
    "feature_extraction",
    "find_layers",
    "freeze",
    "layerwise_lr_decay",
    "set_normalisation",
    "unfreeze",
    "unfreeze_top",
]
