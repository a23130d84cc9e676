from .protonet import PrototypicalClassifier

__all__ = ["PrototypicalClassifier"]
