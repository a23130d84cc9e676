"""Modules over the ops."""

from .domain_discriminator import DomainDiscriminator
from .gradient_reversal import GradientReversal

__all__ = ["DomainDiscriminator", "GradientReversal"]
