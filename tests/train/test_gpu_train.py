"""On a CUDA device (make gpu): training there is training on a CPU, and waits for nothing."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from tests.train.runs import build, stream, train
from varlen_sft.ops.rope import rope_table
from varlen_sft.train.distributed import World
from varlen_sft.train.options import TrainOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make gpu)"),
]


def test_a_run_in_fp64_is_that_of_the_cpu(monkeypatch):
    """Five steps of two accumulated micro-batches: losses, norms, weights, moments.

    RoPE's tables are fp32, and CUDA's sine and cosine another function's: both get the CPU's.
    """

    def made_on_the_cpu(*args, device, **kwargs):
        return tuple(table.to(device) for table in rope_table(*args, **kwargs))

    monkeypatch.setattr("varlen_sft.modules.rope_table", made_on_the_cpu)
    there, here = (train(World(device=torch.device(d)), "ddp", 2) for d in ("cuda", "cpu"))
    assert there["ended"] == here["ended"] == "finished"
    for a, b in zip(there["records"], here["records"], strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-10)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-10)
        assert a.supervised_tokens == b.supervised_tokens and a.squares == b.squares
    for part in ("weights", "masters", "exp_avg"):
        for name, value in here[part].items():
            error = (there[part][name].cpu() - value).norm() / value.norm().clamp(min=1e-30)
            assert error < 1e-10, (part, name, error)


def test_the_loop_waits_for_nothing_but_the_numbers_of_the_step_before():
    here = World(device=torch.device("cuda"))
    loop = build(here, "ddp", torch.bfloat16, TrainOptions(max_steps=6, lr=1e-3))
    seen = []

    def watched(record):
        seen.append(record)
        if record.step == 2:  # everything is compiled, and every table made
            torch.cuda.set_sync_debug_mode("error")

    try:
        ended = loop.run(stream(here, 2), on_step=watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ended == "finished" and [record.step for record in seen] == [1, 2, 3, 4, 5, 6]
    assert seen[-1].loss < seen[0].loss and seen[-1].peak_memory > 0


def test_a_whole_run_exports_a_model_and_resumes(tmp_path: Path):
    """Six steps in bf16 against four, a stop and two more: transformers reads what is left."""
    pytest.importorskip("jsonargparse")
    transformers = pytest.importorskip("transformers")
    from rich.console import Console

    from tests.train.setups import small_run
    from varlen_sft.train.run import run

    def trained(name: str, *arguments: str) -> list[dict]:
        out = tmp_path / name
        words = ("--model.dtype", "bf16", "--checkpoint.every", "4", "--run.out", str(out))
        ended = run(
            small_run(tmp_path, *words, *arguments), Console(quiet=True),
            lambda: nullcontext(lambda *a: None),
        )  # fmt: skip
        assert ended == "finished"
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == "step"]

    whole = trained("whole")
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    assert all(line["peak_memory"] > 0 for line in whole)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 7)
    (tmp_path / "whole" / "checkpoints" / "step-00000006").rename(tmp_path / "gone")
    again = trained("whole")
    assert [line["step"] for line in again][-2:] == [5, 6]
    # Attention's backward adds up dq in any order: bits differ, and no more than bf16 rounding.
    for a, b in zip(again[-2:], whole[-2:], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2**-8)
        assert a["real_tokens"] == b["real_tokens"]
