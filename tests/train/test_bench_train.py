"""The training benchmark on a tiny model: same work for all, parts that add up, goals in words."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.data.prepared import model_folder
from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft.data.store_write import write_store
from varlen_sft.errors import RunError
from varlen_sft.tools.step_bench import Load, LossesDisagree, check_losses
from varlen_sft.train.optimizer import GradientSums, MasterAdamW
from varlen_sft.train.parallel import Parallel

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # where these scripts find each other

transformers = pytest.importorskip("transformers")
pytest.importorskip("datasets")

import bench_train  # noqa: E402
import dropin_candidates  # noqa: E402
import train_loop  # noqa: E402
import train_ranks  # noqa: E402
import train_start  # noqa: E402
import train_step  # noqa: E402

TOKENS = 1024  # of a step
CORES = sorted(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in HF format, with a tokenizer."""
    path = model_folder(tmp_path_factory.mktemp("models") / "tiny")
    config = tiny_hf_config(vocab_size=400, max_position_embeddings=2048)
    tiny_model(config, torch.bfloat16).save_pretrained(path)
    return path


def copied(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


# ---------------------------------------------------------------- whole steps


def test_whole_steps_begin_with_one_loss_and_move_the_weights(folder):
    load = Load(folder, torch.bfloat16, TOKENS, seed=0)
    padded = train_step.TrainerStep(dropin_candidates.HFPadded, load)
    ours = train_step.LoopStep(load)
    assert type(padded.trainer.optimizer) is torch.optim.AdamW
    assert padded.trainer.optimizer.defaults["fused"] is True
    assert padded.tokens > sum(map(len, load.samples())) > ours.tokens
    moving = {"hf padded": list(padded.trainer.model.parameters())}
    moving["ours"] = ours.loop._optimizer.masters  # a warm-up this slow moves no bf16 weight
    before = {name: copied(tensors) for name, tensors in moving.items()}
    losses = {"hf padded": padded.step(), "ours": ours.step()}
    check_losses(losses, train_step.step_bench.fp32_loss(load), load.dtype)
    assert (ours.loop.state.step, padded.trainer.lr_scheduler.last_epoch) == (1, 1)
    for name, now in moving.items():
        assert not all(map(torch.equal, before[name], now)), name


def test_other_losses_are_not_timed(folder, monkeypatch):
    class Wrong(train_step.LoopStep):
        def step(self) -> float:
            return super().step() * 1.2

    padded = partial(train_step.TrainerStep, dropin_candidates.HFPadded)
    monkeypatch.setattr(train_step, "CANDIDATES", {"hf padded": padded, "ours": Wrong})
    monkeypatch.setattr(train_step.step_bench, "interleaved", lambda *_, **__: 1 / 0)
    with pytest.raises(LossesDisagree, match="ours must be within"):
        train_step.measure_steps(folder, TOKENS, 1, 0)


def test_goals_are_ratios_of_real_tokens():
    speeds = {"hf padded": 100.0, "TRL packed": 80.0, "ours": 281.0}
    rows = {name: {"real_tokens_per_second": speed} for name, speed in speeds.items()}
    assert [goal.words() for goal in train_step.goals_of_steps({"rows": rows})] == [
        "met: real tokens/s of ours over hf padded: 2.81, at least 2.8",
        "met: real tokens/s of ours over TRL packed: 3.51, at least 3.5",
    ]
    rows["ours"]["real_tokens_per_second"] = 279.0
    assert [goal.met for goal in train_step.goals_of_steps({"rows": rows})] == [False, False]


# ----------------------------------------------------------------- the loop


def test_parts_of_the_loop_are_all_of_it(folder):
    watched = Parallel.loss, torch.Tensor.backward, MasterAdamW.step, GradientSums.add
    found = train_loop.measure_loop(folder, TOKENS, 2, 0)
    assert watched == (Parallel.loss, torch.Tensor.backward, MasterAdamW.step, GradientSums.add)
    parts = found["parts"]
    assert sum(parts.values()) == pytest.approx(found["seconds"], rel=1e-9)
    assert min(parts.values()) > 0
    beside = parts["waiting for data"] + parts["everything else"]
    assert found["overhead"] == pytest.approx(beside / found["seconds"])
    beside += parts["fp32 sums of gradients"]
    assert found["overhead_with_sums"] == pytest.approx(beside / found["seconds"])
    assert 0.9 * 2 * TOKENS < found["tokens"] <= 2 * TOKENS
    goal = train_loop.goals_of_loop({"overhead": 0.0299})[0]
    assert (goal.met, goal.value) == (True, pytest.approx(2.99))
    assert not train_loop.goals_of_loop({"overhead": 0.0301})[0].met


def test_the_clock_forgets_the_first_step():
    clock = train_loop.Clock()
    sums, seen = GradientSums(), []
    with clock.watching():
        for step in clock.after_first(["first", "second", "third"]):
            sums.add([])
            seen.append((step, clock.began > 0, clock.parts["fp32 sums of gradients"] > 0))
    assert seen == [("first", False, True), ("second", True, True), ("third", True, True)]
    steps = clock.after_first(["first", "second"])
    next(steps)
    clock.parts["forward"] = 1.0
    next(steps)
    assert set(clock.parts.values()) == {0.0}


# -------------------------------------------------------------------- ranks


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_two_ranks_have_a_core_each_and_the_loss_of_one(folder, tmp_path):
    samples = train_loop.drawn(folder, 4 * TOKENS, TOKENS // train_loop.PACKS, seed=0)
    write_store(tmp_path / "set", samples)
    work = train_ranks.Work(tmp_path, folder, TOKENS, 0)
    (one,) = train_ranks.run(work, train_ranks.WAYS[train_ranks.ONE], CORES)
    two = train_ranks.run(work, train_ranks.WAYS["two ranks, ddp"], CORES)
    assert [one["cores"], *(each["cores"] for each in two)] == [CORES[:1], CORES[:1], CORES[1:2]]
    assert sorted(os.sched_getaffinity(0)) == CORES
    assert one["tokens"] == two[0]["tokens"] == two[1]["tokens"] > 0.9 * TOKENS
    losses = {train_ranks.ONE: one["loss"], "two ranks, ddp": two[1]["loss"]}
    train_ranks.refuse_other_losses(losses)
    assert two[0]["loss"] == two[1]["loss"]


def test_ranks_that_die_or_learn_something_else_are_told(folder, tmp_path):
    nowhere = train_ranks.Work(tmp_path, tmp_path / "none", TOKENS, 0)
    with pytest.raises(RunError, match="a rank ended without a result"):
        train_ranks.run(nowhere, train_ranks.WAYS["two ranks, fsdp"], [CORES[0], CORES[-1]])
    same = {train_ranks.ONE: 8.0, "two ranks, ddp": 8.03, train_ranks.APART: 9.0}
    train_ranks.refuse_other_losses(same)
    for loss in (8.04, 7.96, float("nan")):
        with pytest.raises(RunError, match="two ranks, ddp must have the loss of one rank"):
            train_ranks.refuse_other_losses(same | {"two ranks, ddp": loss})


def test_speed_counts_each_token_once():
    found = [{"seconds": 2.0, "tokens": 100}, {"seconds": 4.0, "tokens": 60}]
    assert train_ranks.speed(found, train_ranks.Way(2, "ddp")) == 25.0
    assert train_ranks.speed(found, train_ranks.Way(2, None)) == 40.0
    rows = zip(train_ranks.WAYS, (10.0, 17.0, 18.0, 16.9, 20.0), strict=True)
    rows = {name: {"real_tokens_per_second": speed, "rounds": [speed]} for name, speed in rows}
    goals = train_ranks.goals_of_ranks({"rows": rows})
    assert [(goal.value, goal.met) for goal in goals] == [
        (1.7, True),
        (1.8, True),
        (1.69, False),
    ]


# ------------------------------------------------------- checkpoints, starting


def test_checkpoints_are_those_of_their_own_benchmark(folder):
    found = bench_train.checkpoint(bench_train.Asked(folder, TOKENS, 1, 0))
    assert "torch.save" not in found and found["bytes"] > 0
    for name in ("Checkpointer", "one copy"):
        assert len(found[name]["times"]["stall"]) == 1 and found[name]["next_step"] > 0
    assert found["one copy"]["of_one_copy"] == 1.0
    at = {"Checkpointer": {"of_one_copy": 1.4, "next_step": 1.2}}
    assert [goal.met for goal in bench_train.goals_of_checkpoint(at)] == [True, False]


def test_starting_is_measured_in_fresh_processes(monkeypatch):
    found = train_start.measure_start(1)
    rows = found["rows"]
    package, names = (rows[name]["median"] for name in (train_start.PACKAGE, train_start.NAMES))
    assert 0 < package < names and rows[train_start.TORCH]["median"] > 0
    assert [len(row["seconds"]) for row in rows.values()] == [1, 1, 1, 1]
    at = {train_start.PACKAGE: 0.1, train_start.NAMES: 0.101, train_start.HELP: 0.4}
    at = {"rows": {name: {"median": seconds} for name, seconds in at.items()}}
    assert [goal.met for goal in train_start.goals_of_start(at)] == [True, False, True]
    monkeypatch.setattr(train_start, "_TIMED", "raise SystemExit('no torch')")
    with pytest.raises(RunError, match="ended with 1:\nno torch"):
        train_start.imports()


# --------------------------------------------------------------- the whole script


def test_rounds_that_are_far_apart_are_told():
    rows = {"a": {"rounds": [1.0, 1.4]}, "b": {"rounds": [1.0, 1.6]}, "c": {"seconds": [1, 9]}}
    assert list(bench_train.disturbed({"rows": rows})) == ["b"]


def options(folder: Path, *words: str) -> list[str]:
    return [f"--model={folder}", f"--tokens={TOKENS}", "--rounds=1", "--threads=1", *words]


def test_a_section_runs_alone_and_leaves_a_file_if_asked(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    out.write_text('{"environment": "before", "seconds": 9, "start": {"rows": {}}, "loop": {}}')
    words = options(folder, "--sections", "loop", f"--json={out}")
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words])
    assert bench_train.main() == 0
    shown = capsys.readouterr().out
    assert "fp32 sums of gradients" in shown and "of 1 goals met" in shown
    content = json.loads(out.read_text())
    assert set(content) == {"environment", "start", "loop"} and str(folder) not in out.read_text()
    assert content["start"] == {"environment": "before", "rows": {}}
    assert content["loop"]["environment"] == content["environment"] != "before"
    assert content["loop"]["goals"][0]["limit"] == 3.0


def test_a_section_that_fails_is_told_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    out = tmp_path / "figures.json"
    words = options(tmp_path / "none", "--sections", "loop", f"--json={out}")
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words, "--child=loop"])
    assert bench_train.main() == 1 and not out.exists()
    assert "loop: " in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["bench_train.py", *words])
    monkeypatch.setattr(bench_train, "alone", failing)
    assert bench_train.main() == 1 and not out.exists()
    shown = capsys.readouterr().out
    assert "section loop failed" in shown and "No file was written" in shown


def failing(name: str, *_: object) -> None:
    raise RunError(f"section {name} failed")


@pytest.mark.e2e
def test_all_sections_on_a_tiny_model(folder, tmp_path):
    pytest.importorskip("trl")
    out = tmp_path / "figures.json"
    program = str(ROOT / "benchmarks/bench_train.py")
    words = [sys.executable, program, *options(folder, f"--json={out}")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert [len(content[name]["goals"]) for name in bench_train.SECTIONS] == [2, 1, 3, 2, 3]
    assert list(content["step"]["rows"]) == ["hf padded", "TRL packed", "ours"]
    assert list(content["ranks"]["rows"]) == list(train_ranks.WAYS)
