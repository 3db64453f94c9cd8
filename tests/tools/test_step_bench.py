"""The step benchmark: same work for all, refused if not; fair order; memory of the probe alone."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.tools import step_bench, step_candidates, step_table
from varlen_sft.tools.step_bench import Load, LossesDisagree, check_losses

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 131}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in HF format."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, **HEADS, initializer_range=0.2)
    path = tmp_path_factory.mktemp("models") / "tiny"
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path) -> Load:
    """Six conversations: two micro-batches."""
    return Load(folder, torch.float32, tokens=2048, seed=0)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """benchmarks/bench_step.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_step", ROOT / "benchmarks/bench_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------- samples


def test_lengths_are_the_seeds_and_sum_to_the_tokens():
    assert step_bench.chat_like_lengths(2048, seed=0) == [387, 315, 584, 381, 228, 153]
    assert step_bench.chat_like_lengths(2048, seed=1) != step_bench.chat_like_lengths(2048, seed=0)
    for seed in range(50):
        assert 2048 - 16 < sum(step_bench.chat_like_lengths(2048, seed)) <= 2048


def test_lengths_are_lognormal_and_capped():
    lengths = np.array(step_bench.chat_like_lengths(4_000_000, seed=0, median=350, cap=100_000))
    assert np.median(lengths) == pytest.approx(350, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(0.8, rel=0.03)
    assert max(step_bench.chat_like_lengths(400_000, seed=0)) == 2048


def test_answers_end_their_turns_and_fill_two_fifths():
    lengths = [149, 600, 2048, 16] * 40
    samples = step_bench.chat_like_samples(lengths, vocab_size=131, seed=0)
    assert [len(sample) for sample in samples] == lengths
    weights = np.concatenate([sample.token_weights for sample in samples])
    assert set(weights.tolist()) == {0.0, 1.0}
    assert weights.mean() == pytest.approx(0.4, abs=0.02)
    for sample, turns in zip(samples, [1, 4, 14, 1] * 40, strict=True):
        edges = np.diff(np.concatenate([[0], sample.token_weights, [0]]))
        assert (edges == 1).sum() == turns  # one contiguous span in each
        assert sample.token_weights[0] == 0 and sample.token_weights[-1] == 1
        assert [ROLES[r] == "assistant" for r in sample.roles] == (
            sample.token_weights > 0
        ).tolist()
        assert 0 <= sample.input_ids.min() and sample.input_ids.max() < 131


# ---------------------------------------------------------------- candidates


def test_all_compute_the_same_loss_and_gradients(load: Load, script: ModuleType):
    candidates = {name: made(load) for name, made in script.all_candidates().items()}
    assert candidates.pop("floor").step() is None
    losses, gradients = {}, {}
    for name, candidate in candidates.items():
        losses[name] = candidate.step()
        assert candidate.step() == pytest.approx(losses[name], rel=1e-6)  # nothing is carried over
        inner = candidate.model if name == "ours" else candidate.model.model
        gradients[name] = inner.embed_tokens.weight.grad
    expected = losses["hf padded"]
    assert losses == pytest.approx(dict.fromkeys(losses, expected), rel=1e-5)
    for name, gradient in gradients.items():
        error = (gradient - gradients["hf padded"]).norm() / gradients["hf padded"].norm()
        assert error < 1e-5, name


def test_loss_is_the_mean_over_all_supervised_tokens(load: Load):
    model = transformers.LlamaForCausalLM.from_pretrained(load.model, dtype=torch.float64)
    total, count = 0.0, 0
    for sample in load.samples():
        ids = torch.from_numpy(sample.input_ids).long()
        scores = model(ids[None]).logits[0].log_softmax(-1).detach()
        for i in range(1, len(sample)):
            if sample.token_weights[i]:
                total, count = total - float(scores[i - 1, ids[i]]), count + 1
    for name in ("hf padded", "hf packed", "ours"):
        assert step_bench.CANDIDATES[name](load).step() == pytest.approx(total / count, rel=1e-5)
    assert step_bench.fp32_loss(load) == pytest.approx(total / count, rel=1e-5)


def test_tokens_computed(load: Load):
    lengths = [len(sample) for sample in load.samples()]
    assert step_table.computed_when_padded([3, 5, 2, 7, 1, 1]) == 4 * 7 + 2 * 1
    computed = {name: made(load).tokens for name, made in step_bench.CANDIDATES.items()}
    assert computed["hf padded"] == 4 * 584 + 2 * 228 == step_table.computed_when_padded(lengths)
    assert computed["hf packed"] == 2048
    assert computed["ours"] == computed["floor"] == 2048 - len(lengths)


def test_floor_runs_the_products_of_a_step(load: Load):
    floor = step_candidates.Floor(load)
    rows, scored = 2048 - 6, sum(int(s.token_weights.sum()) for s in load.samples())
    q, kv, hidden, inner = 4 * 8, 2 * 8, 32, 48
    for_all, for_scored = 2 * kv * hidden, 2 * q * hidden + 3 * inner * hidden
    first, last = rows * (for_all + for_scored), rows * for_all + scored * for_scored
    by_hand = 3 * 2 * (first + last + scored * hidden * 131)
    with FlopCounterMode(display=False) as counted:
        floor.step()
    assert floor.flops == by_hand == counted.get_total_flops()


# -------------------------------------------------------------------- losses


def test_losses_must_agree():
    same = {"hf padded": 2.0, "ours": 2.0 + 1.9e-5}
    assert check_losses(same, 2.0, torch.float32) == pytest.approx(2e-5)
    with pytest.raises(LossesDisagree, match="^ours must be within 2.00e-05 of 2.0000000"):
        check_losses({"hf padded": 2.0, "ours": 2.0 + 2.1e-5}, 2.0, torch.float32)
    with pytest.raises(LossesDisagree, match="^ours must"):
        check_losses({"hf padded": 2.0, "ours": math.nan}, 2.0, torch.float32)


def test_bf16_may_err_twice_as_much_as_hf_and_one_rounding():
    bound = 2 * 0.01 + 2 * 2**-8
    assert check_losses({"hf padded": 2.01, "ours": 1.98}, 2.0, torch.bfloat16) == (
        pytest.approx(bound)
    )
    with pytest.raises(LossesDisagree, match="^ours must"):
        check_losses({"hf padded": 2.01, "ours": 2.0 - bound - 1e-3}, 2.0, torch.bfloat16)


def test_a_truth_of_other_work_does_not_widen_the_bound():
    with pytest.raises(LossesDisagree, match="^hf padded and ours must"):
        check_losses({"hf padded": 2.0, "ours": 9.0}, 13.1, torch.bfloat16)


class _OneSample(Load):
    def samples(self) -> list[Sample]:
        return super().samples()[:1]


def test_truth_is_of_the_same_samples(load: Load):
    """Whatever a load draws its samples from has to survive the change of dtype."""
    one = _OneSample(load.model, torch.bfloat16, load.tokens, load.seed)
    alone = _OneSample(load.model, torch.float32, load.tokens, load.seed)
    assert step_bench.fp32_loss(one) == step_candidates.HFPadded(alone).loss_only()
    assert step_bench.fp32_loss(one) != pytest.approx(step_bench.fp32_loss(load), rel=1e-3)


# ---------------------------------------------------------------------- time


class _Recorder:
    tokens = 1

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def step(self) -> None:
        self.calls.append(self.name)


def test_rounds_are_interleaved_and_begin_in_turn():
    calls: list[str] = []
    told: list[str] = []
    candidates = {name: _Recorder(name, calls) for name in "abc"}
    times = step_bench.interleaved(candidates, rounds=2, warmup=1, progress=told.append)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}
    assert told[2:4] == ["warm-up: c", "round 1 of 2: b"]


def test_a_timed_step_follows_untimed_ones_of_its_own(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(step_bench.time, "perf_counter", lambda: calls.append("|") or next(clock))
    calls: list[str] = []
    candidates = {name: _Recorder(name, calls) for name in "ab"}
    step_bench.interleaved(candidates, rounds=1, warmup=1, settle=2)
    assert "".join(calls) == "|a|b" + "bb|b|" + "aa|a|"


def test_summary_takes_medians():
    candidates = {name: _Recorder(name, []) for name in ("hf padded", "ours", "floor")}
    times = {"hf padded": [6.0, 4.0, 90.0], "ours": [3.0, 2.0, 1.0], "floor": [1.0, 1.0, 1.0]}
    rows = step_bench.summary(candidates, {"hf padded": 2.0, "ours": 2.0}, times, real_tokens=100)
    ours = rows[1]
    assert (ours["seconds_median"], ours["seconds_min"], ours["seconds_max"]) == (2.0, 1.0, 3.0)
    assert ours["times_floor"] == 2.0 and ours["speedup_over_padded"] == 3.0
    assert ours["real_tokens_per_second"] == 50.0 and rows[2]["loss"] is None


# -------------------------------------------------------------------- memory


def test_probe_measures_its_own_process(load: Load):
    ballast = np.ones(2**27)  # 1 GiB of ours, which getrusage would report for the child, too
    measured = step_bench.peak_memory("ours", load, threads=1)
    assert 50e6 < measured["before_bytes"] <= measured["peak_bytes"] < ballast.nbytes
    assert measured["loss"] == pytest.approx(step_bench.fp32_loss(load), rel=1e-5)


def test_probe_passes_on_why_it_failed(load: Load):
    with pytest.raises(RuntimeError, match="'nobody' failed(.|\n)*invalid choice: 'nobody'"):
        step_bench.peak_memory("nobody", load, threads=1)


# -------------------------------------------------------------------- script


def test_script_prints_tables_and_writes_json(folder: Path, tmp_path: Path):
    out = tmp_path / "results" / "step.json"
    options = ["--model", folder, "--tokens", "600", "--rounds", "3", "--json", out]
    words = [
        sys.executable,
        ROOT / "benchmarks/bench_step.py",
        *options,
        "--threads",
        "1",
        "--no-memory",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "One training step in bfloat16, 600 real tokens, CPU" in done.stdout
    assert "One training step in float32, 600 real tokens, CPU" in done.stdout
    assert "They say nothing about a GPU" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["step.json"]
    text = out.read_text()
    assert str(folder.parent) not in text and str(ROOT) not in text
    tables = json.loads(text)["tables"]
    assert [table["dtype"] for table in tables] == ["bfloat16", "float32"]
    for table in tables:
        rows = {row["candidate"]: row for row in table["rows"]}
        assert list(rows) == ["hf padded", "hf packed", "ten lines", "ours", "floor"]
        assert table["disturbed"] == step_table.disturbed(table["rows"])
        assert all(len(seconds) == 3 for seconds in table["seconds"].values())
        for name, row in rows.items():
            assert (row["loss"] is None) == (name == "floor"), name


def test_script_knows_its_own_candidate_when_probed(load: Load, script: ModuleType):
    measured = step_bench.peak_memory("ten lines", load, threads=1, program=[script.__file__])
    assert measured["loss"] == pytest.approx(step_bench.fp32_loss(load), rel=1e-5)


def test_memory_is_compared_with_padded(load: Load, script: ModuleType, monkeypatch):
    peaks = {"hf padded": {"peak_bytes": 4000}, "ours": {"peak_bytes": 1000}}
    monkeypatch.setattr(step_bench, "peak_memory", lambda name, *_, **__: peaks[name])
    rows = [{"candidate": "ours", "loss": 2.0}, {"candidate": "hf padded", "loss": 2.0}]
    rows.append({"candidate": "floor", "loss": None})
    script.add_memory(rows, load, threads=1, progress=lambda text: None)
    assert [row.get("memory_over_padded") for row in rows] == [0.25, 1.0, None]


def test_script_times_nothing_when_losses_disagree(
    folder: Path, tmp_path: Path, script: ModuleType, monkeypatch, capsys
):
    step = script.Trial.step
    monkeypatch.setattr(script.Trial, "step", lambda self: step(self) * 1.001)
    threads = str(torch.get_num_threads())  # it would be set for the tests that follow
    words = ["--model", folder, "--dtype", "fp32", "--tokens", "300", "--json", tmp_path / "x.json"]
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *map(str, words), "--threads", threads])
    assert script.main() == 1
    out = capsys.readouterr().out
    assert "the losses disagree: ten lines must be within" in out and "real" not in out
    assert not (tmp_path / "x.json").exists()


def test_a_disturbed_table_says_so(load: Load):
    row = {"candidate": "ours", "seconds_min": 1.0, "seconds_max": 1.4}
    result = step_table.describe(load) | {"loss_bound": 1e-5, "loss_fp32_padded": 5.0}
    assert "Disturbed" not in step_table.caption(result | {"rows": [row]})
    row["seconds_max"] = 16.0
    assert "1.5 min of ours. Quote no ratio" in step_table.caption(result | {"rows": [row]})
