"""Fine-tune all layers, lower ones more slowly, from twenty labelled phone images of each digit."""

import torch

from fastda.examples.digits import labelled_phone, phone_test, pretrained
from fastda.finetuning import layerwise_lr_decay
from fastda.methods import SourceOnly
from fastda.training import evaluate, fit

network = pretrained()
method = SourceOnly(network.features, network.classifier)
before = evaluate(method, phone_test).accuracy
optimizer = torch.optim.SGD(layerwise_lr_decay(method, lr=0.01, decay=0.5), momentum=0.9)
fit(method, labelled_phone(shots=20), epochs=60, optimizer=optimizer)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
