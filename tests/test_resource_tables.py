"""The record of what Triton kernels take of a GPU, as Markdown."""

from __future__ import annotations

from fastda.benchmarks.resource_tables import markdown

KERNEL = {
    "case": "an episode",
    "kernel": "episode_kernel",
    "programs": 5,
    "num_warps": 4,
    "num_stages": 2,
    "constants": {"METRIC": "cosine", "SLOTS": 32, "BLOCK": 16},
    "target": "sm_90",
    "registers": 56,
    "spills": 0,
    "shared_bytes": 8192,
    "matrix_instructions": ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"],
}
OTHER = KERNEL | {"target": "gfx942", "spills": 8, "registers": 60, "matrix_instructions": ["v_mfma_f32_16x16x16_bf16"]}
RECORD = {"triton": "3.9.0", "precision": "highest", "cases": [], "complete": True, "kernels": [KERNEL, OTHER]}


def test_a_summary_of_each_target_then_its_kernels():
    lines = markdown(RECORD).splitlines()
    assert "| sm_90 | 1 | 0 | 56 | 8192 | wgmma.mma_async |" in lines
    assert "| gfx942 | 1 | 1 | 60 | 8192 | v_mfma |" in lines
    (of_sm_90,) = [line for line in lines if line.startswith("| episode_kernel") and "wgmma" in line]
    assert "| cosine, slots 32 | BLOCK 16 | 4, 2 | 56 | 0 | 8192 |" in of_sm_90
    assert lines.index("## sm_90") < lines.index(of_sm_90) < lines.index("## gfx942")
    assert not any("Cut short" in line or "Of the cases" in line for line in lines)


def test_a_part_says_that_it_is_one():
    text = markdown(RECORD | {"complete": False, "cases": ["coral", "5-way"]})
    assert "Cut short" in text and "names: coral, 5-way." in text
