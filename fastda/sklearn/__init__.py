"""scikit-learn estimators: classifiers that learn on a labelled source and adapt to a target without labels.

`fit(X, y, sample_domain)` takes both domains in one array, as skada does: positive numbers mark samples of the source,
negative ones of the target, whose labels are never looked at (-1, NaN and None will do). Without `sample_domain` all
samples are the source's, and the estimators are ordinary classifiers; -1 is then a class like any other, where skada
would take it for a masked label.
"""

try:
    import sklearn  # noqa: F401, missing: said with the way to get it
except ModuleNotFoundError as error:
    if error.name != "sklearn":
        raise
    raise ModuleNotFoundError(
        "fastda.sklearn needs scikit-learn, which is not installed: pip install 'fastda-kernels[sklearn]'",
        name="sklearn",
    ) from error

from .networks import CORALClassifier, DANNClassifier
from .prototypes import PrototypeClassifier

__all__ = ["CORALClassifier", "DANNClassifier", "PrototypeClassifier"]
