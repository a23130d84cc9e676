"""From labelled source data and a target to an adapted model: what `fastda adapt` and `fastda predict` do."""

from .model import AdaptedModel, load_model
from .report import Report
from .run import Adaptation, adapt

__all__ = ["AdaptedModel", "Adaptation", "Report", "adapt", "load_model"]
