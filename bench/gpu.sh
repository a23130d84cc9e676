#!/usr/bin/env bash
# bench/gpu.sh OUTDIR: on a machine with a GPU, build, run tests/gpu and all GPU cases, write one record into OUTDIR.
#
# The record also holds the ceilings that shares of the limit refer to: copy, and matrix products in float32 and bf16.
# Needs torch, nvcc, pybind11, pytest and hypothesis; no network. PYTHON chooses the interpreter, BUDGET the seconds of
# timing a case. Every step has a log in OUTDIR and a time limit; all end within 8 minutes, the benchmarks with what the
# steps before left of them. Exit status: 0 if all went well, else that of the first step that failed. The benchmarks
# run even if tests fail, and write the record after each case: one that was cut short says "complete": false.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: bench/gpu.sh OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
budget=${BUDGET:-2}
failed=0

# step NAME SECONDS COMMAND...: run it within its time, log it, remember the first failure
step() {
    local name=$1 seconds=$2 status
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    echo "== $name: exit status $status" | tee -a "$out/$name.log"
    if [ "$status" -ne 0 ] && [ "$failed" -eq 0 ]; then
        failed=$status
    fi
}

cd "$root" || exit 2
step machine 15 nvidia-smi
step build 150 env FASTDA_FORCE_CUDA=1 "$python" -m pip install --no-build-isolation --no-deps .
step doctor 15 "$python" -m fastda doctor
step tests 90 "$python" -m pytest tests/gpu -ra
step benchmarks $((470 - SECONDS)) "$python" -m fastda.benchmarks --device cuda --budget "$budget" --output "$out"
exit "$failed"
