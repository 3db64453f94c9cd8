"""The whole-step GPU benchmark on the CPU and tiny: the same work, and figures that follow."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from varlen_sft.tools.step_table import computed_when_padded
from varlen_sft.train.flops import step_flops

transformers = pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # where scripts find each other

import bench_gpu_step  # noqa: E402
import gpu_step_candidates as candidates  # noqa: E402
import gpu_step_models as models  # noqa: E402
import gpu_step_timing  # noqa: E402
from op_groups import Group  # noqa: E402

TINY = models.Load("tiny", tokens=700, seed=8, device="cpu")
PEERS = ["hf padded", "hf padded, 16", "hf packed", "patched", "ours", "compiled ours"]


@pytest.fixture(scope="module")
def model():
    made = models.hf_model(models.SIZES["tiny"], torch.float32, "cpu")
    models.fill(made, seed=1)
    return made


@pytest.fixture(scope="module")
def steps(model):
    made = bench_gpu_step.makers(model, TINY, compiled=False)
    return {name: made[name]() for name in made if name != "Liger padded"}


def test_all_compute_one_loss_and_leave_no_gradients(model, steps):
    truth = steps["hf padded"].loss_only()
    for name, step in steps.items():
        if name != "floor":
            assert float(step()) == pytest.approx(truth, rel=1e-5), name
            assert all(p.grad is None for p in step.model.parameters()), name
    assert [len(steps[name].batches) for name in ("hf padded", "hf padded, 16")] == [2, 1]


def test_parameters_are_shared_and_ours_are_the_same_numbers(model, steps):
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in steps["patched"].model.parameters()} == shared
    own = dict(steps["ours"].model.named_parameters())
    key = model.get_parameter("model.layers.1.self_attn.k_proj.weight")
    assert torch.equal(own["layers.1.self_attn.qkv_proj.weight"][4 * 64 : 6 * 64], key)
    assert own["embed_tokens.weight"] is steps["ours"].model.lm_head.weight
    assert float(key.detach().std()) == pytest.approx(models.STD, rel=0.02)


def test_the_gradients_are_those_of_hf_padded(model, steps):
    own = models.own_model(TINY.config, model)
    loss = own(TINY.batch)
    (loss.loss_sum / loss.weight_sum).backward()
    padded = steps["hf padded"]
    for batch in padded.batches:
        padded.loss(batch).backward()
    for name, parts in models.hf_parts(own).items():
        theirs = torch.cat([model.get_parameter(key).grad for key, _ in parts])
        torch.testing.assert_close(own.get_parameter(name).grad, theirs, rtol=1e-3, atol=1e-6)
    model.zero_grad(set_to_none=True)


def test_the_floor_does_the_products_that_it_counts(steps):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        steps["floor"]()
    assert counted.get_total_flops() == steps["floor"].flops > 0


def test_liger_is_at_work_in_its_own_steps_alone(model, monkeypatch):
    from transformers.models.llama import modeling_llama

    calls, before = [], modeling_llama.apply_rotary_pos_emb

    def rope(*args, **kwargs):
        calls.append(1)
        return before(*args, **kwargs)

    def apply(model):
        modeling_llama.apply_rotary_pos_emb = rope

    fake = SimpleNamespace(apply_liger_kernel_to_llama=apply)  # its kernels need a GPU
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake)
    liger = candidates.Liger(model, TINY.samples)
    loss = float(liger())
    assert len(calls) == 2 * len(liger.batches)  # layers
    assert float(candidates.hf_padded(model, TINY.samples)()) == pytest.approx(loss, rel=1e-6)
    assert len(calls) == 2 * len(liger.batches)
    assert modeling_llama.apply_rotary_pos_emb is before


def test_the_work_is_that_of_the_real_tokens():
    sizes, batch = TINY.config, TINY.batch
    lengths = [len(sample) - 1 for sample in TINY.samples]
    rows = [p + 1 for p, label in zip(batch.position_ids, batch.labels, strict=True) if label >= 0]
    assert sum(len(sample) for sample in TINY.samples) == 700
    assert TINY.flops == step_flops(
        sizes, sum(lengths), sum(n * n for n in lengths), len(rows), pairs=int(sum(rows))
    )


def test_each_round_times_the_second_of_two_steps(monkeypatch):
    made, ran = [], []
    monkeypatch.setattr(gpu_step_timing, "_event", lambda device: made.append(Event()) or made[-1])

    class Event:
        def record(self):
            self.at = len(ran)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)

    steps = {name: lambda name=name: ran.append(name) for name in "abc"}
    assert gpu_step_timing.interleaved(steps, 2, "cpu") == dict.fromkeys("abc", [1.0, 1.0])
    assert "".join(ran) == "aabbcc" + "bbccaa"


def test_memory_is_of_a_candidate_alone():
    group = Group("step", "floor", {}, facts={n: {} for n in ("hf padded", "ours", "floor")})
    group.seconds = {"hf padded": [6.0], "ours": [2.0], "floor": [1.0]}
    extra = {"hf padded": 9e9, "ours": 5e9, "floor": 7e9}
    first = {name: gpu_step_timing.Alone(1.0, 0.5, int(more)) for name, more in extra.items()}
    bench_gpu_step.add_costs(group, first, weights=1_000_000_000)
    assert group.facts["ours"] == {
        "host ms": 500, "peak GB": 6, "over weights GB": 5, "memory vs padded": 0.6,
    }  # fmt: skip
    assert group.facts["floor"] == {"host ms": 500}
    assert [(goal.value, goal.met) for goal in bench_gpu_step.goals(group)] == [(3, True)]


def run(monkeypatch, path, *more):
    words = ["bench_gpu_step.py", "--device", "cpu", "--sizes", "tiny", "--tokens", "700"]
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "1", "--json", str(path), *more])
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    return bench_gpu_step.main()


def test_whole_script_on_the_cpu(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path / "step.json", "--seed", "8") == 0
    (table,) = json.loads((tmp_path / "step.json").read_text())["tables"]
    rows, truth = table["rows"], table["loss_fp32_padded"]
    assert [name for name in rows if name != "Liger padded"] == [*PEERS, "floor"]
    assert "Liger padded" in rows or "Liger padded" in table["missing"]
    assert all(abs(rows[name]["loss"] - truth) <= table["loss_bound"] for name in PEERS)
    assert 0 < table["loss_bound"] < 0.06 and truth == pytest.approx(5.6, abs=0.2)
    lengths = table["lengths"]
    assert rows["hf padded"]["rows"] == computed_when_padded(lengths) > sum(lengths) == 700
    assert rows["ours"]["rows"] == 700 - len(lengths)
    ours = rows["ours"]
    assert ours["real tokens/s"] == round(700 / ours["seconds_median"])
    assert ours["TFLOP/s"] * 1e12 * ours["seconds_median"] == pytest.approx(TINY.flops)
    ratio = rows["hf padded"]["seconds_median"] / ours["seconds_median"]
    assert ours["vs padded"] == pytest.approx(ratio) == table["goals"][0]["value"]
    shown = capsys.readouterr().out
    for word in ("hf padded, 16", "real tokens/s", "TFLOP/s", "host ms", "at least 2.8"):
        assert word in shown
    assert "memory" not in shown  # which the host's clock cannot tell


def test_another_loss_is_no_table(tmp_path, monkeypatch, capsys):
    class Wrong(candidates.Ours):
        def __call__(self):
            return 1.01 * super().__call__()

    monkeypatch.setattr(bench_gpu_step, "Ours", Wrong)
    assert run(monkeypatch, tmp_path / "step.json", "--no-compile") == 1
    assert "No table of tiny: ours must be within" in capsys.readouterr().out
    assert json.loads((tmp_path / "step.json").read_text())["tables"] == []
