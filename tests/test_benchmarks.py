"""The op benchmarks on tiny shapes: all do the same work, and tables say what was measured."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from varlen_sft import reference

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # where these scripts find each other

import bench_gpu  # noqa: E402
import bench_gpu_step  # noqa: E402
import gpu_timing  # noqa: E402
import head_checks  # noqa: E402
import op_groups  # noqa: E402
import peers  # noqa: E402
import peers_elementwise  # noqa: E402
import peers_ops  # noqa: E402
from op_groups import Goal, Group  # noqa: E402

LOAD = peers.HeadLoad("fp32", vocab=131, tokens=192, hidden=16)


@pytest.fixture(scope="module")
def x() -> peers.HeadInputs:
    return LOAD.make()


@pytest.fixture
def group() -> Group:
    group = Group("op", "floor", {}, missing={"TRL": "not installed: trl"})
    group.seconds = {"ours": [3.0, 1.0, 2.0], "floor": [1.0, 1.0, 1.1]}
    group.facts = {"ours": {"loss error": 2e-7, "extra MB": 12}}
    return group


def test_load_is_what_it_says(x):
    assert x.hidden.shape == (192, 16) and x.weight.shape == (131, 16)
    assert len(x.scored) == round(0.4 * 192) == int((x.labels != -100).sum())
    assert x.rows.tolist() == x.scored.tolist() + [-1] * (128 - len(x.scored))
    assert float((x.hidden @ x.weight.T).detach().std()) == pytest.approx(1, abs=0.1)


def test_truth_is_the_reference_on_all_rows(x):
    hidden, weight = (t.detach().double().requires_grad_() for t in (x.hidden, x.weight))
    out = reference.linear_cross_entropy(hidden, weight, x.labels)
    loss = out.loss_sum / out.weight_sum
    loss.backward()
    truth = head_checks.head_truth(x, rows=32)
    for got, expected in zip(truth, (loss, hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", peers.HEADS)
def test_every_head_gives_the_same_loss_and_gradients(name, x):
    try:
        head = peers.HEADS[name](x)
    except ModuleNotFoundError as error:
        pytest.skip(f"not installed: {error.name}")
    step = peers.head_step(head, x)
    for _ in range(2):  # nothing is carried over
        errors = head_checks.head_errors(step, x, head_checks.head_truth(x))
        assert list(errors) == ["loss error", "dhidden error", "dweight error"]
        assert max(errors.values()) < 2e-6


@pytest.mark.parametrize("key", ["loss error", "dweight error"])
def test_a_worse_head_is_refused(key):
    """Twice eager torch's error and one rounding: 2e-3 + 2^-7 in bf16."""
    eager = {"loss error": 1e-3, "dweight error": 1e-3}
    found = {"naive": eager, "ours": eager | {key: 9.7e-3}}
    head_checks.refuse_worse(found, torch.bfloat16)
    found["ours"][key] = 9.9e-3
    with pytest.raises(AssertionError, match=f"ours: {key} 9.9e-03 > 9.8e-03"):
        head_checks.refuse_worse(found, torch.bfloat16)


def test_bare_products_are_those_of_the_supervised_rows(x):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        peers.bare_products(x)()
    flops = gpu_timing.head_flops(len(x.scored), 16, 131)
    assert counted.get_total_flops() == flops == 3 * 2 * 77 * 16 * 131


def test_peak_memory_is_of_the_head_alone():
    load = peers.HeadLoad("fp32", vocab=8192, tokens=1024, hidden=16)
    logits = 8192 * 1024 * 4
    extra = head_checks.peak_memory("naive", load, threads=1)
    assert 1.9 * logits < extra < 5 * logits


@pytest.fixture(scope="module")
def heads() -> peers_ops.HeadsInputs:
    return peers_ops.HeadsLoad("fp32", 128, heads=4, kv_heads=2, head_dim=16).make()


def test_rope_peers_turn_alike(heads):
    pytest.importorskip("transformers")
    truth = peers_ops.rope_reference(heads, torch.float64)()
    assert max(peers_ops.errors(peers_ops.rope_ours(heads), truth)) < 1e-6
    theirs = [t[0].transpose(0, 1) for t in peers_ops.rope_hf(heads)()]
    assert max(peers_ops.errors(lambda: theirs, truth)) < 1e-6


def test_attention_peers_attend_alike(heads):
    truth = peers_ops.attention_reference(heads, torch.float64)()
    for peer in ("ours", "sdpa", "block_mask"):
        step = getattr(peers_ops, f"attention_{peer}")(heads)
        assert max(peers_ops.errors(step, truth)) < 2e-6, peer


def test_a_wrong_op_is_refused(heads):
    high, low = (peers_ops.attention_reference(heads, d) for d in (torch.float64, None))
    assert peers_ops.check(peers_ops.attention_ours(heads), low, high, torch.float32) < 2e-6
    wrong = peers_ops.attention_ours(heads._replace(v=heads.v * 1.001))
    with pytest.raises(AssertionError):
        peers_ops.check(wrong, low, high, torch.float32)


def test_ratios_are_of_medians(group):
    assert (group.median("ours"), group.ratio("ours", "floor")) == (2.0, 2.0)
    row = group.row("ours")
    assert (row["seconds_min"], row["seconds_max"], row["times floor"]) == (1.0, 3.0, 2.0)
    assert row["extra MB"] == 12 and group.disturbed() == ["ours"]


def test_goals_are_told_in_words():
    assert Goal("ours over GEMMs", 1.07, 1.08).words() == "met: ours over GEMMs: 1.07, at most 1.08"
    faster = Goal("faster", 3.9, 4.0, at_least=True)
    assert faster.words() == "NOT MET: faster: 3.90, at least 4"


def test_errors_are_compared_with_the_best_peer():
    errors = {
        "ours": {"a": 3e-3, "b": 1e-9},
        "p": {"a": 2e-3, "b": 1e-12},
        "q": {"a": 4e-3, "b": 1},
    }
    assert op_groups.no_worse(errors, ["p", "q"]) == pytest.approx(1.5)
    assert op_groups.no_worse(errors, ["q"]) == pytest.approx(0.75)


def test_table_shows_candidates_peers_and_goals(group):
    group.goals = [Goal("faster", 3.9, 4.0, at_least=True)]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(op_groups.render(group))
    text = console.export_text()
    for part in ("2 s [1 s - 3 s]", "2.00", "2.0e-07", "12", "not installed: trl"):
        assert part in text
    assert "NOT MET: faster: 3.90, at least 4" in text and "Disturbed" in text
    units = [op_groups.duration(s) for s in (1.234, 0.01234, 1.234e-5)]
    assert units == ["1.23 s", "12.3 ms", "12.3 us"]


def test_what_is_not_installed_is_named():
    def absent():
        import no_such_package  # noqa: F401

    steps, missing = op_groups.installed({"here": lambda: 1, "there": absent})
    assert (steps, missing) == ({"here": 1}, {"there": "not installed: no_such_package"})


def test_benchmarks_run_and_hand_over_what_they_measured(tmp_path):
    """Two groups through pytest-benchmark: its rounds are the interleaved ones."""
    out = tmp_path / "ops.json"
    words = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "--tiny"]
    words += ["--threads", "1", "--rounds", "3", "-p", "no:cacheprovider", "-p", "no:xdist"]
    words += ["-k", "sequences or (head and fp32 and 49152)", f"--benchmark-json={out}"]
    # In a process of pytest-xdist they would think that they are in one, too.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "goals met (tiny shapes: they mean nothing)" in done.stdout
    assert "bare GEMMs" in done.stdout and "They say nothing about a GPU" in done.stdout
    content = json.loads(out.read_text())
    assert str(ROOT) not in out.read_text() and "node" not in content["machine_info"]
    tables = {table["group"]: table for table in content["groups"]}
    assert len(tables) == 2
    for benchmark in content["benchmarks"]:
        table, name = tables[benchmark["group"]], benchmark["extra_info"]["candidate"]
        assert benchmark["stats"]["data"] == pytest.approx(table["seconds"][name], rel=1e-6)
        assert len(benchmark["stats"]["data"]) == (12 if "Sequences" in table["group"] else 3)
    head = next(table for name, table in tables.items() if name.startswith("Loss head"))
    assert head["rows"]["ours"]["extra peak MB"] >= 0 and len(head["goals"]) == 4


def test_roofline_arithmetic():
    assert gpu_timing.share(work=3e9, seconds=2e-3, per_second=2e12) == "75%"
    assert gpu_timing.cross_entropy_bytes(10, 100, 2) == 2 * 10 * 100 * 2
    # Two passes of 5 tokens, 3 heads of 4, bf16, in and out; ids; a table of 7 positions.
    table = 7 * 4 * 4
    assert gpu_timing.rope_bytes(5, 3, 4, 2, 7) == 2 * (2 * 5 * 3 * 4 * 2 + 5 * 8 + table)
    # Seven products of 2 L^2 D, causal halves them.
    assert gpu_timing.attention_flops([2, 3], 5, 8) == 7 * (4 + 9) * 5 * 8
    event = SimpleNamespace(elapsed_time=lambda end: end)
    assert gpu_timing.seconds([(event, 2.5)]) == [0.0025]


def test_peers_that_fail_are_told_and_ours_may_not():
    def broken():
        raise ValueError("no kernel\nfor this")

    steps, missing = bench_gpu.made({"ours": lambda: lambda: 1, "peer": broken})
    assert list(steps) == ["ours"] and missing == {"peer": "failed: ValueError: no kernel"}
    with pytest.raises(ValueError, match="no kernel"):
        bench_gpu.made({"ours": broken})


def test_groups_of_the_gpu_table_on_this_machine(monkeypatch):
    """Their checks, candidates and shares, on the CPU and tiny: only the clock is another."""

    def on_the_cpu(steps, rounds):
        return {name: [1.0] * rounds for name in steps}, dict.fromkeys(steps, 5_000_000)

    monkeypatch.setattr(gpu_timing, "interleaved", on_the_cpu)
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    limits = {"bytes_per_second": 1e6, "flops_per_second": 1e7}
    heads = peers_ops.HeadsLoad("bf16", 128, 4, 2, 16)
    rope = bench_gpu.rope(limits, heads)
    assert rope.seconds.keys() >= {"ours", "ours, hf rounding"}
    assert set(rope.missing) | set(rope.seconds) >= {"Liger", "flash-attn", "HF eager"}
    assert rope.facts["ours"]["extra MB"] == 5
    work = gpu_timing.rope_bytes(128, 6, 16, 2, 128)
    assert rope.facts["ours"]["of copy"] == f"{work / 1e6:.0%}"
    assert rope.goals[0].value == pytest.approx(work / 1e6) and not rope.goals[0].met
    head = bench_gpu.head(limits, replace(LOAD, dtype="bf16"))
    assert head.facts["ours"]["of matmul"] == f"{gpu_timing.head_flops(77, 16, 131) / 1e7:.0%}"
    assert math.isfinite(head.facts["naive"]["loss error"]) and head.unit == "bare GEMMs"
    attention = bench_gpu.attention(limits, heads)
    assert {"ours", "SDPA per sequence"} <= attention.seconds.keys()
    scores = bench_gpu.cross_entropy(limits, rows=16, vocab=131, device="cpu")
    assert scores.facts["ours"]["of copy"] == f"{2 * 16 * 131 * 2 / 1e6:.0%}"
    for load in (peers_elementwise.NormLoad, peers_elementwise.SwigluLoad):
        rows = bench_gpu.elementwise(limits, load("bf16", 33, 16, "cpu"))
        assert set(rows.missing) | set(rows.seconds) == {
            "ours", "Liger", "torch eager", "torch compiled"
        }  # fmt: skip
        assert rows.facts["ours"]["of copy"] == f"{8 * 33 * 16 * 2 / 1e6:.0%}"
    edges = bench_gpu.sequences(limits, tokens=2000, device="cpu")
    assert list(edges.seconds) == ["ours", "torch ops"]


@pytest.mark.parametrize("script", [bench_gpu, bench_gpu_step])
def test_without_a_device_the_gpu_tables_say_so(script, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [script.__file__])
    assert script.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "finds no CUDA device: nothing was measured" in lines[0]


def test_chart_is_drawn_or_told_to_be_missing(group, tmp_path):
    line = bench_gpu.chart([op_groups.as_json(group)], tmp_path / "gpu.png")
    drawn = (tmp_path / "gpu.png").exists()
    assert line == ("Chart: gpu.png" if drawn else "No PNG: matplotlib is not installed.")
