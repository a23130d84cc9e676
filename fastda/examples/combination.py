"""Deep CORAL and DANN together; the weights of the best epoch are kept, chosen without target labels."""

from fastda.examples.digits import phone, phone_test, pretrained, studio
from fastda.methods import CORALTerm, DomainAdversarialTerm, Method
from fastda.schedules import dann_lambda
from fastda.training import evaluate, fit

network = pretrained()
terms = [
    CORALTerm(weight=300.0),
    DomainAdversarialTerm(network.domain_classifier, lambd=lambda p: 0.03 * dann_lambda(p)),
]
method = Method(network.features, network.classifier, terms)
before = evaluate(method, phone_test).accuracy
fit(method, studio, phone, epochs=40, target_validation=phone, select="information_maximisation", patience=10)
after = evaluate(method, phone_test).accuracy
print(f"right on phone images: {before:.1%} before, {after:.1%} after")
