"""Training: what a step does, loaders, schedules, validation and selection, logs, checkpoints, and several
processes."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import fresh
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_in_processes
from processes import run_in_processes
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastda.finetuning import GradualUnfreezing, freeze, layerwise_lr_decay
from fastda.methods import DANN, DeepCORAL, SourceOnly
from fastda.training import (
    VALIDATORS,
    PartlyLabelled,
    evaluate,
    fit,
    information_maximisation,
    negative_entropy,
    predict,
    soft_neighbourhood_density,
)
from fastda.training import checkpoint as checkpoints
from fastda.training.loaders import Stream, share

pytestmark = pytest.mark.usefixtures("one_thread")
TESTS = Path(__file__).resolve().parent


def data(count: int = 48, shift: float = 0.0, labelled: bool = True) -> TensorDataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    inputs = 0.5 * torch.randn(count, 4, generator=generator)
    inputs[:, 0] += labels
    return TensorDataset(inputs + shift, labels) if labelled else TensorDataset(inputs + shift)


def loader(count: int = 48, batch_size: int = 8, **options) -> DataLoader:
    shuffle = options.pop("shuffle", True)
    return DataLoader(data(count, **options), batch_size, shuffle=shuffle)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 3)


def method(**options) -> DeepCORAL:
    return DeepCORAL(*networks(), weight=10.0, **options)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# A step


def test_the_default_is_a_tenth_of_the_pretraining_rate():
    history = fit(SourceOnly(*networks()), loader(), epochs=1).history
    assert history[0]["lr"] == pytest.approx(0.01)
    history = fit(SourceOnly(*networks()), loader(), epochs=1, pretraining_lr=0.5).history
    assert history[0]["lr"] == pytest.approx(0.05)


def test_training_is_a_loop_written_by_hand():
    """SGD with momentum over accumulated, clipped gradients and a schedule of the rate."""
    mine, theirs = method(), method()
    batches = [loader(shuffle=False), loader(40, 10, shift=1.0, labelled=False, shuffle=False)]
    fit(
        mine,
        *batches,
        epochs=2,
        lr=0.1,
        accumulate=2,
        clip_norm=0.3,
        weight_decay=0.01,
        lr_schedule=lambda p: 1 - p / 2,
    )
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in theirs.parameters() if p.dim() > 1], "weight_decay": 0.01},
            {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=0.1,
        momentum=0.9,
    )
    sources, targets = list(batches[0]) * 4, list(batches[1]) * 4
    for step in range(6):
        optimizer.zero_grad()
        for i in (2 * step, 2 * step + 1):
            (sum(theirs.losses(*sources[i], *targets[i]).values()) / 2).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / 12)
        optimizer.step()
    assert_close(weights(mine), weights(theirs))


def test_biases_and_norms_do_not_decay():
    extractor, predictor = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), nn.Linear(8, 3)
    with torch.no_grad():
        for p in (*extractor.parameters(), *predictor.parameters()):
            p.fill_(1.0)
    constant = SourceOnly(extractor, predictor, task_loss=lambda logits, labels: 0 * logits.sum(1))
    fit(constant, loader(), epochs=1, lr=0.1, weight_decay=0.5)
    for name, p in constant.named_parameters():
        assert (p == 1).all() == (p.dim() == 1), name


def test_loaders_of_different_lengths():
    """Each sample of the longer one has its turn in an epoch, the shorter begins again; `steps_per_epoch` is another
    choice."""
    seen = {"source": [], "target": []}

    class Watching(DeepCORAL):
        def losses(self, source, source_labels, target=None, target_labels=None):
            seen["source"].append(source[:, 3]), seen["target"].append(target[:, 3])
            return super().losses(source, source_labels, target, target_labels)

    source, target = loader(24, 8), loader(50, 10, labelled=False)
    result = fit(Watching(*networks()), source, target, epochs=2)
    assert result.steps == 10
    for name, whole, passes in (("source", data(24), 10 * 8 / 24), ("target", data(50), 2)):
        values, counts = torch.cat(seen[name]).unique(return_counts=True)
        assert torch.equal(values, whole.tensors[0][:, 3].unique())
        assert set(counts.tolist()) <= {math.floor(passes), math.ceil(passes)}
    assert fit(method(), source, target, epochs=3, steps_per_epoch=2).steps == 6


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_learns_and_keeps_float32_weights(precision):
    mixed, single = method(), method()
    for model, name in ((mixed, precision), (single, "float32")):
        torch.manual_seed(1)
        result = fit(model, loader(), loader(labelled=False), epochs=20, lr=0.1, precision=name)
        assert evaluate(model, loader(), precision=name).accuracy > 0.7
    assert all(p.dtype == torch.float32 for p in mixed.parameters()) and math.isfinite(result.history[-1]["loss"])
    difference = max((a - b).norm() / b.norm() for a, b in zip(mixed.parameters(), single.parameters()))
    assert 0 < difference < 0.25


def test_compiled_networks_train_alike():
    """Each network in one graph, with a layer of its own that is watched; afterwards they are as before."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph.forward

    eager, compiled = (method(layers=["feature_extractor.0", "feature_extractor"]) for _ in range(2))
    for model, options in ((eager, False), (compiled, {"backend": backend, "fullgraph": True})):
        torch.manual_seed(1)
        fit(model, loader(), loader(labelled=False), epochs=2, compile=options)
    assert_close(weights(compiled), weights(eager))
    assert [len(graph) for graph in graphs] == [2, 1], "linear and tanh; linear"
    assert_close(compiled(data()[:][0]), eager(data()[:][0]))
    assert len(graphs) == 2


def test_frozen_norms_stay_frozen_in_training():
    torch.manual_seed(0)
    model = SourceOnly(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    freeze(model, "feature_extractor")
    before = weights(model)
    fit(model, loader(), epochs=2, source_validation=loader())
    moved = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved == {"label_predictor.weight", "label_predictor.bias"}


def test_layers_thaw_epoch_by_epoch_under_a_schedule():
    model, rows = SourceOnly(*networks()), []
    unfreezing = GradualUnfreezing(model, lr=0.1, decay=0.5)
    counts = []
    fit(
        model,
        loader(),
        epochs=3,
        unfreezing=unfreezing,
        lr_schedule=lambda p: 1 - p,
        on_row=lambda row: (rows.append(row), counts.append(sum(p.requires_grad for p in model.parameters()))),
    )
    assert counts == [2, 4, 4]
    assert rows[-1]["lr"] == pytest.approx(0.1 * (1 - 17 / 18))


def test_torch_schedulers():
    for scheduler, every, expected in (
        (lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), "epoch", 0.1 * 0.5**2),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=20), "step", None),
        (lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, mode="min", patience=0, threshold=10), "epoch", 0.001),
    ):
        model = SourceOnly(*networks())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedule = scheduler(optimizer)
        history = fit(model, loader(), epochs=3, optimizer=optimizer, scheduler=schedule, scheduler_every=every).history
        assert len({row["lr"] for row in history}) > 1
        if expected:
            assert history[-1]["lr"] == pytest.approx(expected)


# Validation and selection


def test_evaluate():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, -100])
    result = evaluate(nn.Identity(), DataLoader(TensorDataset(logits, labels), 3))
    assert result.accuracy == pytest.approx(2 / 3) and (result.num_samples, result.num_labelled) == (4, 3)
    assert result.class_accuracy[:2] == [1.0, 0.5] and math.isnan(result.class_accuracy[2])
    confidence = logits.softmax(1).amax(1)
    assert result.confidence == pytest.approx(confidence.mean().item(), rel=1e-6)
    assert result.class_confidence[0] == pytest.approx(confidence[[0, 2]].mean().item(), rel=1e-6)
    assert result.loss == pytest.approx(F.cross_entropy(logits[:3], labels[:3]).item(), rel=1e-6)
    unlabelled = evaluate(nn.Identity(), DataLoader(TensorDataset(logits), 3))
    assert math.isnan(unlabelled.accuracy) and unlabelled.confidence == result.confidence


def test_evaluation_leaves_modes_and_generators_alone():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    before, state, python = weights(model), torch.get_rng_state(), random.getstate()
    predict(model, loader())
    assert [m.training for m in model] == [True, False, True] and model.training
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert_close(weights(model), before, rtol=0, atol=0)


def test_validation_does_not_change_training():
    with_it, without = method(), method()
    for model, options in ((with_it, {"source_validation": loader(), "target_validation": loader()}), (without, {})):
        torch.manual_seed(1)
        fit(model, loader(), loader(labelled=False), epochs=3, **options)
    assert_close(weights(with_it), weights(without), rtol=0, atol=0)


def test_validators_against_their_formulas():
    logits = 2 * torch.randn(40, 5, dtype=torch.float64)
    p = logits.softmax(1)
    entropies = torch.distributions.Categorical(p).entropy()
    assert negative_entropy(logits) == pytest.approx(-entropies.mean().item())
    mean_entropy = torch.distributions.Categorical(p.mean(0)).entropy()
    assert information_maximisation(logits) == pytest.approx((mean_entropy - entropies.mean()).item())
    unit = p / p.norm(dim=1, keepdim=True)
    neighbours = (unit @ unit.T / 0.05)[~torch.eye(40, dtype=torch.bool)].view(40, 39).softmax(1)
    expected = torch.distributions.Categorical(neighbours).entropy().mean().item()
    assert soft_neighbourhood_density(logits) == pytest.approx(expected)


def test_density_in_pieces_is_the_same(monkeypatch):
    logits = torch.randn(50, 3)
    whole = soft_neighbourhood_density(logits)
    monkeypatch.setattr("fastda.training.validators.CHUNK", 7 * 50)
    assert soft_neighbourhood_density(logits) == pytest.approx(whole, rel=1e-12)


def test_certain_predictions_are_finite():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert negative_entropy(logits) == 0 and information_maximisation(logits) == pytest.approx(math.log(2))
    assert soft_neighbourhood_density(logits) == 0


@pytest.mark.parametrize("select", VALIDATORS)
def test_the_best_epoch_is_kept(select):
    """At a rate so high that epochs differ; the weights are those of the selected row."""
    model = method()
    validation = {"source_validation": loader(33), "target_validation": loader(39, shift=0.5)}
    result = fit(model, loader(), loader(labelled=False), epochs=6, lr=3.0, clip_norm=None, select=select, **validation)
    scores = [row[select] for row in result.history]
    assert result.best[select] == max(scores) and result.best == result.history[scores.index(max(scores))]
    assert result.best["target_loss"] == pytest.approx(evaluate(model, validation["target_validation"]).loss, rel=1e-5)


def test_early_stopping():
    result = fit(
        SourceOnly(*networks()),
        loader(),
        epochs=50,
        lr=1e-12,
        source_validation=loader(),
        select="source_accuracy",
        patience=3,
    )
    assert result.stopped_early and len(result.history) == 4 and result.best["epoch"] == 1


# Logs


def test_csv_and_json_lines(tmp_path):
    options = {"epochs": 2, "log_every": 4, "source_validation": loader()}
    torch.manual_seed(1)
    result = fit(DANN(*networks()), loader(), loader(labelled=False), log=tmp_path / "log.csv", **options)
    torch.manual_seed(1)
    fit(DANN(*networks()), loader(), loader(labelled=False), log=tmp_path / "log.jsonl", **options)
    with open(tmp_path / "log.csv", newline="") as file:
        table = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert table == result.history and len(table) == 4
    assert set(table[-1]) == {"step", "epoch", "loss", "task", "domain", "lr", "domain_weight", "domain_lambda",
                              "source_accuracy", "source_confidence", "source_loss"}  # fmt: skip
    assert [row["step"] for row in lines] == [4, 6, 8, 12]
    for row in table:
        assert row["loss"] == pytest.approx(row["task"] + row["domain"])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = fit(SourceOnly(*networks()), loader(), epochs=3, tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.step for e in events.Scalars("task")] == [row["step"] for row in result.history]
    assert [e.value for e in events.Scalars("task")] == pytest.approx([row["task"] for row in result.history])


def test_absent_tensorboard_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match="^tensorboard: .*pip install tensorboard"):
        fit(SourceOnly(*networks()), loader(), epochs=1, tensorboard=tmp_path)


def test_a_loss_that_is_not_finite_is_an_error_and_the_checkpoint_is_from_before(tmp_path):
    class Bad(SourceOnly):
        def losses(self, *batch):
            losses = super().losses(*batch)
            return losses if self.steps_left() else {"task": losses["task"] * math.nan}

        def steps_left(self):
            self.count = getattr(self, "count", 0) + 1
            return self.count <= 9

    model = Bad(*networks())
    with pytest.raises(FloatingPointError, match="^(loss|task): not finite .nan. within steps 9 to 10; lower the rate"):
        fit(model, loader(), epochs=3, checkpoint=tmp_path / "c.pt", log_every=8, checkpoint_every=1)
    state = checkpoints.load(tmp_path / "c.pt")
    assert state["step"] == 9 and all(value.isfinite().all() for value in state["method"].values())


def test_weights_that_are_not_finite_are_never_in_a_checkpoint(tmp_path):
    """Losses may be finite to the last while a gradient is not."""

    class Root(nn.Module):
        def forward(self, x):
            return x + 0 * (x.sum() - x.sum().detach()).clamp(min=0).sqrt()  # 0, with an infinite derivative

    model = SourceOnly(nn.Sequential(nn.Linear(4, 8), Root()), nn.Linear(8, 3))
    with pytest.raises(
        FloatingPointError, match="^feature_extractor.0.weight: weights that are not finite after step 1"
    ):
        fit(model, loader(), epochs=1, steps_per_epoch=1, checkpoint=tmp_path / "c.pt")
    assert not list(tmp_path.iterdir())


# Checkpoints


def run_program(*arguments: str, **options) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS, timeout=300, **options)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_nothing_is_lost(tmp_path, kills):
    """Weights and log are to the bit those of the run that was left alone."""
    seed = random.randrange(10**6)
    run = fresh.python(TESTS / "training_to_kill.py", tmp_path, kills, seed, cwd=TESTS)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["resumed"] >= kills // 2 and found["same"], f"seed {seed}: {found}"


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_within_a_pass_whatever_draws_the_order(tmp_path, workers):
    """Also with workers, and where both loaders share a generator."""

    def begin():
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        generator = torch.Generator().manual_seed(1)
        options = {"shuffle": True, "generator": generator, "num_workers": workers}
        return method(), DataLoader(data(), 8, **options), DataLoader(data(30, labelled=False), 7, **options)

    straight = begin()
    fit(*straight, epochs=3)

    class Stop(Exception): ...

    def stop(row):
        if row["step"] == 11:
            raise Stop

    with pytest.raises(Stop):
        fit(*begin(), epochs=3, checkpoint=tmp_path / "c.pt", checkpoint_every=5, log_every=1, on_row=stop)
    second = begin()
    torch.manual_seed(99)
    result = fit(*second, epochs=3, checkpoint=tmp_path / "c.pt", checkpoint_every=5, log_every=1)
    assert [row["step"] for row in result.history] == list(range(1, 19))
    assert_close(weights(second[0]), weights(straight[0]), rtol=0, atol=0)


def test_a_finished_training_is_not_trained_again(tmp_path):
    options = {"epochs": 4, "lr": 3.0, "clip_norm": None, "source_validation": loader(), "select": "source_accuracy"}
    first, second = method(), method()
    result = fit(first, loader(), loader(labelled=False), checkpoint=tmp_path / "c.pt", **options)
    rows = []
    again = fit(second, loader(), loader(labelled=False), checkpoint=tmp_path / "c.pt", on_row=rows.append, **options)
    assert again == result and not rows
    assert_close(weights(second), weights(first), rtol=0, atol=0)
    options |= {"resume": False, "on_row": rows.append}
    fit(method(), loader(), loader(labelled=False), checkpoint=tmp_path / "c.pt", **options)
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"epochs": 3}, "epochs 2, where now it is 3"),
        ({"accumulate": 2}, "steps_per_epoch 6, where now it is 3"),
        ({"optimizer": lambda m: torch.optim.AdamW(m.parameters())}, "optimizer 'SGD', where now it is 'AdamW'"),
        ({"lr": 0.02}, "lr 0.01, where now it is 0.02"),
        ({"width": 9}, "weights other layers or shapes"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, name):
    def go(optimizer=None, width=8, **options):
        model = SourceOnly(nn.Linear(4, width), nn.Linear(width, 3))
        options = {"epochs": 2, "optimizer": optimizer and optimizer(model), "checkpoint": tmp_path / "c.pt"} | options
        fit(model, loader(), **options)

    go()
    with pytest.raises(ValueError, match=f"^checkpoint: .*{name}.*resume=False"):
        go(**change)


def test_checkpoints_are_atomic_and_are_not_unpickled(tmp_path, monkeypatch):
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"step": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        checkpoints.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoints.load(path) == {"format": checkpoints.FORMAT, "step": 1} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError, match=r"^checkpoint: .*a object at checkpoint\['scheduler'\]\['f'\]"):
        checkpoints.save(path, {"scheduler": {"f": object()}})
    torch.save({"format": checkpoints.FORMAT, "code": print}, path)
    with pytest.raises(Exception, match="weights_only|Unsupported"):
        checkpoints.load(path)
    torch.save({"step": 1}, path)
    with pytest.raises(ValueError, match="^checkpoint: expected one of fastda's of format"):
        checkpoints.load(path)
    for content in (b"", b"no checkpoint", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="^checkpoint: expected one of fastda's, got .* which cannot be read"):
            checkpoints.load(path)


def test_more_patience_goes_on_where_less_had_stopped(tmp_path):
    def go(patience):
        options = {"epochs": 6, "lr": 1e-12, "source_validation": loader(), "select": "source_accuracy"}
        return fit(SourceOnly(*networks()), loader(), checkpoint=tmp_path / "c.pt", patience=patience, **options)

    assert go(2).stopped_early
    result = go(4)
    assert result.stopped_early and len(result.history) == 5
    assert not go(9).stopped_early


def test_a_log_that_does_not_go_with_the_checkpoint_is_refused(tmp_path):
    def go():
        fit(SourceOnly(*networks()), loader(), epochs=2, checkpoint=tmp_path / "c.pt", log=tmp_path / "log.csv")

    go()
    (tmp_path / "log.csv").unlink()
    with pytest.raises(ValueError, match="^log: expected the file that the checkpoint goes with"):
        go()


# Several processes


@pytest.mark.parametrize("torchrun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one_with_batches_twice_as_large(tmp_path, torchrun):
    """Task, target task, CORAL and domain losses, step by step, and the weights, to 1e-5."""
    if torchrun:
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run_program(*run, training_in_processes.__file__, str(tmp_path / "two"), "8")
    else:  # the same without torchrun's own time and without importing PyTorch anew in each process
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        run_in_processes(training_in_processes.on_process, 2, port, str(tmp_path / "two"), 8, count=2)
    one = training_in_processes.train(16, str(tmp_path / "one.checkpoint"))
    for rank in (0, 1):
        two = torch.load(tmp_path / f"two.{rank}", weights_only=True)
        assert len(two["history"]) == len(one["history"]) == 12
        for mine, theirs in zip(two["history"], one["history"]):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert_close(two["weights"], one["weights"], rtol=1e-5, atol=1e-5)
        assert_close(two["again"], two["weights"], rtol=0, atol=0)
    assert {"task", "target_task", "coral", "domain"} <= one["history"][0].keys()


@pytest.mark.parametrize("shuffle", [True, False])
def test_processes_divide_the_batches(shuffle):
    """Together they read what one would, in each pass another order; drawn from one seed, so that they agree."""
    whole = DataLoader(torch.arange(50), 4, shuffle=shuffle)  # 13 batches: the last has no partners, and is left out
    orders = []
    for epoch in (0, 1):
        shares = [share("source", whole, rank, 3, seed=7) for rank in range(3)]
        for part in shares:
            part.batch_sampler.set_epoch(epoch)
        batches = [batch for turn in zip(*shares) for batch in turn]
        values = torch.cat(batches)
        assert len(batches) == 12 and len(values.unique()) == len(values) == 48
        orders.append(values.tolist())
    assert (orders[0] == list(range(48))) == (not shuffle)
    assert (orders[0] != orders[1]) == shuffle


def test_what_cannot_be_divided_is_named():
    class Endless(IterableDataset):
        def __iter__(self):
            yield from torch.zeros(8, 2)

    with pytest.raises(ValueError, match="^source: expected a DataLoader over a map-style .*divide_loaders=False"):
        share("source", DataLoader(Endless(), 2), 0, 2, 0)
    with pytest.raises(ValueError, match="^target: expected at least one batch for each of the 2 processes, got 1"):
        share("target", DataLoader(torch.arange(4), 4), 0, 2, 0)
    sampler = torch.utils.data.DistributedSampler(torch.arange(8), num_replicas=2, rank=0)
    divided = DataLoader(torch.arange(8), 2, sampler=sampler)
    assert share("source", divided, 0, 2, 0) is divided


def test_a_distributed_sampler_draws_anew_in_each_pass():
    sampler = torch.utils.data.DistributedSampler(torch.arange(64), num_replicas=2, rank=0)
    stream = Stream("source", DataLoader(torch.arange(64), 16, sampler=sampler))
    first, second = ([stream.next().tolist() for _ in range(2)] for _ in range(2))
    assert first != second


# Data of other kinds


def test_dictionaries_and_partly_labelled_data():
    inputs, labels = data().tensors

    class Scans(torch.utils.data.Dataset):
        def __len__(self):
            return 48

        def __getitem__(self, index):
            return {"input": inputs[index], "labels": labels[index]}

    extractor, predictor = networks()
    known = PartlyLabelled(data(30, shift=1.0), known=range(9))
    model = DeepCORAL(extractor[0], predictor, weight=10.0, target_label_weight=1.0)
    source = DataLoader(Scans(), 8)
    target = DataLoader(known, 10, collate_fn=lambda samples: ({"input": torch.stack([x for x, _ in samples])},
                                                                torch.stack([y for _, y in samples])))  # fmt: skip
    history = fit(model, source, target, epochs=2).history
    assert history[0]["target_task"] > history[-1]["target_task"] > 0
    assert evaluate(model, source).num_labelled == 48 and evaluate(model, target).num_labelled == 9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "^epochs: expected at least 1, got 0"),
        ({"lr": -1.0}, ValueError, "^lr: expected a number > 0"),
        ({"precision": "int8"}, ValueError, "^precision: expected one of"),
        ({"target": None}, ValueError, "^target: expected a loader, since DeepCORAL adapts to it"),
        ({"select": "accuracy"}, ValueError, "^select: expected one of 'source_accuracy', 'target_accuracy'"),
        ({"validators": "accuracy"}, ValueError, "^validators: expected one of 'source_accuracy'"),
        ({"select": "snd"}, ValueError, "^target_validation: expected a loader, which 'snd' is computed from"),
        ({"patience": 2}, ValueError, "^select: expected a validator that patience goes by"),
        ({"checkpoint_every": 2}, ValueError, "^checkpoint: expected a file"),
        ({"checkpoint": "/no/such/folder/c.pt"}, ValueError, "^checkpoint: expected a file in a folder that exists"),
        ({"log": "log.txt"}, ValueError, "^log: expected a file that ends in .csv or .jsonl"),
        (
            {"source": loader(labelled=False)},
            ValueError,
            r"^source: expected batches of \(inputs, labels\), got inputs alone",
        ),
        ({"source": []}, ValueError, "^source: expected a loader with at least one batch.*drop_last=False"),
        ({"source_validation": []}, ValueError, "^source_validation: expected a loader with at least one batch"),
        ({"source": data()}, TypeError, "^source: expected a loader of batches, got TensorDataset; wrap .*DataLoader"),
        ({"target": "files"}, TypeError, "^target: expected a loader of batches, got str"),
        ({"source": loader(41)}, ValueError, "^source: expected batches of at least 2 samples.*1; pass drop_last=True"),
        ({"method": nn.Linear(2, 2)}, TypeError, "^method: expected one of fastda.methods"),
        ({"lr": 0.1, "pretraining_lr": 0.1}, ValueError, "^lr: expected one of lr and pretraining_lr, got both"),
        ({"lr_schedule": 0.5}, TypeError, "^lr_schedule: expected a function, got 0.5"),
        ({"lr_schedule": lambda p: -p - 1}, ValueError, "^lr_schedule at progress 0: expected a number >= 0, got -1"),
        ({"on_row": 1}, TypeError, "^on_row: expected a function"),
        ({"compile": "max-autotune"}, TypeError, "^compile: expected a dictionary .* such as {'mode': 'max-autotune'}"),
        ({"device": "gpu"}, ValueError, "^device: expected 'cpu', 'cuda', 'cuda:1' or alike, got 'gpu'"),
        ({"checkpoint": "."}, ValueError, "^checkpoint: expected a file .*; name a file in it"),
        ({"optimizer": torch.optim.SGD}, TypeError, "^optimizer: expected a torch.optim.Optimizer, got <class"),
        (
            {"optimizer": torch.optim.LBFGS(nn.Linear(2, 2).parameters())},
            ValueError,
            "^optimizer: expected one that steps on the gradients at hand, got LBFGS",
        ),
        (
            {"unfreezing": GradualUnfreezing(method(), lr=0.1)},
            ValueError,
            "^unfreezing: expected all parameters of the method that learn, got none of feature_extractor.0.weight",
        ),
        (
            {"target": DataLoader(TensorDataset(torch.zeros(8, 4), torch.zeros(8), torch.zeros(8)), 4)},
            ValueError,
            r"^target: expected batches of \(inputs, labels\), got 3 entries",
        ),
    ],
)
def test_errors_say_what_to_do(options, error, message):
    arguments = {"method": method(), "source": loader(), "target": loader(labelled=False), "epochs": 1} | options
    with pytest.raises(error, match=message):
        fit(arguments.pop("method"), arguments.pop("source"), arguments.pop("target"), **arguments)


def test_arguments_without_effect_are_errors():
    model = SourceOnly(*networks())
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    for name, value in {"lr": 0.1, "pretraining_lr": 0.1, "weight_decay": 0.1}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected one of {name} and optimizer, got both"):
            fit(model, loader(), epochs=1, optimizer=optimizer, **{name: value})
    with pytest.raises(ValueError, match="^scheduler: expected one of the optimizer given, got one of another"):
        fit(model, loader(), epochs=1, optimizer=optimizer, scheduler=torch.optim.lr_scheduler.StepLR(other, 1))
    with pytest.raises(ValueError, match="^method: expected parameters that learn, got none, all are frozen"):
        fit(freeze(model), loader(), epochs=1)


def test_what_can_be_read_only_once_is_named():
    batches = (batch for batch in loader())
    with pytest.raises(ValueError, match="^source: expected a loader that can be read again, got no batch in pass 2"):
        fit(SourceOnly(*networks()), batches, epochs=2, steps_per_epoch=5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integers(dtype):
    inputs, labels = data().tensors
    batches = DataLoader(TensorDataset(inputs, labels.to(dtype)), 8)
    assert fit(SourceOnly(*networks()), batches, epochs=1).steps == 6
    found, expected = (evaluate(SourceOnly(*networks()), each) for each in (batches, DataLoader(data(), 8)))
    assert found.class_accuracy == expected.class_accuracy and found.loss == expected.loss


def test_labels_that_fit_no_class_are_named():
    inputs, labels = data().tensors
    with pytest.raises(IndexError, match="^source_labels: expected classes below 3, the number of logits, got 4"):
        fit(SourceOnly(*networks()), DataLoader(TensorDataset(inputs, 2 * labels), 8), epochs=1)
    with pytest.raises(ValueError, match=r"^source_labels: expected \(8,\), one label a sample, got .*\(8, 1\)"):
        fit(SourceOnly(*networks()), DataLoader(TensorDataset(inputs, labels[:, None]), 8), epochs=1)
    with pytest.raises(IndexError, match="^labels: expected classes below 3"):
        evaluate(SourceOnly(*networks()), DataLoader(TensorDataset(inputs, 2 * labels), 8))
    with pytest.raises(ValueError, match="^labels: expected shape"):
        evaluate(SourceOnly(*networks()), DataLoader(TensorDataset(inputs, labels[:, None]), 8))


def test_known_labels_by_index_or_by_mask():
    mask = torch.zeros(30, dtype=torch.bool)
    mask[[3, 4]] = True
    for known in ([3, 4], torch.tensor([4, 3]), mask, mask.numpy(), mask.tolist()):
        assert PartlyLabelled(data(30), known).known == {3, 4}
    with pytest.raises(ValueError, match="^known: expected indices, or one boolean for each of the 30 samples"):
        PartlyLabelled(data(30), mask[:-1])
    with pytest.raises(IndexError, match="^known: expected indices from 0 to 29, got 30"):
        PartlyLabelled(data(30), [30])


def test_a_compiled_method_is_evaluated_like_any_other():
    model = method()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(evaluate(compiled, loader(shuffle=False)).logits, evaluate(model, loader(shuffle=False)).logits)
    with pytest.raises(TypeError, match="^method: .* got OptimizedModule; pass the method itself, and compile=True"):
        fit(compiled, loader(), loader(labelled=False), epochs=1)


def test_more_errors_say_what_to_do(tmp_path):
    model = SourceOnly(*networks())
    with pytest.raises(ValueError, match="^target: expected None, since SourceOnly has nothing to do with a target"):
        fit(model, loader(), loader(), epochs=1)
    optimizer = torch.optim.SGD(model.label_predictor.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match="^optimizer: expected all parameters of the method that learn, got none of feature"
    ):
        fit(model, loader(), epochs=1, optimizer=optimizer)
    with pytest.raises(ValueError, match="^lr: expected one of lr and optimizer, got both"):
        fit(model, loader(), epochs=1, lr=0.1, optimizer=optimizer)
    persistent = DataLoader(data(), 8, num_workers=1, persistent_workers=True)
    with pytest.raises(ValueError, match="^source: expected a loader with persistent_workers=False"):
        fit(model, persistent, epochs=1, checkpoint=tmp_path / "c.pt")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, Halving())
    with pytest.raises(ValueError, match="^steps_per_epoch: expected a number, since the source loader has no length"):
        fit(model, iter([]), epochs=1)
    with pytest.raises(ValueError, match="^select: expected a score, got NaN for 'target_accuracy'"):
        fit(model, loader(), epochs=1, target_validation=loader(labelled=False), select="target_accuracy")
    fit(model, loader(), epochs=1, optimizer=optimizer, scheduler=scheduler, checkpoint=tmp_path / "c.pt")
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
    with pytest.raises(
        ValueError, match="^scheduler: expected ReduceLROnPlateau with mode='min', since it follows 'loss'"
    ):
        fit(model, loader(), epochs=1, optimizer=optimizer, scheduler=plateau)


class Halving:
    def __call__(self, epoch: int) -> float:
        return 0.5**epoch


def test_layerwise_rates_stay_apart_in_training():
    model = SourceOnly(*networks())
    optimizer = torch.optim.SGD(layerwise_lr_decay(model, 0.1, 0.5))
    fit(model, loader(), epochs=2, optimizer=optimizer, lr_schedule=lambda p: 1 - p)
    assert {group["name"]: group["lr"] / group["initial_lr"] for group in optimizer.param_groups} == pytest.approx(
        {"feature_extractor.0": 1 - 11 / 12, "label_predictor": 1 - 11 / 12}
    )
