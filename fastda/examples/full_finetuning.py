"""Fine-tune all layers at a tenth of the rate of pretraining, from twenty labelled phone images of each digit."""

from fastda.examples.digits import labelled_phone, phone_test, pretrained
from fastda.methods import SourceOnly
from fastda.training import evaluate, fit

network = pretrained()
method = SourceOnly(network.features, network.classifier)
before = evaluate(method, phone_test).accuracy
fit(method, labelled_phone(shots=20), epochs=60)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
