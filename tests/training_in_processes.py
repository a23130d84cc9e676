"""The same training in one process or, under torchrun, in several: `training_in_processes.py FILE BATCH_SIZE`.

The network has neither batch statistics nor dropout. The batch of one process is as large as those of all together.
"""

from __future__ import annotations

import os
import sys
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastda.finetuning import GradualUnfreezing
from fastda.methods import CORALTerm, DomainAdversarialTerm, Method
from fastda.schedules import dann_lambda
from fastda.training import PartlyLabelled, fit


def make() -> tuple[Method, TensorDataset, PartlyLabelled]:
    torch.manual_seed(0)
    inputs, labels = torch.randn(96, 6, dtype=torch.float64), torch.arange(96) % 3
    inputs[:, 0] += labels
    # Few target labels, so that processes have different numbers of them, and in some batches none.
    target = PartlyLabelled(TensorDataset(1.5 * inputs[:48] + 1, labels[:48]), known=[0, 1, 2, 3, 20, 41])
    torch.manual_seed(1)
    extractor = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
    extractor[0].register_parameter("unused", nn.Parameter(torch.ones(2)))  # no loss depends on it
    classifier = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    method = Method(
        extractor,
        nn.Linear(8, 3),
        [
            CORALTerm(["feature_extractor.1", "label_predictor"], weight=3.0),
            DomainAdversarialTerm(classifier, lambd=dann_lambda),
        ],
        task_loss=partial(F.cross_entropy, reduction="none", label_smoothing=0.1),
        target_label_weight=lambda p: 0.5 + p,
    )
    return method.double(), TensorDataset(inputs, labels), target


def train(batch_size: int, checkpoint: str) -> dict:
    torch.set_num_threads(1)
    method, source, target = make()
    if int(os.environ.get("RANK", 0)) > 0:  # the first process's weights are to be everybody's
        for parameter in method.parameters():
            parameter.data.normal_()
    shuffled = DataLoader(source, batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))
    result = fit(
        method,
        shuffled,
        DataLoader(target, batch_size),
        epochs=4,
        unfreezing=GradualUnfreezing(method, lr=0.02, decay=0.7),
        source_validation=DataLoader(source, 40),
        accumulate=2,
        log_every=1,
        checkpoint=checkpoint,
        distributed={"find_unused_parameters": True},
    )
    return {"history": result.history, "weights": method.state_dict()}


def on_process(rank: int, count: int, port: int, file: str, batch_size: int) -> None:
    """One of the processes, told what torchrun would tell it."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    train_twice(file, batch_size)


def train_twice(file: str, batch_size: int) -> None:
    found = train(batch_size, f"{file}.checkpoint")
    found["again"] = train(batch_size, f"{file}.checkpoint")["weights"]  # finished: goes on from the end
    torch.save(found, f"{file}.{os.environ['RANK']}")


if __name__ == "__main__":
    train_twice(sys.argv[1], int(sys.argv[2]))
