"""Quadratic forms cᵀKc of a kernel matrix that is never in memory: tile by tile, for many vectors c in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..progress import progress_bar

ROWS, COLUMNS = 512, 1024  # of a tile: 2 MB in float32, which stays in the cache from its product to its last use
LARGEST_EXPONENT = 100.0  # ‖x‖²/2σ² of points whose distances lose no more than 1e-5 of the kernel in float32


@dataclass(frozen=True)
class Forms:
    """What one pass gives. The diagonal of K is left out everywhere.

    Attributes:
        quadratic: Σ_{i≠j} c_i K_ij c_j of each column c, (P,), float64.
        row_sums: Σ_{j≠i} K_ij, (N,), float64.
        diagonal: K_ii, (N,), float64.
    """

    quadratic: Tensor
    row_sums: Tensor
    diagonal: Tensor


def quadratic_forms(
    points: Tensor,
    coefficients: Tensor,
    *,
    bandwidth: float | None,
    progress: bool | None = False,
    name: str = "kernel",
) -> Forms:
    """The forms of all columns of `coefficients` in the kernel matrix of `points`.

    K is symmetric, so that only tiles on and above its diagonal are computed: N²/2 entries, each of which costs
    2(D + P) operations and, for the Gaussian, an exponential. Memory: one tile, and the arguments.

    Args:
        points: (N, D), centred, so that inner products keep their digits.
        coefficients: (N, P), float32.
        bandwidth: σ of the Gaussian kernel exp(−‖x − y‖² / 2σ²); None for the kernel (x·y)², whose mean embedding is
            the matrix of second moments.
        progress, name: of the bar.
    """
    count = len(points)
    points = points.double()
    if bandwidth is not None:
        points = points / bandwidth
        halved = -0.5 * points.square().sum(1, keepdim=True)
        one = torch.ones_like(halved)
        # −‖x − y‖²/2 as a single product: [x, −‖x‖²/2, 1] · [y, 1, −‖y‖²/2]
        left, right = torch.cat([points, halved, one], 1), torch.cat([points, one, halved], 1)
        if halved.min() > -LARGEST_EXPONENT:
            left, right = left.float(), right.float()
        diagonal = torch.ones(count, dtype=torch.float64, device=points.device)
    else:
        left = right = points.float()
        diagonal = points.square().sum(1).square()
    with_ones = torch.cat([coefficients, coefficients.new_ones(count, 1)], 1)
    quadratic = torch.zeros(coefficients.shape[1], dtype=torch.float64, device=points.device)
    row_sums = torch.zeros(count, dtype=torch.float64, device=points.device)

    @torch.no_grad()
    def block(top: int) -> tuple[int, Tensor, Tensor, Tensor]:
        """ROWS rows from the diagonal on: what they give of the forms, their own sums, and their columns'."""
        rows = slice(top, min(top + ROWS, count))
        height = rows.stop - top
        forms, own, others = (
            torch.zeros_like(quadratic),
            torch.zeros_like(row_sums[rows]),
            torch.zeros_like(row_sums[top:]),
        )
        for start in range(top, count, COLUMNS):
            columns = slice(start, min(start + COLUMNS, count))
            tile = left[rows] @ right[columns].T
            tile = tile.clamp_(max=0).float().exp_() if bandwidth is not None else tile.square_()
            if start == top:
                tile[:, :height].triu_(1)
            products = tile @ with_ones[columns]
            own += products[:, -1]
            others[start - top : columns.stop - top] += tile.sum(0)
            forms += 2 * (coefficients[rows] * products[:, :-1]).sum(0, dtype=torch.float64)
        return height, forms, own, others

    threads = torch.get_num_threads() if points.device.type == "cpu" else 1
    tops = range(0, count, ROWS)
    with progress_bar(progress, total=count * (count + 1) // 2, unit="entry", unit_scale=True, desc=name) as bar:
        with one_thread_each(threads) as executor:
            for top, (height, forms, own, others) in zip(
                tops, executor.map(block, tops)
            ):  # in order: always the same bits
                quadratic += forms
                row_sums[top : top + height] += own
                row_sums[top:] += others
                bar.update(height * (count - top) - height * (height - 1) // 2)
    return Forms(quadratic, row_sums, diagonal)


@contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, in each of which PyTorch uses one.

    Threads that share each small operation wait for each other at its end, which on a machine that does something else
    as well takes many times the operation's own time; these do not wait.
    """
    before = torch.get_num_threads()
    executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt does not wait for what has not begun
        torch.set_num_threads(before)  # of the matrix library there is one setting for all threads
