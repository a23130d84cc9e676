"""`python tests/soak.py`: ten thousand random examples an op, one op after the other, and a record of how that went.

Each op's property test (values and gradients against the reference, over sizes, dtypes, layouts and options) runs in a
process of its own with the hypothesis profile `soak`; the record is written after each of them.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch

import fastda.reference
from fastda.benchmarks import machine
from fastda.files import write_atomically
from fastda.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
TEST = "tests/test_contract.py::test_values_and_gradients_over_sizes_dtypes_and_layouts"


def soak(op: str, profile: str) -> tuple[str, str, float]:
    """How many examples passed, how many failed (the last line of the failure with them), and the seconds it took."""
    start = perf_counter()
    words = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--hypothesis-show-statistics", f"{TEST}[{op}]"]
    environment = {"HYPOTHESIS_PROFILE": profile}
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    counts = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", done.stdout)
    passed, failed = (sum(int(pair[i]) for pair in counts) for i in range(2))
    reason = ""
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.startswith("E ")]
        reason = f": {lines[0][2:].strip() if lines else f'exit code {done.returncode}'}"
    return str(passed), f"{failed}{reason}", perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/trust", help="folder of the record")
    parser.add_argument("--ops", nargs="+", default=list(fastda.reference.__all__), choices=fastda.reference.__all__)
    parser.add_argument("--profile", default="soak", choices=("dev", "soak"), help="dev: few examples, to try it out")
    options = parser.parse_args()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = options.output / f"soak-{machine.name('cpu')}-{date}.md"
    options.output.mkdir(parents=True, exist_ok=True)
    lines = [
        f"# Random examples an op, {date}\n",
        f"{machine.processor()}, PyTorch {torch.__version__}, hypothesis profile `{options.profile}`: "
        "values and gradients against the reference.\n",
        "| op | examples passed | failed | seconds |",
        "| --- | --- | --- | --- |",
    ]
    all_passed = True
    with progress_bar(None, total=len(options.ops), unit="op") as bar:
        for op in options.ops:
            passed, failed, seconds = soak(op, options.profile)
            all_passed &= failed == "0" and passed != "0"
            lines.append(f"| `{op}` | {passed} | {failed.replace('|', '&#124;')} | {seconds:.0f} |")
            text = "\n".join(lines) + "\n"
            write_atomically(path, lambda file, text=text: file.write(text.encode()))
            bar.update()
    print(path.read_text(encoding="utf-8"))
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
