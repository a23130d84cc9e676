"""`python tests/soak.py`: ten thousand random examples an op, and a record of how that went.

Each op's property test (values and gradients against the reference, over sizes, dtypes, layouts and options) runs in a
process of its own with the hypothesis profile `soak`. After each of them the record of this machine is written, as JSON
and as a table; it keeps the rows of ops that are not run this time, or that could not be.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from time import perf_counter

import torch

import fastda.reference
from fastda.benchmarks import machine
from fastda.files import write_atomically
from fastda.kernels.cpp import status
from fastda.progress import progress_bar

ROOT = Path(__file__).resolve().parents[1]
TESTED = ("csrc", "fastda/kernels", "fastda/ops", "fastda/reference")
TEST = "tests/test_contract.py::test_values_and_gradients_over_sizes_dtypes_and_layouts"


def revision() -> str:
    """The last commit that changed what is tested."""

    def git(*words: str) -> str:
        command = ["git", *words, "--", *TESTED]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    return git("log", "-1", "--format=%h", "--abbrev=12").strip() + " with changes" * bool(git("status", "--porcelain"))


class DidNotStartError(RuntimeError):
    """No example was tried, so that nothing is known of the op."""


def reason_of(done: subprocess.CompletedProcess[str]) -> str:
    """The first error that pytest printed, with the call that failed in one line; else how it ended."""
    said = done.stdout + done.stderr
    lines = [line[2:].strip() for line in said.splitlines() if line.startswith("E ")]
    if not lines:
        return f"exit code {done.returncode}: {' '.join(said[-500:].split())}"
    example = re.search(r"\w+=torch\.\w+\[.*", said)
    return lines[0] + (f"; {example.group()}" if example else "")


def outcome(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    """How many examples passed and failed, and the first failure's message; an error where none was tried."""
    counts = re.findall(r"(\d+) passing(?: examples)?, (\d+) failing", done.stdout)
    passed, failed = (sum(int(pair[i]) for pair in counts) for i in range(2))
    reason = reason_of(done) if done.returncode != 0 else ""
    if -done.returncode in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGBUS):
        failed += 1  # an example that took the process with it
    if passed + failed == 0:
        raise DidNotStartError(reason or f"no example was counted: {' '.join(done.stdout[-500:].split())}")
    return {"passed": passed, "failed": failed, "reason": reason}


def soak(op: str, examples: int, of: str) -> dict[str, object]:
    """The op's row of the record."""
    start = perf_counter()
    words = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--hypothesis-show-statistics"]
    words += ["-p", "no:cacheprovider", f"{TEST}[{op}]"]
    environment = {"HYPOTHESIS_PROFILE": "soak", "SOAK_EXAMPLES": str(examples)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return {
        "op": op,
        "asked": examples,
        **outcome(done),
        "seconds": perf_counter() - start,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": of,
        "torch": torch.__version__,
    }


def table(record: dict) -> str:
    lines = [
        "# Random examples an op\n",
        f"{record['processor']}: values and gradients of each op against its reference, over sizes (0, 1, primes, "
        "blocks ± 1), batches, dtypes, layouts, label distributions and options that hypothesis draws; gradients of "
        "every input, for random incoming gradients. Allowed are twice the reference's own error plus 4·eps of the "
        "true value, in float64, where the truth is no more exact than the reference, four times plus 8·eps; where "
        "one draw does not tell, as root mean squares over up to 64 draws of both. The revision is the last one that "
        "changed kernels, ops or reference. `python tests/soak.py` adds to it.\n",
        "| op | examples | failures | seconds | date | PyTorch | revision |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["ops"]:
        failures = f"{row['failed']}" + f": {row['reason']}" * bool(row["reason"])
        lines.append(
            f"| `{row['op']}` | {row['passed'] + row['failed']} | {failures.replace('|', '&#124;')} | "
            f"{row['seconds']:.0f} | {row['date'][:10]} | {row['torch']} | {row['revision']} |"
        )
    return "\n".join(lines) + "\n"


def add(row: dict[str, object], stem: Path) -> None:
    """Write the row in the place of the op's last one, in the order of the public names."""
    path = Path(f"{stem}.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["ops"] if path.exists() else []
    by_op = {old["op"]: old for old in rows} | {row["op"]: row}
    rows = [by_op[op] for op in fastda.reference.__all__ if op in by_op]
    record = {"machine": machine.name("cpu"), "processor": machine.processor(), "ops": rows}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for suffix, content in ((".json", text), (".md", table(record))):
        write_atomically(Path(f"{stem}{suffix}"), lambda file, content=content: file.write(content.encode()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "bench/results/trust", help="folder of the record")
    parser.add_argument("--ops", nargs="+", default=list(fastda.reference.__all__), choices=fastda.reference.__all__)
    parser.add_argument("--examples", type=int, default=10_000, help="of each op; fewer are counted as what they are")
    parser.add_argument("--jobs", type=int, default=1, help="ops at a time, each on one core")
    options = parser.parse_args()
    for name in ("jobs", "examples"):
        if getattr(options, name) < 1:
            parser.error(f"{name}: expected at least 1, got {getattr(options, name)}")
    if not status.available:
        parser.exit(2, f"the kernels would not be tested: the compiled core is {status.reason}\n")
    stem = options.output / f"soak-{machine.name('cpu')}"
    options.output.mkdir(parents=True, exist_ok=True)
    of = revision()
    good = True
    with ThreadPoolExecutor(options.jobs) as pool, progress_bar(None, total=len(options.ops), unit="op") as bar:
        runs = {pool.submit(soak, op, options.examples, of): op for op in options.ops}
        for done in as_completed(runs):
            try:
                row = done.result()
            except DidNotStartError as error:
                print(f"{runs[done]}: did not start, so the record is left as it was: {error}", file=sys.stderr)
                good = False
            else:
                good &= row["failed"] == 0 and not row["reason"]
                add(row, stem)
            bar.update()
    if (written := Path(f"{stem}.md")).exists():
        print(written.read_text(encoding="utf-8"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
