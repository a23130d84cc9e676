from .prototype import get_prototypes, prototypical_loss

__all__ = ["get_prototypes", "prototypical_loss"]
