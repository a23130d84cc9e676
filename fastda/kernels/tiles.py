"""Block sizes of the Triton kernels, by heuristic from sizes, dtype and device. Nothing here needs Triton.

None of this was tuned on a GPU: the figures follow from registers, shared memory and the number of multiprocessors.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

EXACT_WORK = 2**28
"""Samples² × features up to which a Gram matrix is taken in float64 at once: cheaper than checking float32 ones."""

HALF_WORK = 2**30
"""Samples × features² from which half-precision features are multiplied as such, centred and rounded to their dtype."""

FUSED_MEANS = 256
"""Samples up to which each program takes the means that it needs itself: less than a launch for them costs."""

MOST_CHUNKS = 64
ABSENT_MULTIPROCESSORS = 132
ABSENT_CAPABILITY = (9, 0)
"""Both of an H200: on the meta device, where launches are only looked at."""

FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities with float64 at half of the rate of float32; others have it at 1/32 or 1/64."""


@dataclass(frozen=True)
class Blocks:
    """Of one launch: sides of a tile, its depth, and how Triton runs it."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    registers: int = 0  # of a thread, on NVIDIA: its compiler aims at them, and unasked spills some for fewer

    @property
    def options(self) -> dict[str, object]:
        # The contraction to fused multiply-adds is asked for: Triton is about to change its default.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        if self.registers:
            options["maxnreg"] = self.registers
        return on_amd(options) if torch.version.hip else options


def on_amd(options: dict[str, object]) -> dict[str, object]:
    """Its 64 KiB of shared memory hold no more than two stages of the larger tiles, and its registers are its own."""
    options = {name: value for name, value in options.items() if name != "maxnreg"}
    return options | {"num_stages": min(2, options["num_stages"])}


@functools.lru_cache(None)
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at a time, about; a few under the interpreter, where more only take longer."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return ABSENT_MULTIPROCESSORS if device.type == "meta" else 4


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU; on AMD, or where there is none, what stands for it."""
    nvidia = device.type == "cuda" and not torch.version.hip
    return torch.cuda.get_device_capability(device) if nvidia else ABSENT_CAPABILITY


@functools.lru_cache(None)
def fast_float64(device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) in FAST_FLOAT64


def products(side: int, half: bool, several: bool) -> Blocks:
    """For the products of samples or features: `side` of them.

    half: operands in half precision. several: several layers in one launch, which takes registers.
    """
    if half:
        return Blocks(128, 128, 64, 8, 3)
    if side <= 128 or several:
        return Blocks(32, 32, 16, 8, 3)
    return Blocks(64, 64, 16, 8, 3)


def gradient(num_samples: int, half: bool) -> Blocks:
    if half:
        return Blocks(128, 128, 64, 8, 3)
    if num_samples <= 128:
        return Blocks(32, 64, 16, 4, 3)
    return Blocks(64, 64, 16, 8, 3)


def careful(side: int = 32) -> Blocks:
    """For float64 products where others cancelled."""
    return Blocks(side, side, 16, 8 if side > 32 else 4, 2)


def means(num_rows: int, programs: int, device: torch.device) -> tuple[Blocks, int]:
    """Blocks, and into how many parts the rows of a column are split."""
    blocks = Blocks(32, 64, 0, 4, 1)
    parts = min(MOST_CHUNKS, num_rows // (8 * blocks.rows), 4 * multiprocessors(device) // max(programs, 1))
    return blocks, 1 << max(parts, 1).bit_length() - 1


def centring() -> Blocks:
    return Blocks(32, 128, 0, 8, 1)


def chunk(length: int, tiles: int, depth: int, half: bool, device: torch.device) -> int:
    """Into what lengths a sum over `length` is cut, so that `tiles` sums fill the device.

    What counts is the time of the last wave of programs, and the reading and writing of partial sums.
    """
    slots = multiprocessors(device)
    traffic = (6.0 if half else 0.5) * tiles / max(length, 1)
    most = max(1, min(MOST_CHUNKS, -(-length // depth)))
    parts = min(range(1, most + 1), key=lambda n: -(-tiles * n // slots) / n + traffic * n)
    return -(-(-(-length // parts)) // depth) * depth or depth


SCANNED_LABELS = 2**22
"""Labels × classes up to which each class looks for its samples itself: it costs less than sorting the labels."""


def class_means() -> Blocks:
    return Blocks(32, 128, 0, 4, 1)


def directions() -> Blocks:
    return Blocks(4, 256, 0, 4, 1)


def episode(num_classes: int, dtype: torch.dtype) -> Blocks:
    """Queries of a program (rows) against all classes (columns), over so many features at a time."""
    classes = power_of_two(num_classes)
    if classes > 32:
        return Blocks(16, classes, classes_depth(classes, dtype), 8, 1, registers=224)
    return Blocks(16, classes, classes_depth(classes, dtype), 4, 2)


def episode_gradient(num_classes: int, dtype: torch.dtype) -> Blocks:
    """Queries (rows) and features (depth) of a program, and all classes (columns)."""
    classes = power_of_two(num_classes)
    depth = classes_depth(classes, dtype)
    if classes == 16:
        return Blocks(32, classes, depth, 4, 1)
    return Blocks(32, classes, depth, 8, 2, registers=224 if classes == 32 else 0)


def power_of_two(num_classes: int) -> int:
    """So many classes fill a tile, whose sides matrix products want to be 16 at least."""
    return max(16, 1 << (num_classes - 1).bit_length())


def classes_depth(classes: int, dtype: torch.dtype) -> int:
    """Features at a time, of a tile with all classes."""
    depth = 64 if classes == 16 else 32 if classes <= 64 else 16
    return max(16, depth // 2) if dtype == torch.float64 else depth


WEIGHTS = {True: 7 * 2**20, False: 2**22}
"""Queries × classes whose weights are held at a time in the gradient of a cross-entropy, in half precision or not."""


def class_tile(half: bool, dtype: torch.dtype, metric: str) -> Blocks:
    """Queries (rows) against classes (columns). Weights of a square root take registers, and so do vectors scaled to
    length 1. Without `half` it is a square with the sides of `pull`, which finds near pairs by it."""
    if half:
        return Blocks(128, 64 if metric == "euclidean" else 128, 64, 8, 3)
    if dtype == torch.float64:
        return Blocks(32, 32, 16, 4, 2)
    if metric == "cosine":
        return Blocks(64, 64, 16, 8, 2, registers=224)
    return Blocks(64, 64, 16, 4, 2)


def swept(blocks: Blocks, device: torch.device) -> Blocks:
    """The same for a softmax over all classes, whose sums take more registers than four warps get. On Blackwell, where
    threads read whole rows of products from tensor memory, those of a wide tile leave none for its usual depth."""
    if blocks.columns == 128 and capability(device)[0] == 10:
        return dataclasses.replace(blocks, depth=32)
    more = {"num_warps": 8, "registers": 240} if (blocks.rows, blocks.num_warps) == (64, 4) else {}
    return dataclasses.replace(blocks, **more)


def nearest(blocks: Blocks, slots: int) -> Blocks:
    """The same for a search, which keeps `slots` neighbours of each query in registers beside their distances."""
    if blocks.rows == 128:
        return dataclasses.replace(blocks, rows=64 if slots > 8 else 128, columns=64)
    more = {}
    if blocks.rows == 64:
        more = {"num_stages": 1, "registers": 224} if slots > 8 else {"num_warps": 8, "registers": 240}
    return dataclasses.replace(blocks, **more)


def weights(blocks: Blocks, mode: str) -> Blocks:
    """The same for the weights of a gradient, or sums of them: incoming gradients make another tile beside that of the
    distances, and so do near pairs; those of a search one that is compared with every neighbour."""
    if mode == "neighbours" and blocks.rows > 32:
        return dataclasses.replace(blocks, rows=64, columns=64, num_warps=8, registers=255)
    if mode != "logits" and blocks.rows == 64 and blocks.num_warps == 4:
        return dataclasses.replace(blocks, num_warps=8, registers=240)
    return blocks


def pull(half: bool, dtype: torch.dtype, metric: str) -> tuple[Blocks, int]:
    """Blocks of a gradient, and how many columns a program for prototypes has: their sums are longer."""
    if half and dtype == torch.bfloat16:
        return Blocks(128, 128, 32 if metric == "cosine" else 64, 8, 4), 64
    if dtype == torch.float64:
        return Blocks(32, 32, 16, 4, 2), 32
    return Blocks(64, 64, 16, 8, 3, registers=200), 64


def statistics() -> Blocks:
    return Blocks(16, 128, 0, 4, 1)


def class_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many chunks the classes of each query are split, so that the programs fill the device twice."""
    return max(1, min(tiles, 2 * multiprocessors(device) // max(programs, 1)))


MOST_SLOTS = 32
"""Neighbours that a search keeps for each query; more are found by sorting."""


def select(candidates: int) -> Blocks:
    columns = min(1024, max(16, 1 << (candidates - 1).bit_length()))
    return Blocks(min(16, 2048 // columns), columns, 0, 4, 1)


def weights_width(rows: int, num_classes: int, block: int, half: bool) -> int:
    """For how many classes weights are held at a time."""
    most = max(1, WEIGHTS[half] // max(1, rows * block))
    return min(most, max(1, -(-num_classes // block))) * block


def softmax() -> Blocks:
    return Blocks(4, 512, 0, 4, 1)
