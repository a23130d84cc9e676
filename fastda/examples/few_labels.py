"""Adaptation plus fine-tuning: all phone images, of which five of each digit are labelled."""

from fastda.examples.digits import DOMAINS, phone_test, pretrained, studio
from torch.utils.data import DataLoader, TensorDataset

from fastda.methods import DeepCORAL
from fastda.training import PartlyLabelled, evaluate, fit

labels = DOMAINS.target_train.labels
known = [i for digit in range(10) for i in (labels == digit).nonzero()[:5, 0]]
scans = PartlyLabelled(TensorDataset(DOMAINS.target_train.images, labels), known)
network = pretrained()
method = DeepCORAL(network.features, network.classifier, weight=1000.0, target_label_weight=1.0)
before = evaluate(method, phone_test).accuracy
fit(method, studio, DataLoader(scans, batch_size=64, shuffle=True), epochs=25)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
