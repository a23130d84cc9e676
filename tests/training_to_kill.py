"""A training that is killed over and over, and once left alone. A program of its own: `training_to_kill.py FOLDER KILLS
SEED`.

Everything that a resumed run has to find again takes part: loaders of different lengths that shuffle, one of them by a
generator of its own, augmentation by Python's, NumPy's and PyTorch's generators, dropout, batch norm, momenta,
schedules of rate, λ and weights, layers that thaw, validation and selection, and the metrics file.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # as optimisers do when they are made: here once, not in each of the processes
from forks import start
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastda.finetuning import GradualUnfreezing
from fastda.methods import CORALTerm, DomainAdversarialTerm, Method
from fastda.schedules import dann_lambda
from fastda.training import fit

EPOCHS, EVERY = 5, 2
ended: set[int] = set()


def augment(samples) -> tuple[torch.Tensor, torch.Tensor]:
    inputs, labels = (torch.stack(parts) for parts in zip(*samples))
    noise = random.random() + float(np.random.rand()) + torch.rand(())
    return inputs + 0.1 * noise * torch.randn_like(inputs), labels


def train(folder: Path) -> None:
    torch.set_num_threads(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    inputs, labels = torch.randn(90, 8), torch.arange(90) % 3
    inputs[:, 0] += labels
    data = TensorDataset(inputs, labels)
    source = DataLoader(data, batch_size=8, shuffle=True, collate_fn=augment, drop_last=True)
    generator = torch.Generator().manual_seed(4)
    target = DataLoader(TensorDataset(inputs[:50] + 1), batch_size=9, shuffle=True, generator=generator)
    extractor = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8), nn.ReLU()
    )
    terms = [
        CORALTerm(["feature_extractor.1", "feature_extractor"], weight=lambda p: 10 * p),
        DomainAdversarialTerm(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.2), nn.Linear(4, 1)), lambd=dann_lambda),
    ]
    method = Method(extractor, nn.Linear(8, 3), terms)
    unfreezing = GradualUnfreezing(method, lr=0.01, decay=0.5, every=2)
    folder.mkdir(exist_ok=True)
    fit(
        method,
        source,
        target,
        epochs=EPOCHS,
        unfreezing=unfreezing,
        lr_schedule=lambda p: 1 - p,
        clip_norm=1.0,
        accumulate=2,
        source_validation=DataLoader(data, batch_size=32, shuffle=True),
        select="source_accuracy",
        checkpoint=folder / "checkpoint.pt",
        checkpoint_every=EVERY,
        log=folder / "log.csv",
        log_every=3,
    )
    torch.save(method.state_dict(), folder / "weights.unfinished")
    os.replace(folder / "weights.unfinished", folder / "weights.pt")


def wait(child: int, seconds: float = math.inf) -> bool:
    """Whether it ends within so many seconds, without an error; asks again and again."""
    until = time.monotonic() + seconds
    while child not in ended:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, "a run failed"
            ended.add(child)
        elif time.monotonic() >= until:
            return False
        else:
            time.sleep(0.001)
    return True


def main(folder: Path, kills: int, seed: int) -> None:
    begin = time.monotonic()
    wait(start(train, folder / "left alone"))
    whole = time.monotonic() - begin
    moments, checkpoint = random.Random(seed), folder / "killed" / "checkpoint.pt"
    count, resumed, finished = 0, 0, []
    while count < kills:
        before = written(checkpoint)
        child = start(train, folder / "killed")
        if count % 2:  # some while after it has got further; else at any moment, the first ones included
            while not wait(child, 0) and written(checkpoint) == before:
                pass
        if wait(child, moments.uniform(0, whole / 5)):  # finished between two kills: again from the beginning
            finished.append(same(folder))
            shutil.rmtree(folder / "killed")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        count += 1
        resumed += checkpoint.exists()
    wait(start(train, folder / "killed"))
    finished.append(same(folder))
    print(json.dumps({"kills": count, "resumed": resumed, "finished": len(finished), "same": all(finished)}))


def written(path: Path) -> int:
    """When; 0 if never."""
    return path.stat().st_mtime_ns if path.exists() else 0


def same(folder: Path) -> bool:
    """Whether the weights, and the log, are to the bit those of the run that was left alone."""
    alone, killed = (torch.load(folder / run / "weights.pt", weights_only=True) for run in ("left alone", "killed"))
    logs = [(folder / run / "log.csv").read_bytes() for run in ("left alone", "killed")]
    leftovers = list((folder / "killed").glob(".*"))
    weights = alone.keys() == killed.keys() and all(map(torch.equal, alone.values(), killed.values()))
    return weights and logs[0] == logs[1] and not leftovers


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
