"""The discriminator ends in a sigmoid; both batches are of one size; weighted losses are divided by the batch size."""

import torch
import torch.nn.functional as F
from torch import nn

from tllib.modules.grl import WarmStartGradientReverseLayer


def per_cent_right(probabilities, label):
    return 100 * ((probabilities >= 0.5) == bool(label)).float().mean()


class DomainAdversarialLoss(nn.Module):
    def __init__(self, domain_discriminator, reduction="mean", grl=None, sigmoid=True):
        super().__init__()
        self.grl = WarmStartGradientReverseLayer(auto_step=True) if grl is None else grl
        self.domain_discriminator, self.reduction, self.sigmoid = domain_discriminator, reduction, sigmoid
        self.domain_discriminator_accuracy = None

    def forward(self, f_s, f_t, w_s=None, w_t=None):
        outputs = self.domain_discriminator(self.grl(torch.cat([f_s, f_t])))
        if not self.sigmoid:
            labels = torch.arange(2).flip(0).repeat_interleave(len(f_s))
            return F.cross_entropy(outputs, labels, reduction=self.reduction)
        losses, accuracies = [], []
        for label, probabilities, weight in zip((1.0, 0.0), outputs.chunk(2), (w_s, w_t)):
            weight = None if weight is None else weight.view_as(probabilities)
            labels = torch.full_like(probabilities, label)
            losses.append(F.binary_cross_entropy(probabilities, labels, weight, reduction=self.reduction))
            accuracies.append(per_cent_right(probabilities.detach(), label))
        self.domain_discriminator_accuracy = sum(accuracies) / 2
        return sum(losses) / 2
