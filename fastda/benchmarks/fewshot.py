"""Few-shot cases, which are no single ops: the gradient of MAML on a meta-batch, and the accuracy of many episodes.

Each has sides of its own. "reference" is the plain loop that the fused side has to agree with, "careful" what a careful
user writes in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn.functional import mse_loss

import fastda
from fastda.fewshot import MAML, Episode, PrototypicalNetwork, evaluate_episodes
from fastda.intervals import interval

from .peers import import_peer

HIDDEN, INNER_LR = 40, 0.01


# The gradient of MAML for the sinusoid network: from a meta-batch and six parameters to loss and gradients


def parameters(sizes, normal) -> tuple[Tensor, ...]:
    """Weights and biases of the network with two hidden layers."""
    shapes = ((HIDDEN, 1), (HIDDEN,), (HIDDEN, HIDDEN), (HIDDEN,), (1, HIDDEN), (1,))
    return tuple(normal(*shape) * (shape[1] ** -0.5 if len(shape) == 2 else 0.1) for shape in shapes)


def network(values: tuple[Tensor, ...]) -> nn.Sequential:
    """The network whose parameters are these tensors."""
    layers = (nn.Linear(1, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    result = nn.Sequential(*layers)
    for layer, (weight, bias) in zip(result[::2], zip(values[::2], values[1::2])):
        layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return result


def made_once(make: Callable[[tuple[Tensor, ...]], Callable]) -> Callable:
    """What users make before they train, and then call: kept for the parameters that it was made of."""
    kept: dict[int, tuple] = {}

    def step(*arguments: Tensor) -> tuple[Tensor, ...]:
        tasks, values = arguments[:4], arguments[4:]
        if id(values[0]) not in kept:
            kept[id(values[0])] = make(values), values  # the values too, so that their id stays theirs
        return kept[id(values[0])][0](*tasks)

    return step


def fused_maml(values: tuple[Tensor, ...], compile: bool = False) -> Callable:
    learner = MAML(network(values), mse_loss, inner_lr=INNER_LR, compile=compile)
    leaves = list(learner.parameters())

    def step(*tasks: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = learner(*tasks)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def looped_maml(values: tuple[Tensor, ...]) -> Callable:
    """Task by task, with `torch.autograd`."""
    learner = network(values)
    start = dict(learner.named_parameters())
    leaves = list(start.values())

    def step(*tasks: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            losses = []
            for x, y, queries, query_values in zip(*tasks):
                inner = mse_loss(functional_call(learner, start, (x,)), y)
                gradients = torch.autograd.grad(inner, leaves, create_graph=True)
                adapted = {name: p - INNER_LR * g for (name, p), g in zip(start.items(), gradients)}
                losses.append(mse_loss(functional_call(learner, adapted, (queries,)), query_values))
            loss = torch.stack(losses).mean()
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def careful_maml(values: tuple[Tensor, ...]) -> Callable:
    """`vmap` with the outer gradient inside, by hand."""
    learner = network(values)
    start = {name: x.detach() for name, x in learner.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return mse_loss(functional_call(learner, parameters, (x,)), y)

    def task(parameters: dict[str, Tensor], x: Tensor, y: Tensor, queries: Tensor, query_values: Tensor) -> Tensor:
        gradients = grad(loss_of)(parameters, x, y)
        adapted = {name: p - INNER_LR * gradients[name] for name, p in parameters.items()}
        return loss_of(adapted, queries, query_values)

    def step(*tasks: Tensor) -> tuple[Tensor, ...]:
        gradients, losses = vmap(grad_and_value(task), in_dims=(None, 0, 0, 0, 0))(start, *tasks)
        return losses.mean(), *(x.mean(0) for x in gradients.values())

    return step


def learn2learn_maml(values: tuple[Tensor, ...]) -> Callable:
    """As its users write it: a clone a task."""
    learner = import_peer("learn2learn.algorithms").MAML(network(values), lr=INNER_LR)
    leaves = list(learner.parameters())

    def step(*tasks: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            losses = []
            for x, y, queries, query_values in zip(*tasks):
                clone = learner.clone()
                clone.adapt(mse_loss(clone(x), y))
                losses.append(mse_loss(clone(queries), query_values))
            loss = torch.stack(losses).mean()
            return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


def _learn2learn() -> Callable:
    import_peer("learn2learn.algorithms")  # said to be missing before it is timed
    return made_once(learn2learn_maml)


# Episodes: from features to accuracy with its interval


def _summary(accuracies: Tensor, num_queries: int, mean: float, half_width: float) -> tuple[Tensor, Tensor]:
    """Right answers of each episode; mean and half width in hundredths of a per cent: integers, which are compared."""
    both = torch.tensor([10_000 * mean, 10_000 * half_width], dtype=torch.float64)
    return (accuracies * num_queries).round().long(), both.round().long()


def fused_evaluation(support, support_labels, queries, query_labels) -> tuple[Tensor, Tensor]:
    classifier = PrototypicalNetwork(nn.Identity())
    episodes = [Episode(support, support_labels, queries, query_labels)]
    found = evaluate_episodes(classifier, episodes, progress=False)
    return _summary(found.accuracies, queries.shape[-2], found.mean, found.half_width)


def _evaluated(scores: Tensor, query_labels: Tensor) -> tuple[Tensor, Tensor]:
    accuracies = (scores.argmax(-1) == query_labels).double().mean(-1)
    return _summary(accuracies, query_labels.shape[-1], *interval(accuracies))


def reference_evaluation(support, support_labels, queries, query_labels) -> tuple[Tensor, Tensor]:
    num_classes = int(support_labels.max()) + 1
    prototypes = fastda.reference.class_means(support, support_labels, num_classes)
    return _evaluated(-fastda.reference.pairwise_distance(queries, prototypes), query_labels)


def careful_evaluation(support, support_labels, queries, query_labels) -> tuple[Tensor, Tensor]:
    """All episodes in one batched product."""
    from .baselines import careful_class_means, careful_logits

    prototypes = careful_class_means(support, support_labels, int(support_labels.max()) + 1)
    return _evaluated(careful_logits(queries, prototypes), query_labels)


def _easyfsl_evaluation() -> Callable:
    """Episode by episode, as its users do."""
    classifier = import_peer("easyfsl.methods").PrototypicalNetworks()

    def evaluate(support, support_labels, queries, query_labels) -> tuple[Tensor, Tensor]:
        scores = []
        for one, labels, asked in zip(support, support_labels, queries):
            classifier.process_support_set(one, labels)
            scores.append(classifier(asked))
        return _evaluated(torch.stack(scores), query_labels)

    return evaluate


# op: its sides by name, each made when it is wanted; the peers among them
SIDES: dict[str, dict[str, Callable[[], Callable]]] = {
    "maml_step": {
        "fused": lambda: made_once(fused_maml),
        "reference": lambda: made_once(looped_maml),
        "careful": lambda: made_once(careful_maml),
        "careful compiled": lambda: made_once(lambda values: torch.compile(careful_maml(values), fullgraph=True)),
        "learn2learn": _learn2learn,
    },
    "evaluated_episodes": {
        "fused": lambda: fused_evaluation,
        "reference": lambda: reference_evaluation,
        "careful": lambda: careful_evaluation,
        "easyfsl": _easyfsl_evaluation,
    },
}
SIDES["compiled_maml_step"] = {
    **SIDES["maml_step"],
    "fused": lambda: made_once(lambda values: fused_maml(values, compile=True)),
}
PEER_SIDES = ("learn2learn", "easyfsl")
