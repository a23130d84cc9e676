"""No adaptation: what a network that was trained in the studio makes of phone images."""

from fastda.examples.digits import phone_test, pretrained, studio_test
from fastda.methods import SourceOnly
from fastda.training import evaluate

network = pretrained()
method = SourceOnly(network.features, network.classifier)
before = after = evaluate(method, phone_test).accuracy
print(f"right in the studio: {evaluate(method, studio_test).accuracy:.1%}, on phones: {after:.1%}")
