#!/usr/bin/env bash
# bench/peers.sh: install the libraries that a record compares with beside a fastda that is installed already.
#
# PYTHON chooses the interpreter. Their releases ask for torchvision and other things that are not used here and would
# bring another torch, so each is installed without dependencies, and what it does import is named. Where there is no
# torchvision, fastda.benchmarks.peers stands in for it. setuptools < 81 still has pkg_resources, which torchmetrics
# imports. learn2learn's C files are older than Python 3.11: they are made anew.
set -euo pipefail

python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --quiet 'setuptools<81' pandas pillow requests scikit-learn scipy tqdm gym==0.26.2
"$python" -m pip install --quiet --no-deps \
    pytorch-adapt==0.0.83 pytorch-metric-learning==1.6.3 torchmetrics==0.9.3 easyfsl==1.5.0

"$python" -m pip install --quiet --no-deps --target "$work/cython" cython
"$python" -m pip download --quiet --no-deps --no-binary :all: --dest "$work" learn2learn==0.2.0
tar -xzf "$work"/learn2learn-0.2.0.tar.gz -C "$work"
export PYTHONPATH="$work/cython"
(cd "$work/learn2learn-0.2.0" && "$python" -m cython -3 learn2learn/data/*.pyx)
"$python" -m pip install --quiet --no-deps --no-build-isolation "$work/learn2learn-0.2.0"
unset PYTHONPATH

"$python" - <<'PYTHON'
from fastda.benchmarks.peers import PEERS

for op, sides in PEERS.items():
    for name, make in sides.items():
        make()
        print(f"{op}: {name} imports")
PYTHON
