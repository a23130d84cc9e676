"""What to do about a shift: the field's decision table and its table of scenarios, with reasons and code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..reference import checks
from .recipes import EVIDENCE, RECIPES, TEXT_RECIPES

HANDFUL = 10  # labelled samples a class: below, few-shot methods
SIMILAR_BELOW = 1.0  # proxy A-distance: below, a linear classifier errs on more than a quarter of the samples
KINDS = ("covariate", "label", "concept")
DOMAINS = ("similar", "different")
MODALITIES = ("images", "text", "features")

TITLES = {
    "none": "leave the model as it is",
    "source-only": "the model as it is",
    "reweight": "correct the predictions for the new class frequencies",
    "few-shot": "few-shot classification by prototypes",
    "feature-extraction": "feature extraction: a linear head on frozen features",
    "coral": "unsupervised adaptation with Deep CORAL",
    "dann": "unsupervised adaptation with DANN",
    "top-layers": "fine-tune the top layers, lower ones more slowly",
    "coral+finetune": "Deep CORAL, and the known labels",
    "dann+finetune": "DANN, and the known labels",
    "finetune": "full fine-tuning at a tenth of the pretraining rate",
}
"""All methods, the simplest first."""
ORDER = tuple(TITLES)


@dataclass(frozen=True)
class Scenario:
    """A row of the scenario table.

    Attributes:
        name: "source -> target".
        least, most: labelled target samples in all.
        method: the answer.
        gain: to expect over the model as it is.
        domains, modality, same_task: what the row says about the domains, as arguments of :func:`recommend`.
    """

    name: str
    least: int
    most: float
    method: str
    gain: str
    domains: str
    modality: str = "images"
    same_task: bool = True


SCENARIOS = (
    Scenario("photos -> product photos", 5001, math.inf, "finetune", "high", "similar", same_task=False),
    Scenario("photos -> X-rays", 100, 500, "feature-extraction", "moderate", "different", same_task=False),
    Scenario("photos -> satellite images", 1000, 5000, "top-layers", "moderate to high", "different", same_task=False),
    Scenario("English -> French text", 10_001, math.inf, "finetune", "high", "different", modality="text"),
    Scenario("hospital A -> hospital B", 50, 200, "coral+finetune", "moderate", "different"),
    Scenario("photos -> paintings", 0, 0, "coral", "variable", "different"),
)


@dataclass(frozen=True)
class Step:
    """One thing to try.

    Attributes:
        method, title: as of a :class:`Recommendation`.
        reason: why it is worth trying, or where it stops being enough.
        code: Python that does it.
    """

    method: str
    title: str
    reason: str
    code: str


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why.

    Attributes:
        method: one of `fastda.shift.advice.ORDER`.
        title: the same in words.
        reason: why this and not another.
        gain: to expect over the model as it is: "none", "variable", "moderate", "moderate to high" or "high".
        evidence: what it gave where it was measured; empty where it was not.
        code: Python that does it, given the variables that its first line names.
        steps: the way there, simplest first; the last is this method.
        next_step: what to try where it is not enough, or None.
        disagreement: what the rule by labels a class and the rule by labels in all say where they differ; else empty.
        overfitting: advice where labelled data are few.
    """

    method: str
    title: str
    reason: str
    gain: str
    evidence: str
    code: str
    steps: tuple[Step, ...]
    next_step: Step | None
    disagreement: str
    overfitting: tuple[str, ...]

    def to_dict(self) -> dict:
        """Plain dictionaries, lists and strings, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """All of it as text."""
        lines = [f"recommended: {self.title}", f"  {self.reason}.", f"  gain to expect: {self.gain}."]
        lines += [f"  {self.evidence}."] if self.evidence else []
        lines += [f"  the two rules disagree: {self.disagreement}."] if self.disagreement else []
        return "\n".join([*lines, "", self.how()])

    def how(self) -> str:
        """The way there, simplest first, advice against overfitting, and the code."""
        lines = ["simplest first:"]
        lines += [f"  {number}. {step.title}: {step.reason}" for number, step in enumerate(self.steps, 1)]
        if self.next_step is not None:
            lines.append(f"  if that is not enough: {self.next_step.title}: {self.next_step.reason}")
        if self.overfitting:
            lines += ["", "with so few labels, against overfitting:"] + [f"  - {advice}" for advice in self.overfitting]
        return "\n".join([*lines, "", self.code])

    def __str__(self) -> str:
        return self.table()


def recommend(
    labelled: int = 0,
    unlabelled: int = 0,
    *,
    num_classes: int | None = None,
    domains: str | float | None = None,
    shift=None,
    modality: str = "images",
    same_task: bool = True,
    scenario: str | None = None,
) -> Recommendation:
    """What to do with a model whose data have changed, by the field's rules of thumb.

    By labelled target samples a class: a handful (up to 10), few-shot methods; under 100 and similar domains, feature
    extraction; under 100 and different ones, domain adaptation; 100 to 1000, the top layers with layer-wise decay; over
    1000, full fine-tuning at a tenth of the pretraining rate. None labelled but many unlabelled: unsupervised
    adaptation. By labelled target samples in all, the table :data:`SCENARIOS`. Where the two differ, the simpler goes
    first and `disagreement` says what the other is. What a diagnosis found comes before both: label shift alone needs
    no training, and alignment is no help against concept drift.

    They are rules of thumb, which data of one's own may refute: `bench/results/strategies/digits.md` has a shift on
    which full fine-tuning beats feature extraction with a single label a class.

    Args:
        labelled: target samples with labels, in all.
        unlabelled: target samples without.
        num_classes: needed for the rule by class.
        domains: "similar", "different", or a proxy A-distance from 0 to 2, of which those below 1 are similar; by
            default `shift`'s distance, else "different".
        shift: a :class:`fastda.shift.ShiftReport`, or the kinds of shift, such as `("label",)`; `()` for none.
        modality: "images", "text" or "features".
        same_task: labelled source samples of the target's classes are at hand; False for a pretrained model alone.
        scenario: the name of a row of :data:`SCENARIOS`, which sets `domains`, `modality` and `same_task`.

    Returns:
        A :class:`Recommendation`: print it.

    Raises:
        TypeError, ValueError: counts below 0, unknown options.

    Source: the rules: Yosinski et al., How transferable are features in deep neural networks, NIPS 2014; Howard &
    Ruder, ULMFiT, ACL 2018; Kornblith, Shlens & Le, Do better ImageNet models transfer better, CVPR 2019. That
    aligning the inputs can hurt where class frequencies differ: Zhao et al., On learning invariant representations for
    domain adaptation, ICML 2019.

    Example:
        >>> import fastda
        >>> fastda.recommend(labelled=120, unlabelled=5000, num_classes=2, domains="different").method
        'coral+finetune'
        >>> fastda.recommend(labelled=8000, num_classes=4, domains="similar").title
        'full fine-tuning at a tenth of the pretraining rate'
        >>> fastda.recommend(unlabelled=2000, shift=("label",)).method
        'reweight'
    """
    for name, count in (("labelled", labelled), ("unlabelled", unlabelled)):
        checks.whole_number(name, count, 0)
    if scenario is not None:
        row = {row.name: row for row in SCENARIOS}[checks.option("scenario", scenario, [row.name for row in SCENARIOS])]
        domains, modality, same_task = row.domains, row.modality, row.same_task
    checks.option("modality", modality, MODALITIES)
    kinds, blind = _found(shift)
    if num_classes is None and getattr(getattr(shift, "label_shift", None), "classes", ()):
        num_classes = len(shift.label_shift.classes)
    if num_classes is not None:
        checks.whole_number("num_classes", num_classes, 2)
    if domains is None:
        domains = shift.proxy_a_distance.distance if hasattr(shift, "proxy_a_distance") else "different"
    case = Case(labelled, unlabelled, num_classes, _similarity(domains), kinds, blind, modality, same_task)
    return _answer(case)


@dataclass(frozen=True)
class Case:
    """What the rules look at."""

    labelled: int
    unlabelled: int
    num_classes: int | None
    domains: str
    kinds: tuple[str, ...] | None
    coral_is_blind: bool
    modality: str
    same_task: bool

    @property
    def a_class(self) -> float | None:
        return None if self.num_classes is None else self.labelled / self.num_classes

    @property
    def alignment(self) -> str:
        """Which of the two: CORAL is the simpler."""
        return "dann" if self.coral_is_blind else "coral"

    @property
    def can_align(self) -> bool:
        """There are source labels of the same classes, and what the labels mean has not changed."""
        return self.same_task and "concept" not in (self.kinds or ())


def by_class(case: Case) -> tuple[str, str] | None:
    """Method and reason by the labels a class; None where it is not known how many classes there are."""
    if case.a_class is None:
        return None
    about = f"{case.a_class:.3g} labelled samples a class"
    if case.a_class <= HANDFUL:
        return "few-shot", f"{about} are a handful: too few to train on, enough for a prototype of each"
    if case.a_class < 100:
        if case.domains == "different" and case.can_align:
            return (
                f"{case.alignment}+finetune",
                f"{about} are few and the domains different: align them, and use the labels",
            )
        why = "the domains similar" if case.domains == "similar" else "the source cannot be aligned with the target"
        return "feature-extraction", f"{about} are few and {why}: keep the features, learn a linear head"
    if case.a_class <= 1000:
        return "top-layers", f"{about} are enough for the top layers, whose features are the most specific"
    return "finetune", f"{about} are enough to train all layers"


def by_total(case: Case) -> tuple[str, str, str]:
    """Method, gain and reason by the labels in all."""
    total, about = case.labelled, f"{case.labelled} labelled samples in all"
    full = 10_000 if case.modality == "text" else 5000
    if total > full:
        return "finetune", "high", f"{about} are more than {full}: train all layers"
    if total >= 1000:
        return "top-layers", "moderate to high", f"{about} are between 1000 and {full}: train the top layers"
    if total <= 200 and case.domains == "different" and case.can_align:
        if total >= 50:
            return (
                f"{case.alignment}+finetune",
                "moderate",
                f"{about} are few, but the source has labels: align and fine-tune",
            )
        return "few-shot", "moderate", f"{about} are a handful"
    if total < 50:
        return "few-shot", "moderate", f"{about} are a handful"
    return "feature-extraction", "moderate", f"{about} are under 1000: keep the features, learn a linear head"


def _answer(case: Case) -> Recommendation:
    disagreement, other = "", None
    if case.kinds == ():
        method, gain = "none", "none"
        reason = (
            "no shift was found: what is wrong is not that the data have changed, so look at the labels and the model"
        )
    elif case.kinds == ("label",):
        method, gain = "reweight", "moderate"
        reason = (
            "only the class frequencies have changed: the model is right about each class, and its probabilities need "
            "no more than the new frequencies; to align the domains would make it worse"
        )
    elif case.labelled == 0 and case.unlabelled == 0:
        method, gain = "source-only", "none"
        reason = "there is no target sample to adapt with: collect some, unlabelled ones first, since they are cheap"
    elif case.labelled == 0 and "concept" in (case.kinds or ()):
        method, gain = "source-only", "none"
        reason = "what the labels mean has changed, which unlabelled samples do not show: label some of the target"
    elif case.labelled == 0 and not case.can_align:
        method, gain = "source-only", "none"
        reason = (
            "without labelled source samples of these classes, unlabelled target samples teach nothing: label a few"
        )
    elif case.labelled == 0:
        method, gain = case.alignment, "variable"
        reason = (
            f"no target sample has a label and {case.unlabelled} have none: make the features of both domains alike"
        )
    else:
        one, (method, gain, reason) = by_class(case), by_total(case)
        if one is not None and one[0] != method:
            disagreement = (
                f"by labels a class, {TITLES[one[0]]} ({one[1]}); by labels in all, {TITLES[method]} ({reason}); the "
                "simpler goes first, and the other if it is not enough"
            )
            first, second = sorted([one, (method, reason)], key=lambda answer: ORDER.index(answer[0]))
            (method, reason), other = first, second[0]
        elif one is not None:
            reason = one[1]
    if "concept" in (case.kinds or ()) and case.labelled:
        reason += "; p(y | x) has changed, so that no alignment of inputs helps: labels of the target are what counts"
    if case.kinds is not None and set(case.kinds) >= {"covariate", "label"}:
        reason += (
            "; class frequencies differ too: sample the source by the class weights, or alignment mixes classes up"
        )
    if case.coral_is_blind and method.startswith("dann"):
        reason += "; the covariances agree already, so that CORAL would do nothing"
    return Recommendation(
        method=method,
        title=TITLES[method],
        reason=reason,
        gain=gain,
        evidence=EVIDENCE.get(method, ""),
        code=_code(method, case),
        steps=tuple(_step(name, case) for name in _ladder(method, case)),
        next_step=_next(method, other, case),
        disagreement=disagreement,
        overfitting=_overfitting(method, case),
    )


def _ladder(method: str, case: Case) -> list[str]:
    """The methods to try before, simplest first, and the method."""
    ladder = {"none": [], "source-only": []}.get(method, ["source-only"])
    if method in ("top-layers", "finetune") or (method.endswith("+finetune") and case.a_class is not None):
        ladder.append("feature-extraction")
    if method == "finetune":
        ladder.append("top-layers")
    if method.startswith("dann") and not case.coral_is_blind:
        ladder.append(method.replace("dann", "coral"))
    if case.kinds is not None and set(case.kinds) >= {"covariate", "label"} and case.can_align:
        ladder.insert(1, "reweight")
    return [*ladder, method]


NEXT = {
    "few-shot": "feature-extraction",
    "feature-extraction": "top-layers",
    "coral": "dann",
    "coral+finetune": "dann+finetune",
    "top-layers": "finetune",
}


def _next(method: str, other: str | None, case: Case) -> Step | None:
    follows = other or NEXT.get(method)
    return None if follows is None else _step(follows, case)


REASONS = {
    "none": "it sees what it was trained on",
    "source-only": "what it loses is what there is to win",
    "reweight": "it needs no training",
    "few-shot": "it needs no training either",
    "feature-extraction": "minutes, and hardly anything to overfit with",
    "coral": "one loss to add, and one weight to choose",
    "dann": "it sees more than covariances, and is less stable",
    "top-layers": "what is general in the lower layers stays",
    "coral+finetune": "the labels that are known count beside the source's",
    "dann+finetune": "it sees more than covariances, and is less stable",
    "finetune": "all layers learn the new domain; slow, and the first to overfit",
}


def _step(method: str, case: Case) -> Step:
    return Step(method, TITLES[method], REASONS[method], _code(method, case))


def _code(method: str, case: Case) -> str:
    recipes = RECIPES | TEXT_RECIPES if case.modality == "text" else RECIPES
    return recipes[method]


def _overfitting(method: str, case: Case) -> tuple[str, ...]:
    """Where labelled data are few and something is trained on them."""
    trains = method in ("feature-extraction", "top-layers", "finetune", "coral+finetune", "dann+finetune")
    if not trains or (case.labelled >= 1000 and (case.a_class is None or case.a_class >= 100)):
        return ()
    augmentation = {
        "images": "augmentation: crops, flips and colour jitter that leave the class what it is",
        "text": "augmentation: back-translation, or dropping words",
        "features": "augmentation: a little noise on the features, or mixup",
    }[case.modality]
    return (
        "early stopping: hold out a fifth of the labelled samples, and fit(..., target_validation=..., "
        'select="target_accuracy", patience=5)',
        "weight decay: fit(..., weight_decay=0.01), ten times the default",
        "dropout: nn.Dropout(0.5) before the linear head",
        augmentation,
    )


def _similarity(domains: str | float) -> str:
    if isinstance(domains, str):
        return checks.option("domains", domains, DOMAINS)
    return "similar" if checks.number("domains", domains, least=0, most=2) < SIMILAR_BELOW else "different"


def _found(shift) -> tuple[tuple[str, ...] | None, bool]:
    """The kinds of shift, None where there was no diagnosis, and whether CORAL is blind to it."""
    if shift is None:
        return None, False
    kinds = getattr(shift, "kinds", shift)
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise TypeError(
            f'shift: expected a ShiftReport or kinds such as ("label",), got {checks.describe(shift)}; pass what '
            "diagnose gave"
        )
    for kind in kinds:
        checks.option("shift", kind, KINDS)
    return tuple(kinds), bool(getattr(shift, "coral_is_blind", False))
