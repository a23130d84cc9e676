"""A whole model becomes a feature extractor and a label predictor."""

from __future__ import annotations

from torch import nn


def split(model: nn.Module, head: str) -> tuple[nn.Module, nn.Module]:
    """Take the classifier out of a model.

    Args:
        model: any module that calls its classifier last: a ResNet ("fc"), a vision transformer ("head"), an encoder of
            Hugging Face ("classifier"). It is changed: an identity takes the classifier's place.
        head: the classifier's name, as in `model.named_modules()`.

    Returns:
        The model, which now gives features, and its classifier.

    Raises:
        ValueError: the model has no such module.

    Example:
        >>> from torch import nn
        >>> from fastda.methods import DeepCORAL, split
        >>> model = nn.Sequential()
        >>> model.features, model.fc = nn.Linear(8, 4), nn.Linear(4, 3)
        >>> method = DeepCORAL(*split(model, "fc"))
    """
    names = dict(model.named_modules())
    if not head or head not in names:
        known = ", ".join(repr(name) for name in list(names)[-5:] if name)
        raise ValueError(
            f"head: expected the name of a module of {type(model).__name__}, got {head!r}; the last are {known}"
        )
    classifier = names[head]
    model.set_submodule(head, nn.Identity())
    return model, classifier
