"""The losses as Modules: each is its function, with the options that it was made with."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import fastda
from fastda.nn import CORALLoss, DomainAdversarialLoss, PrototypicalLoss

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE, TARGET = torch.randn(3, 12, 5), 2 * torch.randn(3, 9, 5)
LABELS = torch.arange(12).expand(3, 12) % 4


@pytest.mark.parametrize(
    "options", [{}, {"scale": "mean", "mean_weight": 1.0}, {"correction": 0, "scale": "sum", "reduction": "none"}]
)
def test_coral(options):
    assert_close(CORALLoss(**options)(SOURCE, TARGET), fastda.reference.coral_loss(SOURCE, TARGET, **options))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_domain_adversarial(reduction):
    logits = SOURCE[..., 0], TARGET[..., 0]
    weights = [torch.rand_like(x) for x in logits]
    expected = fastda.reference.domain_adversarial_loss(
        *logits, source_weight=weights[0], target_weight=weights[1], reduction=reduction
    )
    assert_close(DomainAdversarialLoss(reduction)(*logits, *weights), expected)
    assert_close(DomainAdversarialLoss()(*logits), fastda.reference.domain_adversarial_loss(*logits))


@pytest.mark.parametrize("options", [{}, {"metric": "euclidean", "temperature": 0.5, "reduction": "none"}])
def test_prototypical(options):
    episode = SOURCE, LABELS, TARGET, LABELS[:, :9]
    loss = PrototypicalLoss(4, **options)
    assert_close(loss(*episode), fastda.reference.prototypical_loss(*episode, 4, **options))


def test_a_temperature_that_is_learnt():
    loss = PrototypicalLoss(4, temperature=torch.nn.Parameter(torch.tensor(2.0)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    temperature = torch.tensor(2.0, requires_grad=True)
    episode = SOURCE, LABELS, TARGET, LABELS[:, :9]
    expected = fastda.reference.prototypical_loss(*episode, 4, temperature=temperature)
    (wanted,) = torch.autograd.grad(expected, temperature)
    (found,) = torch.autograd.grad(loss(*episode), loss.temperature)
    assert_close(found, wanted)


@pytest.mark.parametrize("loss", [CORALLoss(scale="mean"), DomainAdversarialLoss("sum"), PrototypicalLoss(4)])
def test_copies(loss):
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(twin) == repr(loss) and not twin.state_dict()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CORALLoss(scale="half"), ValueError, "^scale: expected one of 'paper'"),
        (lambda: CORALLoss(reduction="max"), ValueError, "^reduction: expected one of 'mean'"),
        (lambda: CORALLoss(mean_weight=-1.0), ValueError, "^mean_weight: expected a number >= 0"),
        (lambda: CORALLoss(correction=0.5), TypeError, "^correction: expected an int"),
        (lambda: DomainAdversarialLoss("max"), ValueError, "^reduction: expected one of 'mean'"),
        (lambda: PrototypicalLoss(0), ValueError, "^num_classes: expected at least 1, got 0"),
        (lambda: PrototypicalLoss(4, metric="l1"), ValueError, "^metric: expected one of 'sqeuclidean'"),
        (lambda: PrototypicalLoss(4, temperature=0.0), ValueError, "^temperature: expected a number > 0"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
