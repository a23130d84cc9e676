"""DomainBed: CORAL, which is its MMD with the kernel "mean_cov".

Left alone: the Gaussian kernel, for which there is no op; DANN, whose gradient penalty differentiates through the
user's discriminator.
"""

from __future__ import annotations

from types import SimpleNamespace

from .. import ops
from .replacement import Replacement, features

KNOWN = "2021 to 2024"


def mmd(original, self, x, y):
    """Mean square of the difference of the covariances, and of the means."""
    if self.kernel_type != "mean_cov" or not features(x, y):
        return original(self, x, y)
    return ops.coral_loss(x, y, scale="mean", mean_weight=1.0)


def _probe(function, normal):
    yield function(SimpleNamespace(kernel_type="mean_cov"), normal(5, 3), 2 * normal(4, 3))


REPLACEMENTS = (
    Replacement("domainbed.algorithms", "AbstractMMD.mmd", "coral_loss", mmd, _probe),
    Replacement("domainbed.algorithms", "AbstractCausIRL.mmd", "coral_loss", mmd, _probe, since="2022"),
)
