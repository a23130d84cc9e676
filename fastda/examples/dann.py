"""DANN: train the features against a domain classifier, without a single label of the phone images."""

from fastda.examples.digits import phone, phone_test, pretrained, studio
from fastda.methods import DANN
from fastda.schedules import dann_lambda
from fastda.training import evaluate, fit

network = pretrained()
method = DANN(network.features, network.classifier, network.domain_classifier, lambd=lambda p: 0.03 * dann_lambda(p))
before = evaluate(method, phone_test).accuracy
fit(method, studio, phone, epochs=40)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
