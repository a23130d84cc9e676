from .coral_loss import CORALLoss
from .gradient_reversal import GradientReversal

__all__ = ["CORALLoss", "GradientReversal"]
