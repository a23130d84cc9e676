"""Kernels that use what ours rely on, and nothing else: run-time loop bounds, int64 offsets, masks, a product."""

import triton
import triton.language as tl


@triton.jit
def row_sums(x, out, rows, columns, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        total += tl.load(x + row * stride + column, mask=column < columns, other=0.0)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def gram(x, out, rows, columns, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    other = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        within = column < columns
        a = tl.load(x + row[:, None] * columns + column[None, :], (row < rows)[:, None] & within[None, :], other=0.0)
        there = (other < rows)[None, :] & within[:, None]
        b = tl.load(x + other[None, :] * columns + column[:, None], there, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out + row[:, None] * rows + other[None, :], total, (row < rows)[:, None] & (other < rows)[None, :])
