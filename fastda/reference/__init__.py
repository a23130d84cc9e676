"""The specification: each op as one readable PyTorch function.

`import fastda.reference as F` and `import fastda as F` are interchangeable. The reference imports torch alone; tests,
benchmarks, the fallback on devices without a kernel, and derivatives beyond the first all use this text.
"""

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
