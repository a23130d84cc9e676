"""Domain adaptation and few-shot learning for PyTorch: fused ops, drop-in for their reference formulas.

    import fastda.reference as F    # plain PyTorch, the specification
    import fastda as F              # the same names and signatures, on compiled kernels
"""

from . import nn, schedules
from .accumulate import CovarianceAccumulator
from .backend import use_backend
from .ops import (
    class_means,
    coral_loss,
    covariance,
    deep_coral_loss,
    domain_adversarial_loss,
    gradient_reversal,
    gradient_reversal_fork,
    gradient_reversal_linear,
    nearest_prototype,
    pairwise_distance,
    prototype_cross_entropy,
    prototype_log_softmax,
    prototype_softmax,
    prototypical_loss,
)
from .patching import patch, unpatch
from .version import __version__

__all__ = [
    "CovarianceAccumulator",
    "__version__",
    "class_means",
    "coral_loss",
    "covariance",
    "deep_coral_loss",
    "domain_adversarial_loss",
    "gradient_reversal",
    "gradient_reversal_fork",
    "gradient_reversal_linear",
    "nearest_prototype",
    "nn",
    "pairwise_distance",
    "patch",
    "prototype_cross_entropy",
    "prototype_log_softmax",
    "prototype_softmax",
    "prototypical_loss",
    "recommend",
    "schedules",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str):
    if name == "recommend":  # on its first use, so that importing fastda stays cheap
        from .shift import recommend

        return recommend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
