import torch
from torch import nn


class CorrelationAlignmentLoss(nn.Module):
    def forward(self, f_s, f_t):
        means = (f_s.mean(0) - f_t.mean(0)).square().mean()
        return means + (torch.cov(f_s.T) - torch.cov(f_t.T)).square().mean()
