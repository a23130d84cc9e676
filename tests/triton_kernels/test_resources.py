"""The kernels compiled for absent GPUs, at the block sizes that the benchmarks' cases choose: nothing spills."""

from __future__ import annotations

import json
import os

import fresh
import pytest


def compiled(tmp_path, *options):
    """What each kernel takes; in a process of its own, since the interpreter replaces the kernels in this one."""
    record = tmp_path / "record.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = "-m", "fastda.benchmarks.triton_resources", "--output", record, *options
    process = fresh.python(*command, cwd=tmp_path, env=environment)
    assert record.exists(), process.stderr
    kernels = json.loads(record.read_text())["kernels"]
    assert kernels and process.returncode == (1 if any(kernel["spills"] for kernel in kernels) else 0)
    return kernels


def check(kernels):
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["registers"] > 0
        limit = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}[kernel["target"]]
        assert kernel["shared_bytes"] <= limit * 1024, kernel


@pytest.mark.parametrize(
    "case, target, kernels, instruction",
    [
        pytest.param("coral 64×2048 GPU", "sm_90", 4, "f64", marks=pytest.mark.slow),
        pytest.param(
            "coral 16384×2048 bf16 GPU",
            "sm_90",
            5,
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "cross-entropy Q 8192 × C 100000 × D 512 bf16 GPU",
            "sm_90",
            21,
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_case_on_a_target(case, target, kernels, instruction, tmp_path):
    found = compiled(tmp_path, "--cases", case, "--targets", target)
    check(found)
    assert len(found) == kernels
    assert any(instruction in one for kernel in found for one in kernel["matrix_instructions"])


def test_an_episode_and_large_batches(tmp_path):
    cases = "5-way 1-shot Q 75 D 640 GPU", "covariance 65536×1024 bf16 GPU"
    found = compiled(tmp_path, "--cases", *cases, "--targets", "sm_90")
    check(found)
    kernels = {kernel["kernel"]: kernel for kernel in found}
    assert kernels.keys() >= {"class_means_kernel", "episode_kernel", "episode_gradient_kernel"}
    assert any("wgmma" in one for one in kernels["products_kernel"]["matrix_instructions"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_every_case_on_every_target(precision, tmp_path):
    found = compiled(tmp_path, "--precision", precision)
    check(found)
    assert {kernel["target"] for kernel in found} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {kernel["kernel"] for kernel in found} == {
        "means_kernel",
        "centre_kernel",
        "products_kernel",
        "total_kernel",
        "careful_loss_kernel",
        "careful_gram_kernel",
        "gradient_kernel",
        "class_means_kernel",
        "class_means_backward_kernel",
        "episode_kernel",
        "episode_gradient_kernel",
        "directions_kernel",
        "through_directions_kernel",
        "statistics_kernel",
        "sweep_kernel",
        "join_kernel",
        "distances_kernel",
        "softmax_kernel",
        "nearest_kernel",
        "select_kernel",
        "weights_kernel",
        "pull_kernel",
    }
