import torch
from torch import nn

from .utils import compute_prototypes


class FewShotClassifier(nn.Module):
    def __init__(self, backbone=None):
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone
        self.prototypes = torch.tensor(())

    def process_support_set(self, support_images, support_labels):
        self.prototypes = compute_prototypes(self.backbone(support_images), support_labels)

    def l2_distance_to_prototypes(self, samples):
        return -torch.cdist(samples, self.prototypes)
