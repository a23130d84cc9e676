"""A small convolutional network for 16×16 digits, and the domain classifier that DANN sets against it."""

from __future__ import annotations

from torch import Tensor, nn

from .data import NUM_CLASSES, SIDE

NUM_FEATURES = 64


class DigitNetwork(nn.Module):
    """`features` ends at the penultimate layer, on which the domains are aligned; `classifier` is the last.

    Both domains of a batch go through one forward pass. GroupNorm rather than BatchNorm, because it treats each image
    by itself: target images reach the network through the adaptation loss alone, not through shared statistics.
    ELU rather than ReLU, because it is smooth: white paper puts whole areas at one value, and where rounding moves that
    across a kink, loss curves that should agree part in one step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=5, stride=2, padding=2),
            nn.GroupNorm(4, 16),
            nn.ELU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ELU(),
            nn.Flatten(),
            nn.Linear(32 * (SIDE // 4) ** 2, NUM_FEATURES),
            nn.ELU(),
        )
        self.classifier = nn.Linear(NUM_FEATURES, NUM_CLASSES)
        self.domain_classifier = nn.Sequential(nn.Linear(NUM_FEATURES, 64), nn.ELU(), nn.Linear(64, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))
