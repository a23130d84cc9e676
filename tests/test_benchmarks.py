"""The harness: cases, the check before the clock, alternation, memory, records, tables and plots."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import fresh
import pytest
import torch

from fastda import cli, reference
from fastda.benchmarks import baselines, command, peers, tables, timing
from fastda.benchmarks import record as records
from fastda.benchmarks.__main__ import main, progress_lines
from fastda.benchmarks.baselines import Absent, Side, make_side, side_names
from fastda.benchmarks.cases import CPU_CASES, GPU_CASES, GROUP_FIGURES, SWEEPS, Figure, select
from fastda.benchmarks.correctness import Check
from fastda.benchmarks.machine import Limits
from fastda.benchmarks.memory import memory, peak
from fastda.benchmarks.timing import Refused, Stopwatch, Times, compare

BENCH = Path(__file__).parents[1] / "bench"
CORAL = select(["coral"])[0][0]
TINY = CORAL.tiny("cpu")


# Cases


def test_cases_cover_every_row():
    names = {case.name for case in CPU_CASES}
    assert len(names) == len(CPU_CASES)
    assert names == {
        "coral 32×256",
        "coral 32×2048",
        "coral 64×1024",
        "coral 128×2048",
        "coral 256×2048",
        "coral 64×4096",
        "coral 1024×512",
        "coral 4096×256",
        "coral 16 batches of 64×256",
        "covariance 4096×512",
        "covariance 16 batches of 256×128",
        "5-way 1-shot Q 75 D 640",
        "5-way 5-shot Q 75 D 1600",
        "20-way 5-shot Q 300 D 64",
        "64 episodes 5-way 1-shot Q 75 D 640",
        "60-way 5-shot Q 300 D 1600",
        "60-way 5-shot Q 300 D 1600, sure answers",
        "60-way 5-shot Q 300 D 1600, classes apart",
        "cross-entropy Q 512 × C 10000 × D 512",
        "nearest of 100000 classes Q 256 D 640",
        "class means 1000×5×640",
        "reversal fork 64×256",
        "reversal fork 256×2048",
        "reversal fork 4096×2048",
        "reversal linear 256×2048 to 1024",
        "domain-adversarial loss 64+64",
        "domain-adversarial loss 4096+4096",
        "DANN step 64+64 images 28×28",
        "Deep CORAL step 64+64 images 28×28",
        "MAML sinusoid, 25 tasks, K 10, one step",
        "MAML sinusoid, 25 tasks, K 10, one step, compile=True",
        "1000 episodes 5-way 5-shot Q 75 D 640 evaluated",
    }
    assert {case.name for case in GPU_CASES} == {
        "coral 64×2048 GPU",
        "coral 128×4096 GPU",
        "5-way 1-shot Q 75 D 640 GPU",
        "64 episodes 5-way 1-shot Q 75 D 640 GPU",
        "coral 16384×2048 bf16 GPU",
        "covariance 65536×1024 bf16 GPU",
        "cross-entropy Q 8192 × C 100000 × D 512 bf16 GPU",
        "nearest of 100000 classes Q 256 D 640 GPU",
        "nearest of 100000 classes Q 256 D 640 bf16 GPU",
        "class means 1000×5×640 GPU",
        "reversal fork 131072×2048 GPU",
        "reversal fork 131072×2048, λ on the device GPU",
    }
    assert all(case.figures for case in CPU_CASES + GPU_CASES)


def test_the_group_figure_is_over_the_wide_coral_cases():
    (group,) = GROUP_FIGURES
    assert len(group.cases) == 6 and set(group.cases) <= {case.name for case in CPU_CASES}


@pytest.mark.compiled_core
def test_wide_coral_memory_has_its_figure():
    """Forward and backward at 64 × 4096 take less than 8 MB beyond results and gradients, the reference 190 MB."""
    (case,) = (case for case in CPU_CASES if case.name == "coral 64×4096")
    (figure,) = (figure for figure in case.figures if figure.quantity == "megabytes")
    sides = {name: make_side(case, name).call for name in ("fused", "reference")}
    extra = {name: memory(call, case.arguments(), "cpu")["extra"] for name, call in sides.items()}
    outcome = records.outcome(case, figure, {"sides": {"fused": {"memory": {"extra": extra["fused"]}}}})
    name, value = "extra memory, MB ≤ 8", extra["fused"] / 1e6
    assert outcome == {"figure": name, "bound": 8, "value": value, "reached": True, "interval": None}
    assert extra["reference"] > 190e6
    too_much = records.outcome(case, figure, {"sides": {"fused": {"memory": {"extra": extra["reference"]}}}})
    assert too_much["reached"] is False
    assert records.outcome(case, figure, {"sides": {"fused": {"reason": "wrong"}}})["reached"] is None


@pytest.mark.parametrize(("seconds", "threads", "reached"), [(0.05, 2, True), (0.07, 2, False), (0.05, 1, None)])
def test_seconds_are_those_of_two_cores(seconds, threads, reached):
    (case,) = (case for case in CPU_CASES if case.name.startswith("1000 episodes"))
    (figure,) = (figure for figure in case.figures if figure.quantity == "seconds")
    row = {"threads": threads, "sides": {"fused": {"times": {"forward": {"median": seconds}}}}}
    assert str(figure) == "seconds on two cores ≤ 0.06"
    assert records.outcome(case, figure, row)["reached"] is reached


def test_the_sweep_doubles_the_features_at_32_samples():
    (sweep,) = SWEEPS
    assert [case.sizes for case in sweep.cases] == [
        {"samples": 32, "features": features} for features in (256, 512, 1024, 2048, 4096, 8192)
    ]
    assert {"fused", "reference"} <= set(sweep.sides)
    tiny = [case.sizes["features"] for case in sweep.tiny("cpu").cases]
    assert tiny == [4, 8, 16, 32, 64, 128]


def test_what_is_chosen():
    cases, sweeps = select()
    assert tuple(cases) == CPU_CASES and tuple(sweeps) == SWEEPS
    assert select([], "cuda") == (list(GPU_CASES), [])
    cases, sweeps = select(["coral 32×256"])
    assert [case.name for case in cases] == ["coral 32×256"] and sweeps == []
    assert select(["sweep"]) == ([], list(SWEEPS))
    cases, sweeps = select(["coral"])
    assert len(cases) == 9 and tuple(sweeps) == SWEEPS


def test_every_topic_has_its_suite():
    suites = {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")}
    assert {case.topic for case in CPU_CASES + GPU_CASES} <= suites


@pytest.mark.parametrize("case", CPU_CASES + GPU_CASES, ids=lambda case: case.name)
def test_every_eager_side_is_right_at_tiny_sizes(case):
    tiny = case.tiny("cpu")
    arguments = tiny.arguments()
    for name in side_names(tiny):
        side = make_side(tiny, name)
        compiles = name.endswith(" compiled") or (name, case.op) == ("fused", "compiled_maml_step")
        if not compiles and isinstance(side, Side):
            verdict = Check(tiny, arguments, truth=side.truth).judge(side)
            assert verdict.wrong is None, f"{name}: {verdict.wrong}"
            assert verdict.errors


def test_an_unknown_case_is_named():
    with pytest.raises(ValueError, match="expected a topic .*got 'corral'"):
        select(["corral"])


def test_work_of_the_gram_route():
    samples, features = 2 * 32, 2048
    case = next(case for case in CPU_CASES if case.name == "coral 32×2048")
    assert case.work.flops == 3 * samples**2 * features
    assert case.work.bytes == 2 * samples * features * 4
    limits = Limits({"float32": 1e9}, 1e6)
    assert limits.seconds(case.work, torch.float32) == case.work.bytes / 1e6


# Where the reference is no opponent


def test_careful_code_stands_in_for_a_reference_beyond_memory(monkeypatch):
    case = next(case for case in CPU_CASES if case.op == "prototype_cross_entropy")
    assert case.beyond_reference
    assert "10.5 GB" in make_side(case, "reference").reason
    assert baselines.formula(case) is baselines.careful_cross_entropy
    monkeypatch.setattr(baselines, "without_kernel", lambda case: "no kernel of its own yet")
    absent = make_side(case, "fused")
    assert isinstance(absent, Absent) and "no kernel of its own yet" in absent.reason
    monkeypatch.setattr(baselines, "without_kernel", lambda case: None)
    assert isinstance(make_side(case, "fused"), Side)


def test_a_peer_that_is_not_there_is_said_to_be(monkeypatch):
    with pytest.raises(peers.PeerMissing, match="no_such_peer is not installed"):
        peers.import_peer("no_such_peer.layers")

    def missing():
        raise peers.PeerMissing("pytorch_adapt is not installed")

    monkeypatch.setitem(peers.PEERS["coral_loss"], "pytorch-adapt", missing)
    assert make_side(CORAL, "pytorch-adapt") == Absent("pytorch-adapt", "pytorch_adapt is not installed")


def test_a_peer_that_does_not_import_leaves_nothing_behind_and_says_nothing(monkeypatch, tmp_path, capfd):
    package = tmp_path / "broken_peer"
    package.mkdir()
    (package / "layers.py").write_text("")
    (package / "__init__.py").write_text(
        "import sys; from . import layers; print('this is old', file=sys.stderr); raise AttributeError('np.float')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(peers.PeerMissing, match="broken_peer does not import: AttributeError: np.float"):
            peers.import_peer("broken_peer.layers")
    assert not [name for name in sys.modules if name.startswith("broken_peer")]
    assert capfd.readouterr().err == ""


def test_the_torchvision_stand_in_leaves_nothing_behind(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    finders = list(sys.meta_path)
    with peers.torchvision_stand_in():
        from torchvision.models.resnet import BasicBlock

        assert isinstance(BasicBlock, type)
    assert sys.meta_path == finders and "torchvision" not in sys.modules


@pytest.mark.parametrize("transformers_import", [True, False])
def test_transformers_does_not_take_the_stand_in_for_torchvision(transformers_import, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchvision" else find_spec(name))
    asks = "import sys; asked = any(x.find_spec('torchvision') for x in sys.meta_path if 'StandIn' in type(x).__name__)"
    asks += "" if transformers_import else "; raise RuntimeError('too old')"
    (tmp_path / "transformers.py").write_text(asks)
    (tmp_path / "peer_to_try.py").write_text("import torchvision\ntry: import transformers\nexcept RuntimeError: pass")
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert peers.import_peer("peer_to_try").torchvision
        assert not sys.modules["transformers"].asked if transformers_import else "transformers" not in sys.modules
    finally:
        del sys.modules["peer_to_try"]
        sys.modules.pop("transformers", None)


# Timing


def test_sides_alternate_and_a_wrong_one_is_refused():
    calls = []

    def side(name, factor=1.0):
        def call(source, target):
            calls.append(name)
            return factor * reference.coral_loss(source, target)

        return Side(name, call)

    def raising(source, target):
        raise RuntimeError("no such kernel")

    check = Check(TINY, TINY.arguments())
    sides = [side("a"), side("wrong", 1.001), side("b"), Side("raising", raising)]
    found, rounds = compare(sides, lambda side: check, budget=0.0)
    assert rounds >= 3
    assert isinstance(found["wrong"], Refused) and "output 0: relative error 1.0e-03" in found["wrong"].reason
    assert found["raising"] == Refused("RuntimeError: no such kernel")
    assert calls.count("wrong") == 1  # the check alone
    for name in "ab":
        assert len(found[name].rounds["both"]) == rounds
        samples = found[name].samples
        assert len(samples["forward"]) == len(samples["backward"]) == len(samples["both"]) >= rounds
        assert all(
            math.isclose(f + b, whole) for f, b, whole in zip(samples["forward"], samples["backward"], samples["both"])
        )


def test_each_round_has_its_order_and_some_sides_go_on(monkeypatch):
    turns = []

    class Recorded(Stopwatch):
        def turn(self):
            turns.append(self.function.__name__)
            return [{"both": 1.0}]

    monkeypatch.setattr(timing, "Stopwatch", Recorded)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 20)

    def side(name):
        def call(source, target):
            return reference.coral_loss(source, target)

        call.__name__ = name
        return Side(name, call)

    check = Check(TINY, TINY.arguments())
    found, rounds = compare(
        [side(name) for name in "abc"], lambda side: check, budget=60.0, longer=lambda found: {"a", "b"}, patience=2.5
    )
    assert rounds == 50
    whole, further = turns[:60], turns[60:]
    orders = {tuple(whole[i : i + 3]) for i in range(0, 60, 3)}
    assert all(set(order) == set("abc") for order in orders) and len(orders) > 1
    assert len(further) == 60 and all(set(further[i : i + 2]) == set("ab") for i in range(0, 60, 2))
    assert [len(found[name].rounds["both"]) for name in "abc"] == [50, 50, 20]


def test_sides_that_may_be_the_fastest_decide_about_a_figure():
    sides = [Side(name, None) for name in ("fused", "careful", "peer", "reference", "wrong")]
    sides.append(Side("less work", None, truth=reference.coral_loss))
    found = {
        name: Times({}, {"both": [seconds]})
        for name, seconds in {"fused": 1.0, "careful": 3.0, "peer": 5.0, "reference": 7.0, "less work": 0.5}.items()
    }
    found["wrong"] = Refused("")

    def names(*figures):
        return records.deciding(dataclasses.replace(TINY, figures=figures), sides, found)

    assert names(Figure(1.5)) == {"fused", "careful", "peer"}
    assert names(Figure(1.5, ("reference",)), Figure(1, ("less work",))) == {"fused", "reference", "less work"}
    assert names(Figure(8, quantity="megabytes"), Figure(2, ("absent",))) == set()
    found["fused"] = Refused("")
    assert names(Figure(1.5)) == set()


@pytest.mark.parametrize("spoil", [lambda g: g * math.nan, torch.abs, torch.ones_like, torch.zeros_like])
def test_a_wrong_gradient_is_refused(spoil):
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return spoil(grad)

    side = Side("spoilt", lambda source, target: reference.coral_loss(Spoilt.apply(source), target))
    assert Check(TINY, TINY.arguments()).judge(side).wrong.startswith("gradient 0: relative error")


def test_median_and_quartiles():
    times = Times({}, {"both": [5.0, 1.0, 2.0, 3.0, 4.0]})
    assert times.median("both") == 3 and times.quartiles("both") == (2, 4)


def test_sides_are_compared_round_by_round():
    """The second side takes 2 % longer, on a machine that slows down tenfold meanwhile, in steps of its own."""
    first, second = Times({}), Times({})
    for slowness in (1.0, 1.1, 3.0, 10.0, 9.0):
        first.add([{"both": slowness * seconds} for seconds in (1.0, 1.0, 7.0)])
        second.add([{"both": 1.02 * slowness}])
    assert second.over(first, "both") == pytest.approx(1.02, abs=1e-12)
    assert first.samples["both"][:4] == [1.0, 1.0, 7.0, 1.1] and first.over(first, "both") == 1
    assert second.interval_over(first, "both") is None


def test_the_interval_of_a_ratio_covers_it():
    """Ratios spread evenly about 1.01: 95 in 100 intervals hold it, and a hundred rounds make it narrow."""
    generator, inside, widths = random.Random(0), 0, []
    for _ in range(1000):
        one, other = Times({}), Times({})
        for _ in range(100):
            other.add([{"both": (slowness := generator.uniform(1, 2))}])
            one.add([{"both": slowness * generator.uniform(0.91, 1.11)}])
        lower, upper = one.interval_over(other, "both")
        inside += lower <= 1.01 <= upper
        widths.append(upper - lower)
    assert 930 <= inside <= 975 and max(widths) < 0.1


# Memory


def test_the_meter_sees_an_allocation_of_known_size():
    def allocate():
        first = torch.empty(1000)
        del first
        second, third = torch.empty(3000), torch.empty(500)
        return second, third

    assert peak(allocate) == 4 * 3500


def test_results_and_gradients_are_not_extra():
    x = torch.randn(1000, requires_grad=True)
    measured = memory(lambda x: 2 * x, (x,), "cpu")
    assert 2 * 4000 <= measured["peak"] < 2 * 4000 + 500
    assert measured["extra"] < 500
    assert memory(lambda x: (2 * x).exp().sum(), (x,), "cpu")["extra"] >= 4000


def test_the_meter_is_silent(capfd):
    peak(lambda: torch.empty(10))
    assert capfd.readouterr().err == ""


# Records, tables and plots


def _record(tmp_path) -> Path:
    """A record of two tiny cases, measured once, with a miss and a side without a time."""
    cases = [case.tiny("cpu") for case in select(["coral 32×256", "coral 64×1024", "class means"])[0]]
    cases[1] = dataclasses.replace(cases[1], sizes={"samples": 4, "features": 64})
    sweeps = [sweep.tiny("cpu") for sweep in SWEEPS]
    record = records.make_record(cases, [1], 0.0, sweeps, dry_run=True, eager_only=True)
    record["cases"][0]["figures"] = [records.judged(Figure(1e9), 1.0), records.judged(Figure(0.1), 1.0)]
    path = records.path_for(record, tmp_path)
    records.write(record, path)
    return path


def test_a_record_holds_what_the_rules_ask_for(tmp_path):
    path = _record(tmp_path)
    record = json.loads(path.read_text(encoding="utf-8"))
    assert records.read(path) == record
    assert path.name == f"{record['machine']}-{record['date'][:10]}-dry-run.json"
    assert {"python", "torch", "triton", "fastda-kernels"} <= record["versions"].keys()
    assert {"processor", "gpu", "threads", "build", "git", "seed", "serving", "limits"} <= record.keys()
    case = record["cases"][0]
    assert case["sides"]["reference"]["times"].keys() == {"forward", "backward", "both"}
    assert case["sides"]["reference"]["times"]["both"].keys() == {
        "median",
        "lower_quartile",
        "upper_quartile",
        "samples",
        "over_fused",
        "over_fused_interval",
    }
    assert case["sides"]["fused"]["memory"]["peak"] > 0
    assert case["ratios"]["both"]["ratio"] > 0 and case["share_of_limit"] > 0
    assert case["sides"]["reference compiled"] == {"reason": "compiled sides were left out"}
    assert os.uname().nodename.lower() not in record["machine"]


def test_the_ratio_is_against_the_fastest_baseline():
    def side(over_fused, baseline=True):
        return {"times": {"both": {"over_fused": over_fused, "over_fused_interval": None}}, "baseline": baseline}

    sides = {"fused": side(1.0, False), "a": side(3.0), "b": side(2.0), "c": {"reason": "wrong"}}
    sides["yardstick"] = side(0.5, False)
    assert records.speed(sides, "both") == {"against": "b", "ratio": 2.0, "interval": None}
    assert records.speed(sides, "both", ("a", "c")) == {"against": "a", "ratio": 3.0, "interval": None}
    assert records.speed(sides, "both", ("yardstick",))["ratio"] == 0.5
    assert records.speed(sides, "forward") is None


def test_the_geometric_mean_needs_all_its_cases():
    (group,) = GROUP_FIGURES

    def row(name, seconds):
        side = {"times": {"both": {"over_fused": seconds, "over_fused_interval": None}}, "baseline": True}
        fused = {"times": {"both": {"over_fused": 1.0, "over_fused_interval": None}}, "baseline": False}
        return {"name": name, "threads": 1, "phase": "both", "sides": {"fused": fused, "reference": side}}

    rows = [row(name, seconds) for name, seconds in zip(group.cases, (1, 4, 16, 16, 64, 256))]
    (outcome,) = records.group_outcomes(rows)
    assert outcome["value"] == pytest.approx(2 ** (24 / 6)) and outcome["reached"]
    assert records.group_outcomes(rows[1:]) == []


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_growth_of_a_sweep(power):
    """Of a power of the size, measured from where it is one: below, every call costs 5 seconds."""
    (sweep,) = SWEEPS

    def row(case):
        size = case.sizes["features"]
        seconds = (size / 1024) ** power if size >= sweep.growth_from else 5.0
        side = {"times": {"both": {"median": seconds}}}
        sides = {"fused": side, "reference": side, "careful": {"reason": "wrong"}}
        return {"sizes": case.sizes, "phase": "both", "sides": sides}

    factors = records.growth([row(case) for case in sweep.cases], sweep)
    assert factors == {"fused": pytest.approx(2**power), "reference": pytest.approx(2**power)}
    assert records.growth([row(sweep.cases[-1])], sweep) == {}


def test_a_record_of_two_numbers_of_threads(tmp_path):
    case, tiny = TINY, SWEEPS[0].tiny("cpu")
    sweep = dataclasses.replace(tiny, cases=tiny.cases[-2:])
    record = records.make_record([case], [2, 1], 0.0, [sweep], dry_run=True, eager_only=True)
    assert record["complete"] and [row["threads"] for row in record["cases"]] == [2, 1]
    assert record["limits"].keys() == {"1", "2"}
    assert [row["threads"] for row in record["sweeps"][0]["cases"]] == [2, 2]
    short = tables.short_table(record).splitlines()[2:]
    assert len(short) == 1  # both cores; the page has one thread as well
    page = tables.page(record)
    for threads in (1, 2):
        assert page.count(f"| {case.name} | {threads} |") == 1 + len(side_names(case))


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    records.write({"format": records.FORMAT, "seed": 1}, path)

    def fail(*arguments):
        raise OSError("disk full")

    with pytest.raises(ValueError):
        records.write({"format": records.FORMAT, "seed": math.nan}, path)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write({"format": records.FORMAT, "seed": 2}, path)
    assert records.read(path)["seed"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_another_format_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="expected a record of format 1, got 0; measure it again"):
        records.read(path)


def test_tables_show_misses_and_missing_sides(tmp_path):
    page = tables.page(records.read(_record(tmp_path)))
    assert "≥ 1e+09 × best baseline: 1 **missed**" in page
    assert "≥ 0.1 × best baseline: 1 |" in page
    assert "compiled sides were left out" in page
    assert "| coral sweep: 32 samples a domain; features | fused | reference | careful |" in page
    assert re.search(r"^\| a doubling, from 16 on( \| [\d.]+×){3} \|$", page, re.MULTILINE)
    assert "Dry run with tiny sizes" in page
    for line in page.splitlines():
        assert not line.startswith("|") or line.endswith("|")


def test_a_run_cut_short_leaves_what_it_measured(monkeypatch):
    cases, saved = [case.tiny("cpu") for case in select(["coral"])[0][:2]], []
    measure = records.measure

    def cut(case, *arguments, **options):
        if case is cases[1]:
            raise KeyboardInterrupt
        return measure(case, *arguments, **options)

    monkeypatch.setattr(records, "measure", cut)
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        records.make_record(cases, [1], budget=0.0, save=saved.append, dry_run=True, eager_only=True)
    assert torch.get_num_threads() == threads
    (record,) = saved
    assert len(record["cases"]) == 1 and not record["complete"]
    assert "Cut short" in tables.heading(record)


def test_a_busy_machine_is_said_to_be_one(tmp_path):
    record = records.read(_record(tmp_path))
    record["cores"] = 2
    for load, said in ((None, False), (0.9, False), (1.1, True)):
        record["load_before"] = load
        assert ("Other processes were running" in tables.heading(record)) == said


@pytest.mark.parametrize(
    "seconds, text", [(1.234e-6, "1.23 µs"), (45.67e-6, "45.7 µs"), (0.00123, "1.23 ms"), (0.1236, "124 ms")]
)
def test_durations_have_three_digits(seconds, text):
    assert tables.duration(seconds) == text


def test_the_report_makes_tables_and_plots(tmp_path):
    path = _record(tmp_path)
    output = tmp_path / "report"
    done = fresh.python(BENCH / "report.py", path, "--output", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plots = ("-coral-time", "-coral-memory", "-coral-sweep-32-samples-a-domain", "-ratios", "-limits")
    ends = (".md", "-summary.md", *(f"{plot}.png" for plot in plots))
    names = {f"{path.stem}{end}" for end in ends}
    assert {file.name for file in output.iterdir()} == names
    assert {Path(line).name for line in done.stdout.splitlines()} == names
    for plot in output.glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


# Command lines


def test_the_gpu_cases_run_end_to_end_on_the_cpu(tmp_path, capsys):
    arguments = ["--device", "cuda", "--dry-run", "--eager-only", "--budget", "0", "--threads", "1"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    record = records.read(path)
    assert [case["name"] for case in record["cases"]] == [f"{case.name}, tiny" for case in GPU_CASES]
    for case in record["cases"]:
        assert "times" in case["sides"]["fused"], case["sides"]["fused"]
    assert str(path) in capsys.readouterr().out


def test_progress_without_tqdm_is_a_line_a_case(capsys):
    assert list(progress_lines([(TINY, 2, None)], unit="case")) == [(TINY, 2, None)]
    assert capsys.readouterr().err == f"case 1 of 1: {TINY.name}, 2 thread(s)\n"


def test_a_wrong_command_line_says_so(tmp_path, capsys):
    assert main(["--cases", "corral", "--output", str(tmp_path)]) == 2
    assert "expected a topic" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_fastda_bench_prints_the_short_table_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "short", lambda device: [TINY])
    assert cli.main(["bench", "--device", "cpu", "--budget", "0.01", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert f"\n{TINY.name}  " in out and "  against best\n" in out and out.endswith(f"{command.LEGEND}\n")
    assert list(tmp_path.iterdir()) == []


def test_a_table_for_a_terminal():
    assert tables.aligned("| case | ratio |\n| --- | --- |\n| coral 32×256 | 5.79× |\n| fork | 12× |") == (
        "case          ratio\n────────────  ─────\ncoral 32×256  5.79×\nfork            12×"
    )


def test_the_short_cases_of_fastda_bench_exist():
    assert [case.name for case in command.short("cpu")] == list(command.SHORT)
    assert command.short("cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--budget", "0"], "budget: expected seconds above 0, got 0.0"),
        (["--cases", "corral"], "cases: expected a topic"),
    ],
)
def test_a_wrong_command_line_of_fastda_bench(words, message, capsys):
    assert cli.main(["bench", "--device", "cpu", *words]) == 1
    assert message in capsys.readouterr().err


def test_peers_script_is_valid_and_installs_what_a_record_names():
    script = BENCH / "peers.sh"
    subprocess.run(["bash", "-n", script], check=True)
    versions = dict(re.findall(r"([\w-]+)==([\d.]+)", script.read_text(encoding="utf-8")))
    names = {name for sides in peers.PEERS.values() for name in sides}
    assert names <= versions.keys() and names <= set(records.PACKAGES)


def test_gpu_script_is_valid_and_asks_for_a_folder():
    script = BENCH / "gpu.sh"
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: bench/gpu.sh OUTDIR" in done.stderr


def test_gpu_script_runs_every_step_in_eight_minutes(tmp_path):
    """With stand-ins for what takes long: a failing step stops none that follows, and the record has time left."""
    for name, body in (
        ("python", 'echo "$*"; case "$*" in *pytest*) exit 3;; esac'),
        ("nvidia-smi", "true"),
        ("timeout", f'echo "$1" >> "{tmp_path}/limits"; shift; "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python"}
    done = subprocess.run(["bash", BENCH / "gpu.sh", tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stdout
    assert {path.stem for path in (tmp_path / "out").iterdir()} == {"machine", "build", "doctor", "tests", "benchmarks"}
    assert "fastda.benchmarks --device cuda" in (tmp_path / "out" / "benchmarks.log").read_text()
    *others, benchmarks = map(int, (tmp_path / "limits").read_text().split())
    assert sum(others) < 280 and 440 < benchmarks < 480  # less what the others took
