"""The fused ops: public functions with the names and signatures of the reference. One file a topic."""

from ..kernels import cpp
from . import fused
from .coral import coral_loss, deep_coral_loss
from .covariance import covariance
from .domain_loss import domain_adversarial_loss
from .gradient_reversal import gradient_reversal, gradient_reversal_fork, gradient_reversal_linear
from .prototypes import (
    class_means,
    nearest_prototype,
    pairwise_distance,
    prototype_cross_entropy,
    prototype_log_softmax,
    prototype_softmax,
    prototypical_loss,
)

if cpp.status.available:
    cpp.library.set_second_order(fused.second_order)

__all__ = [
    "class_means",
    "coral_loss",
    "covariance",
    "deep_coral_loss",
    "domain_adversarial_loss",
    "gradient_reversal",
    "gradient_reversal_fork",
    "gradient_reversal_linear",
    "nearest_prototype",
    "pairwise_distance",
    "prototype_cross_entropy",
    "prototype_log_softmax",
    "prototype_softmax",
    "prototypical_loss",
]
