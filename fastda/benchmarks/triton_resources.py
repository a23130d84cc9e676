"""What a Triton kernel takes of a GPU, without the GPU: compiled to machine code, its registers, spills, shared memory
and matrix instructions are read back.

    python -m fastda.benchmarks.triton_resources --output bench/results/triton/resources.json

compiles the kernels at the block sizes that the cases choose, which takes half an hour, or seconds where Triton's cache
has them. Not under TRITON_INTERPRET=1, which replaces the kernels by Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..files import write_atomically
from ..kernels import tiles
from ..kernels.triton import coral, covariance, nearest_prototype, problem, prototype_classes, prototypes
from ..kernels.triton.problem import accumulator
from ..reference.prototypes import METRICS
from .cases import CPU_CASES, GPU_CASES, Case
from .record import write
from .resource_tables import markdown

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""NVIDIA A100, H100/H200 and B200, AMD MI300."""

MATRIX_INSTRUCTIONS = r"mma\.sync[.\w]*|wgmma\.mma_async[.\w]*|tcgen05\.mma[.\w:]*|v_mfma\w*"


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one target.

    Attributes:
        target: a key of `TARGETS`.
        registers: of a thread.
        spills: bytes of a thread that did not fit into registers; 0 is what we want. On AMD those of vector registers
            and of scratch memory. Scalar registers that its compiler parks in lanes of a vector register do not count:
            that is one instruction each way and no memory, and `registers` includes the vector register.
        shared_bytes: of a block.
        matrix_instructions: the kinds used.
    """

    target: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what `resources` asks for, and in how many programs it runs."""

    kernel: object
    programs: int
    signature: dict[str, object]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    options: dict[str, object]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def resources(self, target: str) -> Resources:
        options, constants = self.options, self.constants
        if TARGETS[target].backend == "hip":
            options = tiles.on_amd(options)
            if "PRECISION" in constants:
                constants = constants | {"PRECISION": "ieee"}
        return resources(self.kernel, self.signature, constants, target, aligned=self.aligned, **options)


TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


def resources(
    kernel,
    signature: dict[str, object],
    constants: dict[str, object],
    target: str,
    *,
    aligned: Collection[str] = (),
    **options,
) -> Resources:
    """Compile `kernel` for `target`.

    Args:
        kernel: a function under `@triton.jit`.
        signature: type of each argument in Triton's words, such as "*fp32", "i64" or "constexpr"; a tuple for a tuple.
        constants: value of each constexpr argument.
        target: a key of `TARGETS`.
        aligned: arguments that are multiples of 16, as most pointers and many strides are.
        options: `num_warps`, `num_stages` and the like.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"kernel: expected a compiled Triton function, got {kernel!r}; unset TRITON_INTERPRET")
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(signature) if name in aligned}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    nvidia = TARGETS[target].backend == "cuda"
    registers, spills = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    instructions = re.findall(MATRIX_INSTRUCTIONS, compiled.asm["ptx" if nvidia else "amdgcn"])
    return Resources(target, registers, spills, compiled.metadata.shared, tuple(sorted(set(instructions))))


def launches(call: Callable, *arguments: object) -> list[Launch]:
    """What a launcher of fastda.kernels.triton would launch on a GPU, for tensors on the meta device."""
    problem.noted.clear()
    call(*arguments)
    found = [_described(*launch) for launch in problem.noted]
    problem.noted.clear()
    return found


SERVED = {
    "class_means": prototype_classes,
    "coral_loss": coral,
    "covariance": covariance,
    "nearest_prototype": nearest_prototype,
    "pairwise_distance": prototypes,
    "prototype_cross_entropy": prototypes,
    "prototype_softmax": prototypes,
    "prototypical_loss": prototype_classes,
}
"""Ops with Triton kernels, and the module that launches them."""

TOLD = (
    "METRIC", "MODE", "ROUTE", "SLOTS", "BLOCK", "ROWS", "WIDTH", "CLASSES", "CLASS_WIDTH", "COLUMNS", "BLOCK_K"
)  # fmt: skip
"""Constants that the record names."""

LAYERS = "deep coral, layers of 256, 512 and 64 features"


@dataclass(frozen=True)
class Call:
    """A call of an op of torch.ops.fastda: its tensors, of which the first `differentiable` get gradients, its
    constants, and how many of its results are values."""

    op: str
    tensors: tuple[torch.Tensor, ...]
    constants: tuple[object, ...]
    differentiable: int
    values: int = 1

    def launches(self) -> list[Launch]:
        """Forward and backward, with gradients for all inputs."""
        module = SERVED.get(self.op, coral)
        forward, backward = getattr(module, self.op), getattr(module, f"{self.op}_backward")
        results = forward(*self.tensors, *self.constants)
        results = results if isinstance(results, tuple) else (results,)
        grads, saved = results[: self.values], results[self.values :]
        needs = (True,) * self.differentiable
        return [
            *launches(forward, *self.tensors, *self.constants),
            *launches(backward, *grads, *self.tensors, *saved, *self.constants, *needs),
        ]


def served_cases() -> dict[str, Case | None]:
    """The cases whose op has Triton kernels, by name, and one call of several layers, which is no case."""
    return {case.name: case for case in (*GPU_CASES, *CPU_CASES) if case.op in SERVED} | {LAYERS: None}


def launches_of(case: Case | None) -> list[Launch]:
    """Of the calls of a case, those of prototypes with each metric."""
    return [launch for call in calls_of(case) for launch in call.launches()]


def calls_of(case: Case | None) -> list[Call]:
    if case is None:
        num_samples, num_features = [64] * 3, [256, 512, 64]
        domain = torch.empty(sum(64 * d for d in num_features), device="meta")
        constants = (num_samples, num_samples, num_features, [1.0] * 3, 1, "paper")
        return [Call("coral_layers", (domain, domain), constants, 2, values=2)]
    inputs = case.make(
        case.sizes,
        lambda *shape: torch.empty(shape, dtype=case.dtype, device="meta"),
        lambda num_classes, *shape: torch.empty(shape, dtype=torch.int64, device="meta"),
    )
    if case.op == "coral_loss":
        return [Call(case.op, inputs, (1, "paper"), 2, values=2)]
    if case.op == "covariance":
        return [Call(case.op, inputs, (1,), 1)]
    if case.op == "class_means":
        *tensors, num_classes = inputs
        return [Call(case.op, tuple(tensors), (num_classes, "nan"), 1)]
    if case.op == "nearest_prototype":
        return [Call(case.op, inputs, (k, metric), 2) for metric in METRICS for k in (1, 32)]
    if case.op == "prototype_cross_entropy":
        queries, classes, targets = inputs
        temperature = torch.empty(queries.shape[:-2], dtype=accumulator(case.dtype), device="meta")
        tensors = queries, classes, temperature, targets
        found = [Call(case.op, tensors, (-100, 0.1, metric, "mean"), 3) for metric in METRICS]
        if case.dtype == torch.float32:  # these hold a matrix of queries × classes
            found += [Call("pairwise_distance", tensors[:2], (metric,), 2) for metric in METRICS]
            softmax = ("sqeuclidean", True), ("euclidean", False)
            found += [Call("prototype_softmax", tensors[:3], constants, 3) for constants in softmax]
        return found
    support, support_labels, queries, query_labels, num_classes = inputs
    temperature = torch.empty(queries.shape[:-2], dtype=accumulator(case.dtype), device="meta")
    tensors = support, queries, temperature, support_labels, query_labels
    return [Call(case.op, tensors, (num_classes, metric, "mean"), 3) for metric in METRICS]


def _described(kernel, programs: int, arguments: tuple, constants: dict[str, object]) -> Launch:
    """As Triton's own launcher would: integers that are 1 become constants, multiples of 16 are known to be."""
    signature: dict[str, object] = {}
    fixed, options, aligned = {}, {}, []
    for parameter, value in zip(kernel.params, arguments):
        name = parameter.name
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            aligned.append(name)
        elif isinstance(value, tuple):
            signature[name] = tuple("fp32" if isinstance(one, float) else _integer(one) for one in value)
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], fixed[name] = "constexpr", value
        else:
            signature[name] = _integer(value)
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    for name, value in constants.items():
        if name in kernel.arg_names:
            signature[name], fixed[name] = "constexpr", value
        else:
            options[name] = value
    return Launch(kernel, programs, signature, fixed, tuple(aligned), options)


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _amd_usage(assembly: str) -> tuple[int, int]:
    usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", assembly))
    return int(usage["vgpr_count"]), max(4 * int(usage["vgpr_spill_count"]), int(usage["private_segment_fixed_size"]))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastda.benchmarks.triton_resources", description=__doc__)
    parser.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="parts of names; default all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--precision", choices=("highest", "high"), default="highest", help="of float32 products")
    parser.add_argument("--output", type=Path, help="a JSON file for the record, and Markdown beside it")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision(options.precision)
    record = {"triton": triton.__version__, "precision": options.precision, "cases": options.cases}
    record |= {"complete": False, "kernels": []}
    steps = [(target, *chosen) for target in options.targets for chosen in different_launches(options.cases, target)]
    for target, name, launch in steps:
        row = {"case": name, "kernel": launch.name, "programs": launch.programs, **launch.options}
        row["constants"] = {part: launch.constants[part] for part in TOLD if part in launch.constants}
        row |= dataclasses.asdict(launch.resources(target))
        record["kernels"].append(row)
        print(_line(row), flush=True)
        record["complete"] = len(record["kernels"]) == len(steps)
        if options.output:
            write(record, options.output)
            table = markdown(record).encode()
            write_atomically(options.output.with_suffix(".md"), lambda file: file.write(table))
    return 1 if any(row["spills"] for row in record["kernels"]) else 0


def different_launches(parts: Collection[str] = (), target: str = "sm_90") -> list[tuple[str, Launch]]:
    """Of the cases whose name has one of the parts, or of all; each with the name of the first case that has it. Block
    sizes are those for the target."""
    nvidia = TARGETS[target].backend == "cuda"
    tiles.ABSENT_CAPABILITY = divmod(TARGETS[target].arch, 10) if nvidia else (9, 0)
    found: dict[tuple, tuple[str, Launch]] = {}
    for name, case in served_cases().items():
        if not parts or any(part in name for part in parts):
            for launch in launches_of(case):
                kind = launch.name, str(launch.signature), str(launch.constants), launch.aligned, str(launch.options)
                found.setdefault(kind, (name, launch))
    return list(found.values())


def _line(row: dict[str, object]) -> str:
    used = f"{row['registers']} registers, {row['spills']} spilled, {row['shared_bytes']} bytes shared"
    instructions = ", ".join(row["matrix_instructions"]) or "no matrix instruction"
    return f"{row['case']}: {row['kernel']}, {row['programs']} programs, {row['target']}: {used}; {instructions}"


if __name__ == "__main__":
    sys.exit(main())
