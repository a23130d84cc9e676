"""How many threads torch, and the libraries beside it, use for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """For small tensors, where more threads cost more than they save, and the last bits depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def libraries_on_one_thread(who: str, extra: str, user_api: str | None = None) -> AbstractContextManager:
    """For short loops of numpy, scipy or scikit-learn, whose threads would spin while they wait for each other.

    `user_api` is "blas", "openmp", which torch computes with too, or None, both.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{who} needs threadpoolctl, which is not installed: pip install 'fastda-kernels[{extra}]'",
            name="threadpoolctl",
        ) from error
    return threadpool_limits(1, user_api=user_api)
