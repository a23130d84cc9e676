"""What each process of test_distributed.py runs. A module of its own, since processes are started by import."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from ops_under_test import BOTH, BY_NAME, Draw
from tolerance import random_like

from fastda import CovarianceAccumulator

# How many source, target and support samples and queries each process has. Some have none, or too few alone.
SIZES = {2: ((6, 1, 3, 2), (3, 5, 4, 5)), 3: ((5, 3, 0, 4), (1, 4, 6, 0), (2, 1, 3, 3))}
FEATURES, CLASSES = 4, 3
LABELS = {"support_labels": 2, "query_labels": 3, "labels": 2}
COLUMN = {"source": 0, "target": 1, "support": 2, "queries": 3, **LABELS}

CALLS = {
    "coral_loss": dict(),
    "coral_loss of means too": dict(scale="mean", mean_weight=0.7),
    "coral_loss of the population": dict(scale="sum", correction=0),
    "coral_loss of batches": dict(reduction="none"),
    "deep_coral_loss": dict(correction=0),
    "deep_coral_loss of means too": dict(scale="mean", mean_weight=0.7, weights=(0.5, 2.0)),
    "class_means": dict(num_classes=CLASSES),
    "class_means with an empty class": dict(num_classes=CLASSES + 1, empty="zero"),
    "prototypical_loss": dict(num_classes=CLASSES, temperature=2.0),
    "prototypical_loss cosine": dict(num_classes=CLASSES, metric="cosine", reduction="sum"),
}

STEPS = ("coral_loss", "coral_loss of means too", "deep_coral_loss", "deep_coral_loss of means too")


def whole_batch(world: int, name: str) -> dict[str, torch.Tensor]:
    """All samples of all processes."""
    arguments = BY_NAME[name.split()[0]].arguments(Draw(dtype=torch.float64))
    batch = (2,) if name.endswith("batches") else ()
    draw, tensors = Draw(dtype=torch.float64), {}
    for i, key in enumerate(key for key, x in arguments.items() if isinstance(x, torch.Tensor)):
        total = sum(sizes[column(key)] for sizes in SIZES[world])
        x = draw.normal(*batch, total, FEATURES, mean=0.3 * i)
        tensors[key] = torch.arange(total) % CLASSES if key in LABELS else x
    return tensors


def column(key: str) -> int:
    return COLUMN[key if key in COLUMN else key.split("_")[0]]


def share(world: int, rank: int, key: str, whole: torch.Tensor) -> torch.Tensor:
    sizes = [sizes[column(key)] for sizes in SIZES[world]]
    return whole.split(sizes, -2 if whole.dim() > 1 else 0)[rank]


Tensors = dict[str, torch.Tensor]


def derivatives(function, tensors: Tensors, directions: Tensors) -> Tensors:
    """The value, the gradients, and those of the gradients' product with the directions."""
    leaves = {key: x.detach().requires_grad_() if x.is_floating_point() else x for key, x in tensors.items()}
    inputs = {key: x for key, x in leaves.items() if x.is_floating_point()}
    value = function(**leaves)
    weight = random_like(value.detach(), 5)
    first = torch.autograd.grad((value.square() * weight).sum(), list(inputs.values()), create_graph=True)
    along = sum((g * directions[key]).sum() for g, key in zip(first, inputs))
    second = torch.autograd.grad(along, list(inputs.values()), materialize_grads=True)
    found = {"value": value.detach()}
    found |= {f"gradient of {key}": g.detach() for key, g in zip(inputs, first)}
    return found | {f"second derivative of {key}": g for key, g in zip(inputs, second)}


def step(module: object, name: str, parameter: torch.Tensor, source: torch.Tensor, target: torch.Tensor, group):
    """The gradient that a training step gives to a parameter of the feature extractor."""
    parameter = parameter.detach().requires_grad_()
    layers = [((x @ parameter).tanh(), (x @ parameter.square()).sin()) for x in (source, target)]
    options = CALLS[name] | {"process_group": group}
    if name.startswith("deep"):
        loss = module.deep_coral_loss(*layers, **options)
    else:
        loss = module.coral_loss(layers[0][0], layers[1][0], **options)
    return torch.autograd.grad(loss, parameter)[0]


def accumulate(x: torch.Tensor, group: dist.ProcessGroup) -> dict[str, object]:
    """Of samples that are spread over processes; where there are none, the accumulator has never been updated."""
    mine = CovarianceAccumulator()
    for chunk in x.split(2) if len(x) else ():
        mine.update(chunk)
    found = {"whole": mine.across_processes(group).state_dict(), "again": mine.across_processes(group).state_dict()}
    found["mine"] = mine.state_dict()
    found["unused"] = CovarianceAccumulator().across_processes(group).state_dict()
    wrong = CovarianceAccumulator().update(x.new_ones(2, FEATURES + (dist.get_rank(group) == 0)))
    try:
        wrong.across_processes(group)
    except ValueError as error:
        found["error"] = str(error)
    return found


def in_group(world: int, rank: int, group: dist.ProcessGroup) -> dict[object, object]:
    """Everything that a process of a group of this size computes."""
    found = {}
    for module in BOTH:
        for name, options in CALLS.items():
            op, whole = BY_NAME[name.split()[0]].of(module), whole_batch(world, name)
            mine = {key: share(world, rank, key, x) for key, x in whole.items()}
            directions = {key: share(world, rank, key, random_like(x.double(), 1)) for key, x in whole.items()}
            function = partial(op, **options, process_group=group)
            found[module.__name__, name] = derivatives(function, mine, directions)
        whole, parameter = whole_batch(world, "coral_loss"), Draw(dtype=torch.float64).normal(FEATURES, 3)
        mine = [share(world, rank, key, x) for key, x in whole.items()]
        for name in STEPS:
            gradient = step(module, name, parameter, *mine, group)
            dist.all_reduce(gradient, group=group)
            found[module.__name__, f"step of {name}"] = gradient / world  # what DistributedDataParallel does
        try:
            module.coral_loss(mine[0][:0] if rank else mine[0][:1], mine[1], process_group=group)
        except ValueError as error:
            found[module.__name__, "error"] = str(error)
    support = whole_batch(world, "class_means")["support"]
    found["accumulator"] = accumulate(share(world, rank, "support", support), group)
    return found


def on_process(rank: int, folder: str) -> None:
    """Three processes; the first two are a group of their own as well."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3)
    pair = dist.new_group([0, 1])
    torch.save(in_group(3, rank, dist.group.WORLD), f"{folder}/{rank} of 3.pt")
    if rank < 2:
        torch.save(in_group(2, rank, pair), f"{folder}/{rank} of 2.pt")
    dist.destroy_process_group()
