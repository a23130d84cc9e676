from .few_shot_classifier import FewShotClassifier


class PrototypicalNetworks(FewShotClassifier):
    def forward(self, query_images):
        return self.l2_distance_to_prototypes(self.backbone(query_images))
