"""What a Triton kernel takes of a GPU, without the GPU: compiled to machine code, its registers, spills, shared memory and
matrix instructions are read back.

Not under TRITON_INTERPRET=1, which replaces the kernels by Python.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
        spills: bytes (NVIDIA) or registers (AMD) that did not fit and live in memory; 0 is what we want.
        shared_bytes: of a block.
        matrix_instructions: the kinds used.
    """

    target: str
    registers: int
    spills: int
    shared_bytes: int
    matrix_instructions: tuple[str, ...]


def resources(kernel, signature: dict[str, str], constants: dict[str, object], target: str, **options) -> Resources:
    """Compile `kernel` for `target`.

    Args:
        kernel: a function under `@triton.jit`.
        signature: type of each argument in Triton's words, such as "*fp32", "i64" or "constexpr".
        constants: value of each constexpr argument.
        target: a key of `TARGETS`.
        options: `num_warps`, `num_stages` and the like.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(f"kernel: expected a compiled Triton function, got {kernel!r}; unset TRITON_INTERPRET")
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    nvidia = TARGETS[target].backend == "cuda"
    registers, spills = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    instructions = re.findall(MATRIX_INSTRUCTIONS, compiled.asm["ptx" if nvidia else "amdgcn"])
    return Resources(target, registers, spills, compiled.metadata.shared, tuple(sorted(set(instructions))))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _amd_usage(assembly: str) -> tuple[int, int]:
    usage = dict(re.findall(r"\.((?:vgpr|sgpr)(?:_spill)?_count):\s*(\d+)", assembly))
    return int(usage["vgpr_count"]), int(usage["vgpr_spill_count"]) + int(usage["sgpr_spill_count"])
