"""The specification's docstring is the op's."""

from __future__ import annotations

from collections.abc import Callable


def specified_by(specification: Callable) -> Callable[[Callable], Callable]:
    """Decorator: the op does what `specification` says, and carries its documentation."""

    def document(op: Callable) -> Callable:
        op.__doc__ = specification.__doc__
        return op

    return document
