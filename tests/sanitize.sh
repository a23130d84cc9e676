#!/usr/bin/env bash
# tests/sanitize.sh [--short] [PYTEST ARGUMENT ...]: the tests on C++ kernels under AddressSanitizer and
# UndefinedBehaviorSanitizer.
#
# Compiles the core with both into a scratch folder, beside the packages of the interpreter (PYTHON=... chooses it), and
# runs the whole test suite on it, or what is named. --short: the tests that call every kernel in its least sizes, in
# two minutes beside the compilation, which is of the instruction set alone that this machine uses. Any finding ends the
# run with the address and the stack. Needs g++ with its sanitizers. FASTDA_SANITIZED=FOLDER keeps the compiled package
# there, and uses one that is there already.
set -euo pipefail

python=${PYTHON:-python}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
package=${FASTDA_SANITIZED:-$work/package}

sanitize=1
if [ "${1:-}" = --short ]; then
    sanitize=$("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())')
    case $sanitize in avx512 | avx2 | default) ;; *) sanitize=1 ;; esac
fi
if [ ! -d "$package/fastda" ]; then
    # A copy: the build folder of the sources holds what was compiled without sanitizers.
    mkdir "$work/source"
    cp -r "$root"/{csrc,fastda,pyproject.toml,setup.py,README.md,LICENSE,MANIFEST.in} "$work/source"
    FASTDA_SANITIZE=$sanitize "$python" -m pip install --quiet --no-build-isolation --no-deps --target "$package" "$work/source"
fi
grep -q __asan_init "$package"/fastda/_C*.so && grep -q __ubsan_handle "$package"/fastda/_C*.so ||
    { echo "the core in $package is compiled without sanitizers" >&2; exit 1; }

tests=("$root/tests")
if [ "${1:-}" = --short ]; then
    shift
    tests=("$root"/tests/test_{contract,registered_ops,coral,covariance,domain_loss,prototypes}.py)
    export HYPOTHESIS_PROFILE=sanitize
fi
if [ $# -gt 0 ]; then
    tests=()
    for word in "$@"; do
        [ -e "${word%%::*}" ] && word=$(realpath "${word%%::*}")${word#"${word%%::*}"}
        tests+=("$word")
    done
fi

# The compiler that torch.compile starts must not inherit the sanitizers.
cat > "$work/g++" <<END
#!/bin/sh
unset LD_PRELOAD
exec "$(command -v g++)" "\$@"
END
chmod +x "$work/g++"
export CXX="$work/g++"
# What PyTorch and Python keep until the end is no leak of ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH="$package" OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
cd "$work"
cp -r "$root/pyproject.toml" .
# A finding is written past Python: captured, it would be lost with the process.
"$python" -m pytest -c pyproject.toml --rootdir "$root" -p no:cacheprovider -q --capture=sys \
    -o pythonpath="$root/tests $root/tests/peers $root/tests/triton_kernels" \
    "${tests[@]}"
