"""Modules over the ops."""

from .coral import DeepCORALLoss
from .domain_discriminator import DomainDiscriminator
from .gradient_reversal import GradientReversal

__all__ = ["DeepCORALLoss", "DomainDiscriminator", "GradientReversal"]
