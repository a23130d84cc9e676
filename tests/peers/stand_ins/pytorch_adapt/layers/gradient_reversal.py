import torch


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.weight * gradient, None


class GradientReversal(torch.nn.Module):
    def __init__(self, weight=1.0):
        super().__init__()
        self.register_buffer("weight", torch.tensor([weight]))

    def update_weight(self, new_weight):
        self.weight[0] = new_weight

    def forward(self, x):
        return _Reversal.apply(x, self.weight)
