"""Adaptation objectives around your own feature extractor and label predictor.

A method is a task loss and any number of terms beside it; a new method is one small file with a :class:`Term`.
"""

from .dann import DANN, DomainAdversarialTerm
from .deep_coral import CORALTerm, DeepCORAL
from .method import Method, Passed, SourceOnly, Term
from .scheduled import Schedule
from .split import split

__all__ = [
    "CORALTerm",
    "DANN",
    "DeepCORAL",
    "DomainAdversarialTerm",
    "Method",
    "Passed",
    "Schedule",
    "SourceOnly",
    "Term",
    "split",
]
