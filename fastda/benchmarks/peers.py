"""Peers: libraries from the package index, called so that they compute what the op computes.

easyfsl and pytorch-adapt import torchvision for parts that are not used here; where there is none, an empty stand-in
takes its place while they are imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress

import torch
import torch.nn.functional as F
from torch import Tensor


class PeerMissing(Exception):
    """The peer is not installed, or does not import."""


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `torchvision` and everything below it as empty modules, whose attributes are empty classes."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        def empty_class(name: str) -> type:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (), {})

        module.__version__ = "0"
        module.__getattr__ = empty_class


@contextmanager
def torchvision_stand_in() -> Iterator[None]:
    """Within the block `import torchvision` succeeds without torchvision; afterwards it is gone again.

    transformers, which pytorch-adapt imports by way of torchmetrics, asks once whether there is torchvision:
    it is imported before the block.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    if importlib.util.find_spec("transformers") is not None:
        with suppress(Exception):  # what does not import asks nothing; the peer that needs it will say so
            importlib.import_module("transformers")
    finder = _StandIn()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def import_peer(module: str) -> types.ModuleType:
    """Import a peer's module; PeerMissing says what is wrong where that fails."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise PeerMissing(f"{package} is not installed")
    try:
        with torchvision_stand_in(), warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # gym says it is old
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # old libraries fail to import in many ways; which one is recorded
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]  # else a second try would find half of it, and fail or succeed by chance
        raise PeerMissing(f"{package} does not import: {type(error).__name__}: {error}") from error


def _pytorch_adapt_coral() -> Callable[..., Tensor]:
    """Its scale is the paper's and its covariance unbiased; it takes one batch at a time."""
    loss = import_peer("pytorch_adapt.layers").CORALLoss()

    def coral(source: Tensor, target: Tensor) -> Tensor:
        if source.dim() == 2:
            return loss(source, target)
        return torch.stack([loss(s, t) for s, t in zip(source, target)]).mean()

    return coral


def _pytorch_adapt_fork() -> Callable[..., tuple[Tensor, Tensor]]:
    """λ is a buffer of its layer, made beforehand as its users do; the sum is autograd's."""
    reversal = import_peer("pytorch_adapt.layers").GradientReversal

    layers: dict[float, torch.nn.Module] = {}

    def fork(x: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
        if lambd not in layers:
            layers[lambd] = reversal(lambd)
        return x, layers[lambd](x)

    return fork


def _over_episodes(episode: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Peers take one episode at a time."""

    def loss(support, support_labels, queries, query_labels, num_classes) -> Tensor:
        if support.dim() == 2:
            return episode(support, support_labels, queries, query_labels)
        return torch.stack([episode(*one) for one in zip(support, support_labels, queries, query_labels)]).mean()

    return loss


def _easyfsl_means() -> Callable[..., Tensor]:
    means = import_peer("easyfsl.methods.utils").compute_prototypes
    return lambda support, labels, num_classes: means(support, labels)


def _easyfsl_loss() -> Callable[..., Tensor]:
    """Its scores are −‖q − p‖, those of the op −‖q − p‖²."""
    classifier = import_peer("easyfsl.methods").PrototypicalNetworks()

    def episode(support, support_labels, queries, query_labels) -> Tensor:
        classifier.process_support_set(support, support_labels)
        return F.cross_entropy(-classifier(queries).square(), query_labels)

    return _over_episodes(episode)


def _learn2learn_means() -> Callable[..., Tensor]:
    means = import_peer("learn2learn.nn.protonet").compute_prototypes
    return lambda support, labels, num_classes: means(support, labels)


def _learn2learn_loss() -> Callable[..., Tensor]:
    """Its scores are −‖q − p‖², as the op's."""
    classifier = import_peer("learn2learn.nn.protonet").PrototypicalClassifier()

    def episode(support, support_labels, queries, query_labels) -> Tensor:
        classifier.fit_(support, support_labels)
        return F.cross_entropy(classifier(queries), query_labels)

    return _over_episodes(episode)


PEERS: dict[str, dict[str, Callable[[], Callable]]] = {
    "coral_loss": {"pytorch-adapt": _pytorch_adapt_coral},
    "gradient_reversal_fork": {"pytorch-adapt": _pytorch_adapt_fork},
    "class_means": {"easyfsl": _easyfsl_means, "learn2learn": _learn2learn_means},
    "prototypical_loss": {"easyfsl": _easyfsl_loss, "learn2learn": _learn2learn_loss},
}
