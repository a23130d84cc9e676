"""Triton as it is installed does what the kernels need: interpreted here, compiled for GPUs that are not here."""

import json
import os
from pathlib import Path

import fresh
import pytest
import torch

HERE = Path(__file__).parent

COMPILE = """
import dataclasses, json, sys
sys.path.insert(0, sys.argv[1])
import toolchain_kernels
from fastda.benchmarks.triton_resources import resources
signature = {"x": "*fp32", "out": "*fp32", "rows": "i32", "columns": "i32"}
signature |= {"BLOCK": "constexpr", "PRECISION": "constexpr"}
constants = {"BLOCK": 32, "PRECISION": "tf32"}
for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
    print(json.dumps(dataclasses.asdict(resources(toolchain_kernels.gram, signature, constants, target, num_warps=4))))
found = resources(toolchain_kernels.gram, signature, constants, "sm_80", num_warps=1, maxnreg=40)
print(json.dumps(dataclasses.asdict(found)))
"""


@pytest.mark.parametrize("columns", [1, 16, 33])
def test_a_loop_with_a_bound_known_at_run_time(columns):
    from toolchain_kernels import row_sums

    x = torch.randn(5, columns + 3)[:, :columns]
    out = torch.full((5,), torch.nan)
    row_sums[(5,)](x, out, 5, columns, x.stride(0), BLOCK=16)
    torch.testing.assert_close(out, x.sum(1))


@pytest.mark.parametrize("rows, columns", [(1, 1), (17, 40)])
def test_a_matrix_product_with_masks(rows, columns):
    from toolchain_kernels import gram

    x = torch.randn(rows, columns)
    out = torch.full((rows, rows), torch.nan)
    blocks = -(-rows // 16)
    gram[(blocks, blocks)](x, out, rows, columns, BLOCK=16, PRECISION="ieee")
    torch.testing.assert_close(out, x @ x.T)


def test_kernels_compile_for_absent_gpus(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = fresh.python("-c", COMPILE, HERE, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr
    *targets, starved = map(json.loads, process.stdout.splitlines())
    for used in targets:
        assert used["spills"] == 0 and used["registers"] > 0 and used["shared_bytes"] > 0, used
        assert used["matrix_instructions"], used
    assert starved["spills"] > 0, "40 registers cannot hold that tile: spills are not seen"
