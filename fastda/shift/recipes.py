"""The code that follows each recommendation, and what it gave where it was measured."""

NETWORK = "feature_extractor, label_predictor: your network; fastda.methods.split takes a model apart"
NEW_HEAD = "feature_extractor: pretrained; label_predictor: its head, or a new nn.Linear with an output for each class"

RECIPES = {
    "none": f"""\
# {NETWORK}; source: a loader of (inputs, labels)
from fastda.methods import SourceOnly
from fastda.training import evaluate

evaluation = evaluate(SourceOnly(feature_extractor, label_predictor), source)
print(evaluation.accuracy, evaluation.confidence)
""",
    "source-only": f"""\
# {NETWORK}; target: a loader of (inputs, labels), or of inputs alone, which give the confidence
from fastda.methods import SourceOnly
from fastda.training import evaluate

evaluation = evaluate(SourceOnly(feature_extractor, label_predictor), target)
print(evaluation.accuracy, evaluation.confidence)
""",
    "reweight": """\
# source_labels, source_probabilities: of source samples that the classifier was not trained on; target_probabilities
from fastda.shift import estimate_label_shift

shift = estimate_label_shift(source_labels, source_probabilities, target_probabilities)
probabilities = shift.correct(target_probabilities)
""",
    "few-shot": """\
# feature_extractor: pretrained; labelled_target: a loader of (inputs, labels); target: a loader of (inputs, ...)
import torch
from fastda.fewshot import PrototypicalNetwork

network = PrototypicalNetwork(feature_extractor)
inputs, labels = map(torch.cat, zip(*labelled_target))
network.fit_support(inputs, labels)
predictions = torch.cat([network.predict(batch[0]) for batch in target])
""",
    "feature-extraction": f"""\
# {NEW_HEAD}
# labelled_target: a loader of (inputs, labels)
from fastda.finetuning import feature_extraction
from fastda.methods import SourceOnly
from fastda.training import fit

method = feature_extraction(SourceOnly(feature_extractor, label_predictor))
fit(method, labelled_target, epochs=60)
""",
    "coral": f"""\
# {NETWORK}
# source: a loader of (inputs, labels); target: a loader of inputs
from fastda.methods import DeepCORAL
from fastda.training import fit

method = DeepCORAL(feature_extractor, label_predictor, weight=1000.0)
fit(method, source, target, epochs=25)
""",
    "dann": f"""\
# {NETWORK}
# source: a loader of (inputs, labels); target: a loader of inputs
from fastda.methods import DANN
from fastda.schedules import dann_lambda
from fastda.training import fit

method = DANN(feature_extractor, label_predictor, lambd=lambda progress: 0.03 * dann_lambda(progress))
fit(method, source, target, epochs=40)
""",
    "top-layers": f"""\
# {NEW_HEAD}
# labelled_target: a loader of (inputs, labels)
import torch
from fastda.finetuning import layerwise_lr_decay, unfreeze_top
from fastda.methods import SourceOnly
from fastda.training import fit

method = unfreeze_top(SourceOnly(feature_extractor, label_predictor), 2)
optimizer = torch.optim.SGD(layerwise_lr_decay(method, lr=0.01, decay=0.5), momentum=0.9, weight_decay=1e-3)
fit(method, labelled_target, epochs=60, optimizer=optimizer)
""",
    "coral+finetune": f"""\
# {NETWORK}
# source: a loader of (inputs, labels); target: the same, its labels -1 where unknown
from fastda.methods import DeepCORAL
from fastda.training import fit

method = DeepCORAL(feature_extractor, label_predictor, weight=1000.0, target_label_weight=1.0)
fit(method, source, target, epochs=25)
""",
    "dann+finetune": f"""\
# {NETWORK}
# source: a loader of (inputs, labels); target: the same, its labels -1 where unknown
from fastda.methods import DANN
from fastda.schedules import dann_lambda
from fastda.training import fit

method = DANN(
    feature_extractor,
    label_predictor,
    lambd=lambda progress: 0.03 * dann_lambda(progress),
    target_label_weight=1.0,
)
fit(method, source, target, epochs=40)
""",
    "finetune": f"""\
# {NEW_HEAD}
# labelled_target: a loader of (inputs, labels)
from fastda.methods import SourceOnly
from fastda.training import fit

method = SourceOnly(feature_extractor, label_predictor)
fit(method, labelled_target, epochs=60, pretraining_lr=0.1)  # learns at a tenth of that
""",
}
"""By method. The first lines name what each needs."""

TEXT_RECIPES = {
    "finetune": """\
# model: a multilingual encoder with a head "classifier", such as
#   transformers.AutoModelForSequenceClassification.from_pretrained("xlm-roberta-base", num_labels=...)
# labelled_target: a loader of (inputs, labels)
import torch
from fastda.finetuning import layerwise_lr_decay
from fastda.methods import SourceOnly, split
from fastda.training import fit

method = SourceOnly(*split(model, "classifier"))
optimizer = torch.optim.AdamW(layerwise_lr_decay(method, lr=2e-5, decay=0.95, weight_decay=0.01))
fit(method, labelled_target, epochs=3, optimizer=optimizer)
""",
}
"""Where text differs."""

DIGITS = "on the digits of `fastda demo`, right on phones (bench/results/strategies/digits.md)"
EVIDENCE = {
    "coral": f"{DIGITS}: 78.7 % before, 92.0 % after, without labels",
    "dann": f"{DIGITS}: 78.7 % before, 89.1 % after, without labels",
    "feature-extraction": f"{DIGITS}: 78.7 % before, 88.8 % with 5 labels a class, 92.0 % with 20",
    "top-layers": f"{DIGITS}: 78.7 % before, 93.2 % with 20 labels a class, 94.8 % with 100",
    "finetune": f"{DIGITS}: 78.7 % before, 94.3 % with 20 labels a class, 95.5 % with 100",
    "coral+finetune": f"{DIGITS}: 78.7 % before, 91.9 % with 5 labels a class, 94.8 % with 20",
    "dann+finetune": f"{DIGITS}: 78.7 % before, 93.2 % with 5 labels a class, 94.8 % with 20",
}
"""What a method gave where it was measured, one shift of many."""
