import torch


class AbstractMMD(torch.nn.Module):
    def __init__(self, input_shape, num_classes, num_domains, hparams, gaussian):
        super().__init__()
        self.kernel_type = "gaussian" if gaussian else "mean_cov"

    def mmd(self, x, y):
        if self.kernel_type == "mean_cov":
            means = (x.mean(0) - y.mean(0)).square().mean()
            return means + (torch.cov(x.T) - torch.cov(y.T)).square().mean()

        def mean_of_kernel(a, b):
            return sum(torch.exp(-gamma * torch.cdist(a, b).square()).mean() for gamma in (0.1, 1, 10))

        return mean_of_kernel(x, x) + mean_of_kernel(y, y) - 2 * mean_of_kernel(x, y)


class CORAL(AbstractMMD):
    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=False)


class MMD(AbstractMMD):
    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams, gaussian=True)
