"""DANN: the features are trained against a classifier that tells the domains apart."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..nn import DomainDiscriminator, GradientReversal
from ..ops import domain_adversarial_loss, gradient_reversal_fork
from ..reference import checks
from ..schedules import dann_lambda
from .method import Method, Passed, Term, mean, require_module


class DomainAdversarialTerm(Term):
    """The loss of a domain classifier, whose gradient reaches the features reversed and scaled by λ.

    Args:
        domain_classifier: from features to one logit a sample; by default a :class:`fastda.nn.DomainDiscriminator` for
            the number of features that the label predictor takes. With one of these the reversal costs no pass over the
            features.
        lambd: λ, a number or a function of the progress of training; by default the paper's, which rises from 0 to 1.
            Where it is too strong the features collapse: try 0.03 to 0.3 times that (`lambda p: 0.1 * dann_lambda(p)`).
        weight: weight of the whole loss, for the domain classifier and the features alike.
        name: its name in the losses.
    """

    def __init__(
        self,
        domain_classifier: nn.Module | None = None,
        *,
        lambd: float | Callable[[float], float] = dann_lambda,
        weight: float | Callable[[float], float] = 1.0,
        name: str = "domain",
    ) -> None:
        super().__init__(name, weight)
        if domain_classifier is not None:
            require_module("domain_classifier", domain_classifier)
        self.domain_classifier = domain_classifier
        self.reversal = GradientReversal(by_progress=lambd) if callable(lambd) else GradientReversal(lambd)
        self.logits: Tensor | None = None

    def attach(self, method: Method) -> None:
        if self.domain_classifier is None:
            self.domain_classifier = DomainDiscriminator(_num_features(method.label_predictor))

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        if self.reversal.by_progress is not None:
            self.reversal.step(progress)

    def scheduled(self) -> dict[str, Tensor]:
        return super().scheduled() | {f"{self.name}_lambda": self.reversal.lambd}

    def branch(self, features: Tensor) -> Tensor:
        if isinstance(self.domain_classifier, DomainDiscriminator):
            _check_features(features, self.domain_classifier)
            features, self.logits = self.domain_classifier.fork(features, self.reversal.lambd)
        else:
            features, branch = gradient_reversal_fork(features, self.reversal.lambd)
            self.logits = self.domain_classifier(branch)
        return features

    def forward(self, passed: Passed) -> Tensor:
        logits, self.logits = self.logits, None
        sizes = [len(passed.source_features), len(passed.target_features)]
        if logits.shape[:1] != (sum(sizes),) or logits.numel() != sum(sizes):
            raise ValueError(
                f"domain_classifier: expected one logit a sample, {sum(sizes)} in all, got {checks.describe(logits)}; "
                "end it in a layer of one unit, without a sigmoid or softmax"
            )
        source, target = logits.split(sizes)
        if passed.process_group is None:
            return domain_adversarial_loss(source, target)
        source, target = domain_adversarial_loss(source, target, reduction="none")
        means = [mean(losses, losses.numel(), passed.process_group) for losses in (source, target)]
        return sum(means) / 2


class DANN(Method):
    r"""Domain-adversarial training: L = L_y − λ·L_d, the minus sign being a gradient reversal before the domain
    classifier.

    Args:
        feature_extractor, label_predictor: as in :class:`Method`.
        domain_classifier, lambd, weight: as in :class:`DomainAdversarialTerm`.
        options: those of :class:`Method`.

    Source: Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 2016.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from fastda.methods import DANN
        >>> method = DANN(nn.Linear(8, 4), nn.Linear(4, 3))
        >>> method.set_progress(0.5)
        >>> losses = method.losses(torch.randn(6, 8), torch.randint(0, 3, (6,)), torch.randn(5, 8))
        >>> sorted(losses), round(method.scheduled()["domain_lambda"], 3)
        (['domain', 'task'], 0.987)
    """

    def __init__(
        self,
        feature_extractor: nn.Module,
        label_predictor: nn.Module,
        domain_classifier: nn.Module | None = None,
        *,
        lambd: float | Callable[[float], float] = dann_lambda,
        weight: float | Callable[[float], float] = 1.0,
        **options,
    ) -> None:
        term = DomainAdversarialTerm(domain_classifier, lambd=lambd, weight=weight)
        super().__init__(feature_extractor, label_predictor, [term], **options)


def _num_features(label_predictor: nn.Module) -> int:
    linear = next((module for module in label_predictor.modules() if isinstance(module, nn.Linear)), None)
    if linear is None:
        raise ValueError(
            "domain_classifier: expected a module, got None, and the label predictor has no linear layer that would "
            "tell the number of features; pass one, such as fastda.nn.DomainDiscriminator(features)"
        )
    return linear.in_features


def _check_features(features: Tensor, discriminator: DomainDiscriminator) -> None:
    expected = getattr(discriminator[0], "in_features", None)
    if expected is not None and features.shape[1:] != (expected,):
        raise ValueError(
            f"domain_classifier: expected features of shape (samples, {expected}), got {checks.describe(features)}; "
            "flatten or pool them at the end of the feature extractor, or pass a classifier that does"
        )
