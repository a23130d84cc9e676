"""The plan of a call: routes, block sizes and sizes of buffers, from the shapes; kept for the next such call."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from .. import tiles
from .device import packed

TRITON_DTYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def precision() -> str:
    """How float32 products are taken."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" or torch.version.hip else "tf32"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


noted: list[tuple[object, int, tuple, dict[str, object]]] = []
"""Launches on the meta device, which stands for a GPU that is not there: kernel, programs, arguments and constants."""


def launch(kernel, programs: int, device: torch.device, *arguments, **constants) -> None:
    """Run a kernel in so many programs, on the device of its tensors; on the meta device only take note."""
    if programs == 0:
        return
    if device.type == "meta":
        noted.append((kernel, programs, arguments, constants))
        return
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants)


@dataclass(frozen=True)
class Domains:
    """Source and target as the kernels read them: (batch, samples, features) each, or flat layers."""

    source: Tensor
    target: Tensor
    flat: bool

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, row and column, source and target in turn; flat layers have rows of their own width."""
        s, t = self.source.stride(), self.target.stride()
        batched = self.source.shape[0] > 1  # else any stride is as good
        if self.flat:
            return s[0] * batched, t[0] * batched, 0, 0, 1, 1
        return s[0] * batched, t[0] * batched, s[1], t[1], s[2], t[2]

    @property
    def contiguous(self) -> bool:
        """Whether features are next to each other."""
        return self.strides[-2:] == (1, 1)

    def alignment(self, sizes: Sizes) -> int:
        """16 if all widths and strides are multiples of it, else 1: kernels are compiled for no other distinction."""
        return 1 if any(stride % 16 for stride in self.strides[:4]) else sizes.align


@dataclass(frozen=True)
class Layer:
    """Sizes of one layer and its way: `gram` products of samples, or else of features."""

    num_source: int
    num_target: int
    num_features: int
    gram: bool

    @property
    def num_samples(self) -> int:
        return self.num_source + self.num_target

    @property
    def side(self) -> int:
        return self.num_samples if self.gram else self.num_features

    @property
    def domains(self) -> int:
        return 2 if self.num_target else 1

    def num_tiles(self, block: int) -> int:
        counts = (self.num_source, self.num_target) if self.gram else (self.num_features,)
        blocks = sum(ceil_div(count, block) for count in counts)
        return blocks * (blocks + 1) // 2

    def num_chunks(self, chunk: int) -> int:
        counts = (self.num_features,) if self.gram else (self.num_source, self.num_target)
        return sum(ceil_div(count, chunk) for count in counts)


class Sizes:
    """The layers of a call in the form that all its launches share."""

    def __init__(self, layers: tuple[Layer, ...], batch: int):
        self.layers, self.batch = layers, batch
        self.count = len(layers)
        grams = {layer.gram for layer in layers}
        self.route = "both" if len(grams) == 2 else "gram" if grams == {True} else "difference"
        self.num_samples = max(layer.num_samples for layer in layers)
        self.means = sum(layer.domains * layer.num_features for layer in layers)
        self.products = sum(layer.side**2 for layer in layers)
        self.align = 1 if any(layer.num_features % 16 for layer in layers) else 16
        self.packed = tuple(
            tuple(packed(getattr(layer, name)) for layer in layers)
            for name in ("num_source", "num_target", "num_features")
        )
        self.no_chunks = (packed(1),) * self.count

    def programs(self, counts: list[int]) -> tuple[tuple[int, ...], int]:
        """The argument `programs` of a launch with so many for each layer, and their sum, for one batch element."""
        return tuple(map(packed, counts)), sum(counts)


@dataclass(frozen=True)
class ForwardPlan:
    """Of the launches from features to products and losses."""

    sizes: Sizes
    covariance: bool
    accumulator: torch.dtype
    exact: bool  # float64 products of features that are not float64
    half: bool  # products in the dtype of the features
    fused_means: bool
    blocks: tiles.Blocks
    rows_of_total: int
    chunks: tuple[int, ...]  # packed
    num_partials: int
    programs: tuple[tuple[int, ...], int]
    total_programs: tuple[tuple[int, ...], int]
    careful_programs: tuple[tuple[int, ...], int]  # none where nothing can cancel


@dataclass(frozen=True)
class BackwardPlan:
    """Of the launches from incoming gradients to those of the features."""

    sizes: Sizes
    large: bool  # products of half-precision features
    half: bool  # these in the dtype of the features
    blocks: tiles.Blocks
    num_flags: int  # blocks of samples, in all layers
    programs: tuple[tuple[int, ...], int]
    careful_programs: tuple[tuple[int, ...], int]


def layers_of(num_source, num_target, num_features) -> tuple[Layer, ...]:
    return tuple(Layer(s, t, d, s + t < d) for s, t, d in zip(num_source, num_target, num_features))


@functools.lru_cache(1024)
def plan_forward(
    layers: tuple[Layer, ...], batch: int, dtype: torch.dtype, device: torch.device, flat: bool
) -> ForwardPlan:
    sizes = Sizes(layers, batch)
    covariance = layers[0].domains == 1
    gram = [layer for layer in layers if layer.gram]
    work = batch * sum(layer.num_samples**2 * layer.num_features for layer in gram)
    exact = bool(gram) and dtype != torch.float64 and work <= tiles.EXACT_WORK and tiles.fast_float64(device)
    accumulate = torch.float64 if exact else accumulator(dtype)
    half = not flat and not gram and dtype.itemsize == 2 and dense_work(layers, batch) >= tiles.HALF_WORK
    blocks = tiles.products(max(layer.side for layer in layers), half, len(layers) > 1)
    side = blocks.rows
    tile_counts = [layer.num_tiles(side) for layer in layers]
    total = batch * sum(tile_counts)
    fused_means = not half and all(layer.num_samples <= tiles.FUSED_MEANS for layer in layers)
    chunks = []
    for layer in layers:
        length = layer.num_features if layer.gram else max(layer.num_source, layer.num_target)
        if fused_means and not layer.gram:  # a program needs all samples of its domain
            chunks.append(ceil_div(length, blocks.depth) * blocks.depth)
        else:
            domains = 1 if layer.gram else layer.domains
            chunks.append(tiles.chunk(length, domains * total, blocks.depth, half, device))
    rows = min(side, 32)
    programs = [count * layer.num_chunks(chunk) for count, layer, chunk in zip(tile_counts, layers, chunks)]
    careful = tiles.careful()
    workers = [
        min(max(layer.num_tiles(careful.rows) for layer in layers), 2 * tiles.multiprocessors(device))
        if gram and not exact
        else 0
    ]
    return ForwardPlan(
        sizes,
        covariance,
        accumulate,
        exact,
        half,
        fused_means,
        blocks,
        rows,
        tuple(map(packed, chunks)),
        sum(programs) * side * side,
        sizes.programs(programs),
        sizes.programs([count * (side // rows) for count in tile_counts]),
        sizes.programs(workers * len(layers)),
    )


@functools.lru_cache(1024)
def plan_backward(
    layers: tuple[Layer, ...], batch: int, dtype: torch.dtype, flat: bool, needs: tuple[bool, bool]
) -> BackwardPlan:
    sizes = Sizes(layers, batch)
    dense = not flat and sizes.route == "difference"
    large = dense and dtype.itemsize == 2 and dense_work(layers, batch) >= tiles.HALF_WORK
    half = large and dtype == torch.bfloat16
    blocks = tiles.gradient(sizes.num_samples, half)
    blocks_of_samples = [
        (ceil_div(layer.num_source, blocks.rows), ceil_div(layer.num_target, blocks.rows)) for layer in layers
    ]
    needed = [needs[0] * of_source + needs[1] * of_target for of_source, of_target in blocks_of_samples]
    careful = dtype != torch.float64
    return BackwardPlan(
        sizes,
        large,
        half,
        blocks,
        sum(map(sum, blocks_of_samples)),
        sizes.programs([count * ceil_div(layer.num_features, blocks.columns) for count, layer in zip(needed, layers)]),
        sizes.programs(
            [
                count * sum(others) if layer.gram and careful else 0
                for count, others, layer in zip(needed, blocks_of_samples, layers)
            ]
        ),
    )


def dense_work(layers: tuple[Layer, ...], batch: int) -> int:
    """Multiplications of the product of all samples with a matrix of features × features."""
    return batch * sum(layer.num_samples * layer.num_features**2 for layer in layers)


def centred_copy(domains: Domains, means: Tensor, sizes: Sizes) -> Domains:
    """Both domains, centred and rounded to their dtype, one above the other."""
    from .products import centre_kernel

    (layer,) = sizes.layers
    blocks = tiles.centring()
    like = domains.source
    centred = like.new_empty(sizes.batch, layer.num_samples, layer.num_features)
    rows = ceil_div(layer.num_source, blocks.rows) + ceil_div(layer.num_target, blocks.rows)
    launch(
        centre_kernel,
        sizes.batch * rows * ceil_div(layer.num_features, blocks.columns),
        like.device,
        domains.source,
        domains.target,
        means,
        centred,
        *domains.strides,
        sizes.means,
        layer.num_source,
        layer.num_target,
        layer.num_features,
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        CONTIGUOUS=domains.contiguous,
        HALVE=like.dtype == torch.float16,
        ALIGN=domains.alignment(sizes),
        **blocks.options,
    )
    return Domains(centred[:, : layer.num_source], centred[:, layer.num_source :], False)


def operand(dtype: torch.dtype, device: torch.device):
    """The dtype in which half-precision operands are multiplied: the interpreter has no product of bfloat16."""
    return TRITON_DTYPES[dtype] if device.type != "cpu" else tl.float32
