"""Modules over the ops."""

from .coral import CORALLoss, DeepCORALLoss
from .domain_discriminator import DomainDiscriminator
from .domain_loss import DomainAdversarialLoss
from .gradient_reversal import GradientReversal
from .prototypes import PrototypicalLoss

__all__ = [
    "CORALLoss",
    "DeepCORALLoss",
    "DomainAdversarialLoss",
    "DomainDiscriminator",
    "GradientReversal",
    "PrototypicalLoss",
]
