"""Deep CORAL: adapt a pretrained network to phone images without a single label of them."""

from fastda.examples.digits import phone, phone_test, pretrained, studio
from fastda.methods import DeepCORAL
from fastda.training import evaluate, fit

network = pretrained()
method = DeepCORAL(network.features, network.classifier, weight=1000.0)
before = evaluate(method, phone_test).accuracy
fit(method, studio, phone, epochs=25)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
