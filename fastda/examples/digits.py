"""The data of the examples: the two domains of `fastda demo` as loaders, and a network trained in the studio."""

import copy
from functools import cache

import torch
from torch.utils.data import DataLoader, TensorDataset

from fastda.demo.data import make_domains
from fastda.demo.model import DigitNetwork
from fastda.methods import SourceOnly
from fastda.training import fit

DOMAINS = make_domains(seed=0)


def loader(digits, labelled=True, indices=slice(None), batch_size=64):
    tensors = (digits.images[indices], digits.labels[indices]) if labelled else (digits.images[indices],)
    return DataLoader(TensorDataset(*tensors), batch_size, shuffle=True)


def labelled_phone(shots):
    """So many labelled phone images of each digit."""
    labels = DOMAINS.target_train.labels
    return loader(
        DOMAINS.target_train, indices=torch.cat([(labels == digit).nonzero()[:shots, 0] for digit in range(10)])
    )


studio = loader(DOMAINS.source_train)
phone = loader(DOMAINS.target_train, labelled=False)
studio_test, phone_test = loader(DOMAINS.source_test), loader(DOMAINS.target_test)


@cache
def _pretrained():
    torch.manual_seed(0)
    network = DigitNetwork()
    fit(SourceOnly(network.features, network.classifier), studio, epochs=30, lr=0.1)
    return network


def pretrained():
    """A network that knows studio images alone."""
    return copy.deepcopy(_pretrained())
