"""Strategies of adaptation on the digits of `fastda demo`, with k labelled phone images of each digit: does the usual
advice hold?

    python bench/strategies.py --output bench/results/strategies      # about 6 minutes on one core

A network is trained in the studio, then adapted by each strategy for the same number of steps, at the library's
defaults. What is reported is the accuracy on held-out images of both domains: on phones, what adaptation was for; in
the studio, what it cost.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, WeightedRandomSampler
from tqdm import tqdm

from fastda.benchmarks.record import git_revision
from fastda.demo.command import one_thread
from fastda.demo.data import NUM_CLASSES, Digits, Domains, make_domains, photograph, studio_digits
from fastda.demo.model import DigitNetwork
from fastda.files import write_atomically
from fastda.finetuning import GradualUnfreezing, feature_extraction, layerwise_lr_decay, unfreeze_top
from fastda.intervals import interval
from fastda.methods import CORALTerm, DomainAdversarialTerm, Method, SourceOnly
from fastda.schedules import dann_lambda
from fastda.training import PartlyLabelled, evaluate, fit

SHOTS = (1, 5, 20, 100)
EPOCHS, STEPS_PER_EPOCH = 40, 10
PRETRAINING_LR, LR = 0.1, 0.01
BATCH_SIZE = 64
CORAL_WEIGHT, LARGEST_LAMBDA = 1000.0, 0.03  # fastda/demo/train.py tells how they were chosen


@dataclass(frozen=True)
class Data:
    """What a strategy may use: labelled studio images, phone images, and k labelled ones of each digit."""

    source: TensorDataset
    target: TensorDataset
    labelled: TensorDataset | None


Strategy = Callable[[DigitNetwork, Data], Method]


def dataset(digits: Digits) -> TensorDataset:
    return TensorDataset(digits.images, digits.labels)


def loader(data) -> DataLoader:
    return DataLoader(data, min(BATCH_SIZE, len(data)), shuffle=True)


def labelled_images(domains: Domains, shots: int, seed: int) -> TensorDataset:
    """k phone images of each digit. Where there are fewer in the training part, its digits are photographed once
    more."""
    target, (studio, _) = domains.target_train, studio_digits()
    images, labels = [], []
    for digit in range(NUM_CLASSES):
        own = (target.labels == digit).nonzero()[:, 0]
        images.append(target.images[own[:shots]])
        again = shots - len(own)
        if again > 0:
            index = target.index[own][torch.arange(again) % len(own)].numpy()
            pictures = photograph(studio[index], seed=10_000 + 10 * seed + digit)
            images.append(torch.from_numpy(pictures).float().unsqueeze(1))
        labels.append(torch.full((shots,), digit))
    return TensorDataset(torch.cat(images), torch.cat(labels))


def train(method: Method, *loaders, **options) -> Method:
    options = {"epochs": EPOCHS, "steps_per_epoch": STEPS_PER_EPOCH, "lr": LR, "progress": False} | options
    fit(method, *loaders, **options)
    return method


def plain(network: DigitNetwork) -> Method:
    return SourceOnly(network.features, network.classifier)


def nothing(network: DigitNetwork, data: Data) -> Method:
    return plain(network)


def from_scratch(network: DigitNetwork, data: Data) -> Method:
    return train(plain(DigitNetwork()), loader(data.labelled), lr=PRETRAINING_LR)


def feature_extractor(network: DigitNetwork, data: Data) -> Method:
    return train(feature_extraction(plain(network)), loader(data.labelled))


def top_two(network: DigitNetwork, data: Data) -> Method:
    return train(unfreeze_top(plain(network), 2), loader(data.labelled))


def full(network: DigitNetwork, data: Data) -> Method:
    return train(plain(network), loader(data.labelled))


def full_at_pretraining_rate(network: DigitNetwork, data: Data) -> Method:
    return train(plain(network), loader(data.labelled), lr=PRETRAINING_LR)


def layerwise(network: DigitNetwork, data: Data) -> Method:
    method = plain(network)
    optimizer = torch.optim.SGD(layerwise_lr_decay(method, LR, 0.5), momentum=0.9, weight_decay=1e-3)
    return train(method, loader(data.labelled), lr=None, optimizer=optimizer)


def gradual(network: DigitNetwork, data: Data) -> Method:
    method = plain(network)
    unfreezing = GradualUnfreezing(method, lr=LR, decay=0.7, every=EPOCHS // 4)
    return train(method, loader(data.labelled), lr=None, unfreezing=unfreezing)


def with_terms(*terms) -> Strategy:
    """The studio's labels and all phone images; half of each batch of these is labelled, where any are."""

    def strategy(network: DigitNetwork, data: Data) -> Method:
        made = [term() if term is CORAL else term(network) for term in terms]
        method = Method(
            network.features, network.classifier, made, target_label_weight=0.0 if data.labelled is None else 1.0
        )
        if data.labelled is None:
            return train(method, loader(data.source), loader(data.target))
        both = ConcatDataset([data.labelled, PartlyLabelled(data.target, known=[])])
        weights = torch.cat([torch.full((len(part),), 1 / len(part)) for part in both.datasets])
        sampler = WeightedRandomSampler(weights.tolist(), STEPS_PER_EPOCH * BATCH_SIZE)
        return train(method, loader(data.source), DataLoader(both, BATCH_SIZE, sampler=sampler))

    return strategy


def CORAL() -> CORALTerm:
    return CORALTerm(weight=CORAL_WEIGHT)


def adversary(network: DigitNetwork) -> DomainAdversarialTerm:
    return DomainAdversarialTerm(network.domain_classifier, lambd=lambda p: LARGEST_LAMBDA * dann_lambda(p))


WITHOUT_LABELS: dict[str, Strategy] = {
    "nothing": nothing,
    "Deep CORAL": with_terms(CORAL),
    "DANN": with_terms(adversary),
    "Deep CORAL and DANN": with_terms(CORAL, adversary),
}
AT_PRETRAINING_RATE = f"full fine-tuning at {PRETRAINING_LR}, the pretraining rate"
LAYERWISE, GRADUAL = "layer-wise rates, γ = 0.5", "gradual unfreezing, γ = 0.7"
BOTH_LABELS, CORAL_AND_LABELS = "with the studio's labels", "Deep CORAL and labels"
WITH_LABELS: dict[str, Strategy] = {
    "from scratch, at 0.1": from_scratch,
    "feature extraction": feature_extractor,
    "top two layers": top_two,
    "full fine-tuning": full,
    AT_PRETRAINING_RATE: full_at_pretraining_rate,
    LAYERWISE: layerwise,
    GRADUAL: gradual,
    BOTH_LABELS: with_terms(),
    CORAL_AND_LABELS: with_terms(CORAL),
    "DANN and labels": with_terms(adversary),
}

Results = dict[str, dict[str, list[dict[str, float]]]]


def run(seeds: range, shots: tuple[int, ...], progress: Callable[[str], object]) -> Results:
    """Accuracies by strategy and k ("0" for none), one entry a seed."""
    results: Results = {}
    for seed in seeds:
        domains = make_domains(seed)
        source, target = dataset(domains.source_train), dataset(domains.target_train)
        torch.manual_seed(seed)
        pretrained = DigitNetwork()
        fit(plain(pretrained), loader(source), epochs=30, lr=PRETRAINING_LR, progress=False)
        for k, strategies in ((0, WITHOUT_LABELS), *((k, WITH_LABELS) for k in shots)):
            data = Data(source, target, labelled_images(domains, k, seed) if k else None)
            for name, strategy in strategies.items():
                torch.manual_seed(1000 * seed + k)
                method = strategy(copy.deepcopy(pretrained), data)
                found = {
                    "target": evaluate(method, loader(dataset(domains.target_test))).accuracy,
                    "source": evaluate(method, loader(dataset(domains.source_test))).accuracy,
                }
                results.setdefault(name, {}).setdefault(str(k), []).append(found)
                progress(f"seed {seed}, k = {k}, {name}")
    return results


def table(results: Results, quantity: str, shots: list[str]) -> str:
    """Mean ± half the 95 % interval, in %, the best of each column in bold."""

    def values(name: str, k: str) -> tuple[float, float] | None:
        entries = results[name].get(k)
        return interval([100 * entry[quantity] for entry in entries]) if entries else None

    names = [name for name in results if any(k in results[name] for k in shots)]
    best = {k: max(found[0] for name in names if (found := values(name, k))) for k in shots}
    lines = ["| strategy | " + " | ".join(f"k = {k}" if k != "0" else "no label" for k in shots) + " |"]
    lines.append("| --- |" + " ---: |" * len(shots))
    for name in names:
        cells = []
        for k in shots:
            found = values(name, k)
            text = "" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}"
            cells.append(f"**{text}**" if found and found[0] == best[k] else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison(results: Results, one: str, other: str, k: str, quantity: str = "target") -> str:
    """Seed by seed, how much better one strategy is than another, and whether its interval leaves zero out."""
    pairs = zip(results[one][k], results[other][k])
    mean, half = interval([100 * (a[quantity] - b[quantity]) for a, b in pairs])
    verdict = "holds" if mean - half > 0 else "is refuted" if mean + half < 0 else "undecided"
    return f"{mean:+.1f} ± {half:.1f}, {verdict}"


def advice(results: Results, shots: list[str]) -> str:
    """The usual advice as differences, paired by seed."""
    few, many = shots[0], shots[-1]
    extraction, whole = "feature extraction", "full fine-tuning"
    rows = [
        (f"few labels: feature extraction rather than full fine-tuning (k = {few})", extraction, whole, few),
        (f"many labels: full fine-tuning rather than feature extraction (k = {many})", whole, extraction, many),
    ]
    for text, one, other in (
        ("a tenth of the pretraining rate rather than the rate itself", whole, AT_PRETRAINING_RATE),
        ("layer-wise rates rather than one", LAYERWISE, whole),
        ("gradual unfreezing rather than all at once", GRADUAL, whole),
        ("adapt as well as fine-tune, rather than fine-tune", CORAL_AND_LABELS, whole),
        ("align as well as train on the labels of both", CORAL_AND_LABELS, BOTH_LABELS),
    ):
        rows += [(f"{text} (k = {k})", one, other, k) for k in shots]
    lines = ["| advice | phone accuracy, points | studio accuracy, points |", "| --- | ---: | ---: |"]
    for text, one, other, k in rows:
        lines.append(
            f"| {text} | {comparison(results, one, other, k)} | {comparison(results, one, other, k, 'source')} |"
        )
    return "\n".join(lines)


def report(record: dict) -> str:
    """The record in words."""
    results, shots = record["results"], [str(k) for k in record["shots"]]
    seeds = record["seeds"]
    return f"""# Strategies of adaptation on the digits

`python bench/strategies.py`; PyTorch {record["torch"]}, revision {record["revision"]}. Accuracy on held-out images, in
%: mean ± half the 95 % interval (Student t) over {seeds} seeds. The network is trained on 574 studio images; each
strategy then has {EPOCHS * STEPS_PER_EPOCH} steps of SGD with momentum 0.9 at rate {LR} (a tenth of the
{PRETRAINING_LR} of pretraining) unless it says otherwise. “No label”: 573 phone images without labels. With labels: k
of each digit; Deep CORAL, DANN and “with the studio's labels” train on the studio images too, and see all phone images,
half of each batch labelled. There are 46 to 71 phone images of a digit to train on, so for k = 100 the same digits are
photographed a second time, with other light, blur and noise.

## On phones

{table({name: results[name] for name in WITHOUT_LABELS}, "target", ["0"])}

{table({name: results[name] for name in WITH_LABELS}, "target", shots)}

## In the studio afterwards: what is forgotten

{table({name: results[name] for name in WITHOUT_LABELS}, "source", ["0"])}

{table({name: results[name] for name in WITH_LABELS}, "source", shots)}

## Does the usual advice hold here?

Differences are paired by seed. “Holds” and “is refuted” say that the interval leaves zero out, which of so many one or
two do by chance. The shift is one of pixels (light, blur, contrast), where the lowest layers have most to relearn;
shifts of content may come out otherwise.

{advice(results, shots)}
"""


def publish(record: dict, output: Path) -> None:
    """The record, and what it says, written and printed."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(output / "digits.json", lambda file: file.write(text.encode()))
    write_atomically(output / "digits.md", lambda file: file.write(report(record).encode()))
    print(report(record))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("bench/results/strategies"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="write the table of a run that is done already")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS)
    options = parser.parse_args(arguments)
    if options.from_json is not None:
        publish(json.loads(options.from_json.read_text(encoding="utf-8")), options.output)
        return 0
    total = options.seeds * (len(WITHOUT_LABELS) + len(options.shots) * len(WITH_LABELS))
    with one_thread(), tqdm(total=total, unit="run", file=sys.stderr) as bar:

        def progress(doing: str) -> None:
            bar.set_description(doing, refresh=False)
            bar.update()

        results = run(range(options.seeds), tuple(options.shots), progress)
    record = {
        "seeds": options.seeds,
        "shots": list(options.shots),
        "torch": torch.__version__,
        "revision": (git_revision() or {}).get("revision", "unknown")[:12],
        "results": results,
    }
    publish(record, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
