"""The progress bar of what takes long: tqdm's, where it is installed and somebody sees it."""

from __future__ import annotations


def progress_bar(progress: bool | None, **options):
    """A tqdm bar of these options; one that shows nothing where none is wanted.

    `progress` is True, False, or None: a bar where tqdm is installed and standard error is a terminal.
    """
    if progress is False:
        return NoBar()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        if progress is None:
            return NoBar()
        raise ModuleNotFoundError(
            "progress: expected tqdm to be installed, got none; pip install tqdm, or pass progress=False", name="tqdm"
        ) from None
    return tqdm(**options, disable=None if progress is None else False)


class NoBar:
    """What is called of a bar, and shows nothing."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *error) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix(self, *values, **named) -> None: ...

    def close(self) -> None: ...
