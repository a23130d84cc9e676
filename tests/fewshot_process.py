"""What each process of test_fewshot_processes.py runs. A module of its own, since processes are started by import."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss

from fastda.fewshot import MAML, EpisodeSampler, PrototypicalNetwork, Reptile, evaluate_episodes

SHARES = ((3, 2), (5, 0))  # tasks of each of two processes
LABELS = torch.arange(80) % 8
FEATURES = nn.functional.one_hot(LABELS, 8) + 0.8 * torch.randn(80, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()


def tasks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, size, generator=generator, dtype=torch.float64) for size in (8, 2, 8, 2)]


def meta_gradient(learner, tasks) -> list[torch.Tensor]:
    loss = learner(*tasks)
    return [loss.detach(), *torch.autograd.grad(loss, list(learner.parameters()))]


def learners(group) -> dict[str, nn.Module]:
    options = {"inner_lr": 0.3, "inner_steps": 2, "process_group": group}
    return {
        "mean": MAML(network(), mse_loss, chunk_size=2, **options),
        "sum": MAML(network(), mse_loss, reduction="sum", learn_inner_lr=True, **options),
        "reptile": Reptile(network(), mse_loss, **options),
    }


def sampler() -> EpisodeSampler:
    return EpisodeSampler(LABELS, ways=4, shots=2, queries=3, episodes=12, batch_size=4)


def train(group) -> dict[str, torch.Tensor]:
    """A few steps of meta-training on regression to the class vectors, as a user would write them."""
    maml = MAML(network(), lambda outputs, labels: mse_loss(outputs[:, 0], labels.double()), process_group=group)
    # Not Adam, which makes whole steps of rounding errors: the bias before the normalisation has no other gradient.
    optimizer = torch.optim.SGD(maml.parameters(), lr=0.1, momentum=0.9)
    for episodes in sampler().take(FEATURES.double()):
        optimizer.zero_grad()
        maml(*episodes).backward()
        optimizer.step()
    return maml.network.state_dict()


def everything(share: slice, group) -> dict[str, object]:
    mine = [x[share] for x in tasks()]
    found: dict[str, object] = {name: meta_gradient(learner, mine) for name, learner in learners(group).items()}
    return found


def on_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    found: dict[str, object] = {}
    for shares in SHARES:
        first = sum(shares[:rank])
        found[str(shares)] = everything(slice(first, first + shares[rank]), group)
    found["trained"] = train(group)
    accuracy = evaluate_episodes(PrototypicalNetwork(nn.Identity()), sampler().take(FEATURES), process_group=group)
    found["accuracy"] = [accuracy.mean, accuracy.half_width]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
