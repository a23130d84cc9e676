"""Fine-tuning: the layers of real models, what is frozen, how fast each layer learns, and gradual unfreezing."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close
from torchvision_stub import import_timm

from fastda.demo.model import DigitNetwork
from fastda.finetuning import (
    GradualUnfreezing,
    feature_extraction,
    find_layers,
    freeze,
    layerwise_lr_decay,
    set_normalisation,
    unfreeze,
    unfreeze_top,
)
from fastda.methods import DANN, SourceOnly

pytestmark = pytest.mark.usefixtures("one_thread")


def rates(groups) -> dict[str, float]:
    """The rate of each layer, lowest first."""
    return {group["name"]: group["lr"] for group in groups}


def five_layers() -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.ReLU())))


def batch_norms() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Layer-wise rates


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.3, [0.001, 0.0003, 0.00009, 0.000027, 0.0000081]),
        (0.1, [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]),
        (0.5, [1e-3, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]),
        (1.0, [1e-3] * 5),
    ],
)
def test_the_worked_example(decay, expected):
    """Five layers, η = 0.001: with γ = 0.3 layer 1 learns about 123 times slower than layer 5."""
    groups = layerwise_lr_decay(five_layers(), lr=0.001, decay=decay)
    assert list(rates(groups).values())[::-1] == pytest.approx(expected, rel=1e-12, abs=0)
    if decay == 0.3:
        assert round(max(rates(groups).values()) / min(rates(groups).values())) == 123


@given(depth=st.integers(2, 12), lr=st.floats(1e-6, 10), decay=st.floats(0.01, 1))
def test_the_formula(depth, lr, decay):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))
    found = rates(layerwise_lr_decay(model, lr, decay))
    for layer in range(1, depth + 1):
        assert math.isclose(found[str(layer - 1)], lr * decay ** (depth - layer), rel_tol=1e-12)


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    model = batch_norms()
    groups = layerwise_lr_decay(model, 0.1, 0.5, weight_decay=0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        assert all((p.dim() > 1) == (group["weight_decay"] == 0.3) for p in group["params"])
        assert group["weight_decay"] in (0.0, 0.3)


def test_frozen_layers_count():
    model = five_layers()
    whole = rates(layerwise_lr_decay(model, 0.1, 0.5))
    assert rates(layerwise_lr_decay(freeze(model, "0", "2"), 0.1, 0.5)) == whole


def steps_of(optimizer_class, **options) -> dict[str, float]:
    """How far each of five equal layers moves in one step of gradients of 1."""
    model = nn.Sequential(*(copy.deepcopy(layer) for layer in [nn.Linear(4, 4, dtype=torch.float64)] * 5))
    optimizer = optimizer_class(layerwise_lr_decay(model, lr=0.01, decay=0.5), **options)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {}
    for (name, p), old in zip(model.named_parameters(), before):
        moved.setdefault(name.partition(".")[0], (p.detach() - old).abs().max().item())
    return moved


OPTIMIZERS = [
    optimizer
    for name, optimizer in vars(torch.optim).items()
    if inspect.isclass(optimizer)
    and issubclass(optimizer, torch.optim.Optimizer)
    # The class itself; one set of parameters alone; sparse gradients alone; matrices alone.
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.__name__)
def test_rates_take_effect_with_every_torch_optimiser(optimizer):
    """A layer moves half as far as the one above it."""
    options = {"weight_decay": 0.0} if "weight_decay" in inspect.signature(optimizer).parameters else {}
    moved = list(steps_of(optimizer, **options).values())
    assert moved[-1] > 0
    for lower, upper in zip(moved, moved[1:]):
        assert lower == pytest.approx(upper / 2, rel=1e-3)


L = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda optimizer, top: L.StepLR(optimizer, 2),
    "MultiStepLR": lambda optimizer, top: L.MultiStepLR(optimizer, [2, 3]),
    "ConstantLR": lambda optimizer, top: L.ConstantLR(optimizer),
    "LinearLR": lambda optimizer, top: L.LinearLR(optimizer),
    "ExponentialLR": lambda optimizer, top: L.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer, top: L.PolynomialLR(optimizer, 10),
    "LambdaLR": lambda optimizer, top: L.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda optimizer, top: L.MultiplicativeLR(optimizer, lambda step: 0.9),
    "CosineAnnealingLR": lambda optimizer, top: L.CosineAnnealingLR(optimizer, 10),
    "CosineAnnealingWarmRestarts": lambda optimizer, top: L.CosineAnnealingWarmRestarts(optimizer, 4),
    "ReduceLROnPlateau": lambda optimizer, top: L.ReduceLROnPlateau(optimizer, patience=0),
    "CyclicLR": lambda optimizer, top: L.CyclicLR(
        optimizer, [lr / 10 for lr in top], top, step_size_up=2, cycle_momentum=False
    ),
    "OneCycleLR": lambda optimizer, top: L.OneCycleLR(optimizer, top, total_steps=10),
    "SequentialLR": lambda optimizer, top: L.SequentialLR(
        optimizer, [L.LinearLR(optimizer), L.ExponentialLR(optimizer, 0.9)], [2]
    ),
    "ChainedScheduler": lambda optimizer, top: L.ChainedScheduler(
        [L.LinearLR(optimizer), L.ExponentialLR(optimizer, 0.9)]
    ),
}


def test_all_of_torchs_schedulers_are_tried():
    names = {name for name in L.__all__ if name not in ("LRScheduler",)}
    assert names - set(SCHEDULERS) <= {"SWALR"}, "SWALR averages weights: it sets one rate, which is what it is for"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_rates_survive_every_torch_scheduler(scheduler):
    groups = layerwise_lr_decay(five_layers(), lr=0.01, decay=0.5)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    schedule = SCHEDULERS[scheduler](optimizer, [group["lr"] for group in groups])
    seen = set()
    for step in range(6):
        optimizer.step()
        schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        found = list(rates(optimizer.param_groups).values())
        seen.add(round(found[-1], 12))
        for lower, upper in zip(found, found[1:]):
            assert lower == pytest.approx(upper / 2, rel=1e-9)
    assert len(seen) > 1, "the schedule did nothing"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0.0, "decay": 0.5}, "^lr: expected a number > 0"),
        ({"lr": 0.1, "decay": 0.0}, "^decay: expected a number > 0"),
        ({"lr": 0.1, "decay": 1.1}, "^decay: expected a number > 0 and <= 1"),
        ({"lr": 0.1, "decay": 0.5, "weight_decay": -1.0}, "^weight_decay: expected a number >= 0"),
        (
            {"lr": 0.1, "decay": 0.5, "layers": ["0", "2"]},
            "^layers: expected every parameter in a layer, got none for 4.weight",
        ),
        (
            {"lr": 0.1, "decay": 0.5, "layers": ["0", "*"]},
            "^layers: expected each parameter in one layer, got '0.weight'",
        ),
        (
            {"lr": 0.1, "decay": 0.5, "layers": ["no", "*"]},
            "^layers: expected a name or pattern .* got 'no'.*near it are",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        layerwise_lr_decay(five_layers(), **arguments)


# The layers of real models


def table(model: nn.Module, decay: float = 0.5) -> dict[str, int]:
    """Each layer, and how many steps below the top its rate says it is; every parameter is in one layer."""
    groups = layerwise_lr_decay(model, lr=1.0, decay=decay)
    held = sorted(id(p) for group in groups for p in group["params"])
    assert held == sorted({id(p) for p in model.parameters()})
    return {name: round(math.log(lr, decay)) for name, lr in rates(groups).items()}


def steps_down(*names: str) -> dict[str, int]:
    return {name: depth for depth, name in zip(reversed(range(len(names))), names)}


@pytest.fixture(scope="module")
def timm():
    try:
        return import_timm()
    except ImportError as error:
        pytest.skip(f"timm: {error}; pip install --no-deps timm (its torchvision is not needed)")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")


RESNET_18 = ("conv1", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)), "fc")
TIMM = {
    "resnet18": RESNET_18,
    "vit_tiny_patch16_224": ("patch_embed", *(f"blocks.{i}" for i in range(12)), "head"),
    "deit_tiny_distilled_patch16_224": ("patch_embed", *(f"blocks.{i}" for i in range(12)), "head"),
    "regnetx_002": (
        "stem", "s1.b1", "s2.b1", *(f"s3.b{i}" for i in range(1, 5)), *(f"s4.b{i}" for i in range(1, 8)), "head",
    ),
    "mixer_s32_224": ("stem", *(f"blocks.{i}" for i in range(8)), "head"),
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm(timm, name):
    model = timm.create_model(name, pretrained=False, num_classes=3)
    assert table(model) == steps_down(*TIMM[name])


def test_timms_parameters_are_where_they_belong(timm):
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=3)
    layers = {layer.name: set(layer.parameters) for layer in find_layers(vit)}
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight"} <= layers["patch_embed"]
    assert {"norm.weight", "norm.bias"} <= layers["blocks.11"]
    # Embedding γ^(L+1), block i γ^(L−i), head γ⁰, of L = 12 blocks.
    assert table(vit)["patch_embed"] == 13 and table(vit)["blocks.3"] == 9 and table(vit)["head"] == 0
    resnet = timm.create_model("resnet18", pretrained=False, num_classes=3)
    layers = {layer.name: set(layer.parameters) for layer in find_layers(resnet)}
    assert layers["conv1"] == {"conv1.weight", "bn1.weight", "bn1.bias"}
    assert {"layer2.0.downsample.0.weight", "layer2.0.bn2.bias"} <= layers["layer2.0"]


@pytest.mark.parametrize("name", ["convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0", "densenet121"])
def test_no_layer_of_other_timm_models_is_at_one_rate(timm, name):
    """Each block has a rate of its own, the head the full one."""
    model = timm.create_model(name, pretrained=False, num_classes=3)
    found = table(model)
    assert list(found.values()) == list(reversed(range(len(found)))) and len(found) > 10
    blocks = {"convnext_atto": 12, "swin_tiny_patch4_window7_224": 12, "efficientnet_b0": 16, "densenet121": 58}[name]
    kinds = {"convnext_atto": "stages.*.blocks", "swin_tiny_patch4_window7_224": "layers.*.blocks",
             "efficientnet_b0": "blocks.*", "densenet121": "features.denseblock*"}  # fmt: skip
    assert sum(fnmatchcase(layer, f"{kinds[name]}.*") for layer in found) == blocks


SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def hugging_face(transformers, name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """A small model without weights, and its layers."""
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **SMALL))
        blocks = [f"bert.encoder.layer.{i}" for i in range(3)]
        return model, ("bert.embeddings", *blocks, "bert.pooler", "classifier")
    if name == "xlm-roberta":  # its classifier is defined before its encoder
        model = transformers.XLMRobertaForSequenceClassification(transformers.XLMRobertaConfig(vocab_size=50, **SMALL))
        blocks = [f"roberta.encoder.layer.{i}" for i in range(3)]
        return model, ("roberta.embeddings", *blocks, "classifier.dense", "classifier.out_proj")
    if name == "mpnet":  # positions between words are an embedding that all blocks share
        model = transformers.MPNetForSequenceClassification(transformers.MPNetConfig(vocab_size=50, **SMALL))
        blocks = [f"mpnet.encoder.layer.{i}" for i in range(3)]
        return model, ("mpnet.embeddings", *blocks, "classifier.dense", "classifier.out_proj")
    if name == "distilbert":
        config = transformers.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
        blocks = [f"distilbert.transformer.layer.{i}" for i in range(3)]
        model = transformers.DistilBertForSequenceClassification(config)
        return model, ("distilbert.embeddings", *blocks, "pre_classifier", "classifier")
    if name == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=8, **SMALL))
        (stack,) = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 3}
        return model, ("vit.embeddings", *(f"{stack}.{i}" for i in range(3)), "classifier")
    config = transformers.LlamaConfig(vocab_size=50, **SMALL)
    blocks = [f"model.layers.{i}" for i in range(3)]
    return transformers.LlamaForSequenceClassification(config), ("model.embed_tokens", *blocks, "score")


@pytest.mark.parametrize("name", ["bert", "xlm-roberta", "mpnet", "distilbert", "vit", "llama"])
def test_hugging_face(transformers, name):
    model, layers = hugging_face(transformers, name)
    assert table(model) == steps_down(*layers)


def test_two_towers_are_no_layers(transformers):
    configs = {
        "text_config": {"vocab_size": 50, **SMALL},
        "vision_config": {"image_size": 32, "patch_size": 8, **SMALL},
    }
    model = transformers.CLIPModel(transformers.CLIPConfig(**configs))
    with pytest.raises(
        ValueError, match="^model: .* may stand side by side; name them from input to output, as in layers="
    ):
        layerwise_lr_decay(model, 0.1, 0.5)


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)


def with_parameter() -> nn.Module:
    model = five_layers()
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    return model


def module(**children: nn.Module) -> nn.Module:
    parent = nn.Module()
    for name, child in children.items():
        parent.add_module(name, child)
    return parent


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 4), nn.PReLU(), nn.LayerNorm(4), nn.Linear(4, 2)), ("1", "4")),
        (module(backbone=Backbone(), head=nn.Linear(2, 2)), ("backbone.conv1", "backbone.conv2", "head")),
        (nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2)), ("0", "1")),
        (
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
            ("layers.0", "layers.1", "layers.2"),
        ),
        (module(words=nn.Embedding(9, 4), places=nn.Embedding(9, 4), head=nn.Linear(4, 2)), ("words", "head")),
        (module(body=nn.Linear(4, 4), one=nn.Linear(4, 3), other=nn.Linear(4, 2)), ("body", "one")),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 4, 4]), nn.Flatten(), nn.Linear(32, 2)), ("0", "3")),
    ],
    ids=[
        "norms",
        "custom modules",
        "weight norm",
        "torch's transformer",
        "two embeddings",
        "two heads",
        "norm of maps",
    ],
)
def test_plain_pytorch(model, layers):
    assert table(model) == steps_down(*layers)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Linear(2, 2), "there is only one"),
        (nn.ReLU(), "there is none"),
        (with_parameter(), "parameter 'temperature' lies in no layer"),
        (DigitNetwork(), "'classifier' and 'domain_classifier.0' may stand side by side"),
        (
            module(branches=nn.ModuleList([five_layers(), five_layers()]), head=nn.Linear(4, 2)),
            "the parts of 'branches' may",
        ),
        (
            module(head=nn.Linear(4, 2), body=five_layers()),
            "'head' was defined before 'body.0', and may stand above it",
        ),
    ],
    ids=["one layer", "none", "a parameter outside", "a second head", "branches", "the head first"],
)
def test_what_cannot_be_told_apart_is_an_error_that_says_how_to_name_it(model, why):
    with pytest.raises(ValueError, match=f"^model: .*{why}.*; name them from input to output, as in layers="):
        layerwise_lr_decay(model, 0.1, 0.5)


def test_named_layers():
    layers = [
        "features.0",
        ["features.1", "features.3", "features.4"],
        "features.7",
        ["classifier", "domain_classifier"],
    ]
    found = rates(layerwise_lr_decay(DigitNetwork(), 1.0, 0.5, layers=layers))
    assert list(found.values()) == [0.125, 0.25, 0.5, 1.0]
    assert list(find_layers(five_layers(), ["[02].*", "[468]"])[0].parameters) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]


def test_a_domain_classifier_stands_beside_the_label_predictor():
    network = DigitNetwork()
    method = DANN(network.features, network.classifier, network.domain_classifier)
    found = find_layers(method)
    names = [f"feature_extractor.{i}" for i in (0, 3, 7)]
    assert [layer.name for layer in found] == [*names, "label_predictor"]
    assert any("domain_classifier" in name for name in found[-1].parameters)


def test_tied_weights_are_in_the_lowest_layer_alone():
    model = module(words=nn.Embedding(9, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 9))
    model.head.weight = model.words.weight
    found = {layer.name: list(layer.parameters) for layer in find_layers(model)}
    assert found == {"words": ["words.weight"], "body": ["body.weight", "body.bias"], "head": ["head.bias"]}


# Freezing


def test_freeze_by_name_pattern_and_depth():
    model = five_layers()
    assert trainable(freeze(model, "0")) == {f"{i}.{p}" for i in (2, 4, 6, 8) for p in ("weight", "bias")}
    assert trainable(freeze(model, "*.bias")) == {f"{i}.weight" for i in (2, 4, 6, 8)}
    assert trainable(unfreeze(model)) == {name for name, _ in model.named_parameters()}
    assert trainable(freeze(model, depth=4)) == {"8.weight", "8.bias"}
    assert trainable(unfreeze(model, depth=2)) == {"8.weight", "8.bias", "6.weight", "6.bias"}
    assert trainable(freeze(model)) == set()
    assert trainable(unfreeze_top(model, 3)) == {f"{i}.{p}" for i in (4, 6, 8) for p in ("weight", "bias")}
    assert trainable(feature_extraction(model)) == {"8.weight", "8.bias"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: freeze(model, "layer1"), "^layers: expected a name or pattern .* got 'layer1'"),
        (lambda model: freeze(model, depth=6), "^depth: expected at most the number of layers, 5, got 6"),
        (lambda model: freeze(model, "0", depth=1), "^depth: expected names or a depth"),
        (
            lambda model: unfreeze_top(model, 6),
            "^k: expected at most the number of layers, 5, got 6; they are '0', '2'",
        ),
        (
            lambda model: freeze(model, "0", normalisation="eval"),
            "^normalisation: expected one of 'train', 'keep', 'batch'",
        ),
        (lambda model: GradualUnfreezing(model, lr=1.0, start=6), "^start: expected at most the number of layers, 5"),
    ],
)
def test_bad_freezing(call, message):
    model = five_layers()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def train_a_little(model: nn.Module, optimizer=None) -> None:
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(3 + 2 * torch.randn(8, 1, 6, 6)).square().mean().backward()
        optimizer.step()


def test_nothing_of_a_frozen_layer_moves():
    """Neither parameters, nor by weight decay, nor running statistics."""
    model = feature_extraction(batch_norms())
    before = state(model)
    train_a_little(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not name.startswith("6.")), name


INPUTS = 5 + 3 * torch.randn(16, 4, 5, 5)


def batch_normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("choice", ["train", "keep", "batch"])
def test_the_statistics_of_a_norm(choice, training):
    """Which statistics normalise, and whether the running ones follow, also after train() and eval()."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    set_normalisation(model, choice)
    for mode in (not training, training):
        model.train(mode)
    uses_batch = choice == "batch" or (choice == "train" and training)
    assert_close(model[0](INPUTS), batch_normalised(INPUTS) if uses_batch else INPUTS / (1 + 1e-5) ** 0.5)
    moved = not torch.equal(model[0].running_mean, torch.zeros(4)) or int(model[0].num_batches_tracked) > 0
    assert moved == (choice == "train" and training)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("choice", ["keep", "batch"])
def test_a_frozen_norm_is_still_a_batch_norm(choice, duplicate):
    model = duplicate(freeze(batch_norms(), "0", "1", normalisation=choice)).train()
    assert isinstance(model[1], nn.BatchNorm2d) and model[1].training == (choice == "batch")
    assert type(model[4]) is nn.BatchNorm2d and model[4].training
    assert set(model.state_dict()) == set(batch_norms().state_dict())
    unfreeze(model)
    assert type(model[1]) is nn.BatchNorm2d and model[1].training and model[1].track_running_stats
    before = model[1].running_mean.clone()
    model[1](INPUTS)
    assert not torch.equal(model[1].running_mean, before)


def test_choices_can_be_changed():
    norm = nn.BatchNorm1d(2)
    for choice in ("keep", "batch", "keep", "train"):
        set_normalisation(norm, choice)
    assert type(norm) is nn.BatchNorm1d


def test_a_norm_without_parameters_follows_what_holds_it():
    block = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False))
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(64, 2))
    freeze(model, "0").train()
    assert not block[1].training
    unfreeze(model, "0")
    assert block[1].training


def test_timms_norms_are_frozen(timm):
    model = feature_extraction(timm.create_model("efficientnet_b0", pretrained=False, num_classes=3)).train()
    before = state(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert {name for name, value in state(model).items() if not torch.equal(value, before[name])} == set()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_frozen_statistics_compile():
    model = freeze(batch_norms(), "0", "1").train()
    inputs = torch.randn(4, 1, 6, 6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(inputs), model(inputs))
    assert torch.equal(model[1].running_mean, torch.zeros(4))


# Gradual unfreezing


def test_layers_join_from_the_top_at_their_own_rates_and_momenta_stay():
    model = five_layers()
    unfreezing = GradualUnfreezing(model, lr=0.1, decay=0.5, every=2, start=1, weight_decay=0.01)
    optimizer = torch.optim.AdamW(unfreezing.parameter_groups())
    thawed = []
    for epoch in range(10):
        before = {id(p): copy.deepcopy(entry) for p, entry in optimizer.state.items()}
        thawed.append(unfreezing.start_epoch(epoch, optimizer))
        for p, entry in optimizer.state.items():
            for key, value in entry.items():
                assert torch.equal(value, before[id(p)][key])
        learning = {"8", "6", "4", "2", "0"} if epoch >= 8 else {str(8 - 2 * i) for i in range(1 + epoch // 2)}
        assert {name.partition(".")[0] for name in trainable(model)} == learning
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    assert thawed == [[], [], ["6"], [], ["4"], [], ["2"], [], ["0"], []]
    assert rates(optimizer.param_groups) == pytest.approx({"8": 0.1, "6": 0.05, "4": 0.025, "2": 0.0125, "0": 0.00625})


@pytest.mark.parametrize("whole", [True, False], ids=["all groups from the beginning", "groups added"])
@pytest.mark.parametrize(
    "name", ["StepLR", "LambdaLR", "CosineAnnealingLR", "ReduceLROnPlateau", "LinearLR", "OneCycleLR"]
)
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_gradual_unfreezing_under_a_schedule(name, whole):
    """The rates of layers that join later are what they would have been had the layers been there from the
    beginning."""
    unfreezing = GradualUnfreezing(five_layers(), lr=0.1, decay=0.5)
    groups = unfreezing.all_parameter_groups() if whole else unfreezing.parameter_groups()
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer, [group["lr"] for group in groups])
    if name == "OneCycleLR" and not whole:
        with pytest.raises(ValueError, match="^scheduler: expected one that multiplies .*all_parameter_groups"):
            unfreezing.start_epoch(1, optimizer, scheduler)
        return
    for epoch in range(6):
        unfreezing.start_epoch(epoch, optimizer, scheduler)
        optimizer.step()
        found = rates(optimizer.param_groups)
        assert all(lr == pytest.approx(found["8"] * 0.5**depth) for depth, lr in enumerate(found.values()))
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(found) == 5


def test_gradual_unfreezing_resumes():
    def begin():
        torch.manual_seed(0)
        model = five_layers()
        unfreezing = GradualUnfreezing(model, lr=0.1, decay=0.5)
        return model, unfreezing, torch.optim.SGD(unfreezing.parameter_groups(), momentum=0.9)

    def epochs(first, last, model, unfreezing, optimizer):
        for epoch in range(first, last):
            unfreezing.start_epoch(epoch, optimizer)
            torch.manual_seed(epoch)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()

    straight = begin()
    epochs(0, 6, *straight)
    first, second = begin(), begin()
    epochs(0, 3, *first)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict(), second[2])
    second[2].load_state_dict(first[2].state_dict())
    epochs(3, 6, *second)
    assert all(torch.equal(a, b) for a, b in zip(straight[0].parameters(), second[0].parameters()))
    with pytest.raises(ValueError, match="^state: expected 1 to 5 layers"):
        begin()[1].load_state_dict({"num_unfrozen": 6}, straight[2])


def test_method_wrappers_change_no_layer():
    network = DigitNetwork()
    method = SourceOnly(network.features, network.classifier)
    assert list(table(method)) == [*(f"feature_extractor.{i}" for i in (0, 3, 7)), "label_predictor"]
