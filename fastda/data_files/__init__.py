"""Samples of features or images, with labels or without, from the files that people have."""

from .label_files import open_labels
from .opening import open_pair, open_samples
from .samples import Samples

__all__ = ["Samples", "open_labels", "open_pair", "open_samples"]
