"""`python -m fastda.benchmarks.patched_training`: training scripts of other libraries, before and after the one line.

Each script is written as that library's users write it, and knows nothing of fastda. It runs from the same seed without
the patch and with it, in turn; the losses have to agree, and the record says by how much they differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

from ..files import write_atomically
from ..kernels.cpp import status
from ..patching import patch
from ..progress import progress_bar
from . import machine
from .peers import PeerMissing, import_peer
from .record import git_revision, versions
from .tables import revision

Step = Callable[[], float]


def deep_coral() -> Step:
    """pytorch-adapt: Deep CORAL on features of the size that a ResNet-50 gives, 32 images a domain."""
    from pytorch_adapt.hooks import AlignerPlusCHook
    from pytorch_adapt.layers import CORALLoss

    models = {"G": nn.Sequential(nn.Linear(128, 2048), nn.ReLU()), "C": nn.Linear(2048, 10)}
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models.values()]
    return _pytorch_adapt(AlignerPlusCHook(opts=optimizers, loss_fn=CORALLoss()), models)


def dann() -> Step:
    """pytorch-adapt: DANN on the same features, the domain classifier of three layers."""
    from pytorch_adapt.hooks import DANNHook

    classifier = nn.Sequential(nn.Linear(2048, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1))
    models = {
        "G": nn.Sequential(nn.Linear(128, 2048), nn.ReLU()),
        "C": nn.Linear(2048, 10),
        "D": nn.Sequential(classifier, nn.Flatten(0)),
    }
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in models.values()]
    return _pytorch_adapt(DANNHook(opts=optimizers), models)


def _pytorch_adapt(hook, models: dict[str, nn.Module]) -> Step:
    def step() -> float:
        labels = torch.randint(10, (32,))
        batch = {
            "src_imgs": torch.randn(32, 128) + labels.unsqueeze(1) / 5,
            "src_labels": labels,
            "target_imgs": 1.5 * torch.randn(32, 128) + 0.5,
            "src_domain": torch.zeros(32),
            "target_domain": torch.ones(32),
        }
        _, losses = hook({**models, **batch})
        return float(losses["total_loss"]["total"])

    return step


def five_way() -> Step:
    """easyfsl: prototypical networks, 5-way 5-shot, 75 queries of 640 features."""
    return _easyfsl(ways=5, shots=5, queries=75)


def sixty_way() -> Step:
    """easyfsl: prototypical networks, 60-way 5-shot, 300 queries of 640 features, as they were trained in the paper."""
    return _easyfsl(ways=60, shots=5, queries=300)


def _easyfsl(ways: int, shots: int, queries: int) -> Step:
    from easyfsl.methods import PrototypicalNetworks

    network = PrototypicalNetworks(nn.Linear(64, 640))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)

    def images(labels: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        return centres[labels] + torch.randn(len(labels), 64)

    def step() -> float:
        centres = torch.randn(ways, 64)
        support_labels = torch.arange(ways).repeat_interleave(shots)
        query_labels = torch.arange(queries) % ways
        network.process_support_set(images(support_labels, centres), support_labels)
        scores = network(images(query_labels, centres))
        loss = nn.functional.cross_entropy(scores, query_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@dataclass(frozen=True)
class Script:
    """What is trained. `make` sets up models and optimiser, and gives the step."""

    library: str
    name: str
    modules: tuple[str, ...]
    make: Callable[[], Step]

    def __str__(self) -> str:
        return f"{self.library}: {self.name}"


SCRIPTS = (
    Script("pytorch_adapt", "Deep CORAL, 32 × 2048", ("pytorch_adapt.hooks",), deep_coral),
    Script("pytorch_adapt", "DANN, 32 × 2048", ("pytorch_adapt.hooks",), dann),
    Script("easyfsl", "5-way 5-shot, Q 75, D 640", ("easyfsl.methods",), five_way),
    Script("easyfsl", "60-way 5-shot, Q 300, D 640", ("easyfsl.methods",), sixty_way),
)


def train(script: Script, steps: int, patched: bool) -> tuple[list[float], list[float]]:
    """Losses, and seconds a step, from the seed 0."""
    losses, seconds = [], []
    torch.manual_seed(0)
    with patch(script.library) if patched else nullcontext():
        step = script.make()
        for _ in range(steps):
            start = perf_counter()
            losses.append(step())
            seconds.append(perf_counter() - start)
    return losses, seconds


def compare(script: Script, steps: int, rounds: int = 2, progress: Callable[[], None] = lambda: None) -> dict:
    """Both sides in turn, `rounds` times: medians of the milliseconds a step, and how far the losses are apart."""
    for module in script.modules:
        import_peer(module)
    losses: dict[bool, list[float]] = {}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for patched in (False, True):
            losses[patched], taken = train(script, steps, patched)
            seconds[patched] += taken[len(taken) // 10 :]  # the first steps allocate
            progress()
    before, after = (1e3 * statistics.median(seconds[patched]) for patched in (False, True))
    apart = max(abs(x - y) / abs(x) for x, y in zip(losses[False], losses[True]))
    return {
        "library": script.library,
        "script": script.name,
        "steps": steps,
        "milliseconds": {"before": before, "after": after},
        "ratio": before / after,
        "losses": {"first": losses[False][0], "last": losses[False][-1], "largest relative difference": apart},
    }


def table(record: dict) -> str:
    rows = [
        f"# Training scripts before and after `fastda.patch`\n\n{record['processor']}, {record['threads']} threads; "
        f"{record['date'][:10]}; PyTorch {record['versions']['torch']}{revision(record)}. "
        "Medians of the milliseconds a step, sides in turn.\n",
        "| library | script | ms a step before | after | ratio | losses differ by at most |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["scripts"]:
        name = f"{row['library']} {record['versions'].get(row['library'].replace('_', '-'), '')}"
        if "reason" in row:
            rows.append(f"| {name} | {row['script']} | {row['reason']} | | | |")
            continue
        ms, apart = row["milliseconds"], row["losses"]["largest relative difference"]
        times = f"{ms['before']:.2f} | {ms['after']:.2f} | {row['ratio']:.2f}×"
        rows.append(f"| {name} | {row['script']}, {row['steps']} steps | {times} | {apart:.1e} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastda.benchmarks.patched_training", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("bench/results/patch"), help="folder of record and table")
    parser.add_argument("--steps", type=int, default=100, help="of each script, each side, each of two rounds")
    options = parser.parse_args(arguments)
    if not status.available:
        print(f"the patches would not be measured: the compiled core is {status.reason}", file=sys.stderr)
        return 1
    rows = []
    with progress_bar(None, total=4 * len(SCRIPTS), unit="run") as bar:
        for script in SCRIPTS:
            try:
                rows.append(compare(script, options.steps, progress=bar.update))
            except PeerMissing as error:
                rows.append({"library": script.library, "script": script.name, "reason": str(error)})
    record = {
        "machine": machine.name("cpu"),
        "processor": machine.processor(),
        "threads": torch.get_num_threads(),
        "load": machine.load(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "git": git_revision(),
        "scripts": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"{record['machine']}-{record['date'][:10]}"
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    for suffix, content in ((".json", text), (".md", table(record))):
        write_atomically(Path(f"{stem}{suffix}"), lambda file, content=content: file.write(content.encode()))
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
