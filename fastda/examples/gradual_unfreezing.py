"""Gradual unfreezing: a layer joins every ten epochs, from twenty labelled phone images of each digit."""

from fastda.examples.digits import labelled_phone, phone_test, pretrained
from fastda.finetuning import GradualUnfreezing
from fastda.methods import SourceOnly
from fastda.training import evaluate, fit

network = pretrained()
method = SourceOnly(network.features, network.classifier)
before = evaluate(method, phone_test).accuracy
unfreezing = GradualUnfreezing(method, lr=0.01, decay=0.7, every=10)
fit(method, labelled_phone(shots=20), epochs=60, unfreezing=unfreezing)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
