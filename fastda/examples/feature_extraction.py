"""Feature extraction: learn a new classifier on frozen features, from twenty labelled phone images of each digit."""

from fastda.examples.digits import labelled_phone, phone_test, pretrained
from fastda.finetuning import feature_extraction
from fastda.methods import SourceOnly
from fastda.training import evaluate, fit

network = pretrained()
method = feature_extraction(SourceOnly(network.features, network.classifier))
before = evaluate(method, phone_test).accuracy
fit(method, labelled_phone(shots=20), epochs=60)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
