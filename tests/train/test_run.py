from __future__ import annotations

import json
import math
import os
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.data.prepared import chats, jsonl
from tests.train.ranks import on_ranks
from tests.train.setups import small_run
from varlen_sft.errors import InputError, RunError
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.run_report import write_run_report
from varlen_sft.train import checkpoint
from varlen_sft.train.checkpoint import Checkpointer
from varlen_sft.train.config_file import read_config
from varlen_sft.train.journal import Journal
from varlen_sft.train.run import run


def train(folder: Path, *arguments: str, report: Any = None) -> tuple[str, str]:
    """(how it ended, what was said)."""
    console = Console(record=True, width=200, file=open(os.devnull, "w"))
    with console.file:
        config, quiet = small_run(folder, *arguments), lambda: nullcontext(lambda *a: None)
        ended = run(config, console, quiet, report)
    return ended, console.export_text()


def log(folder: Path, event: str = "step") -> list[dict[str, Any]]:
    lines = (folder / "out" / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == event]


def numbers(folder: Path) -> list[tuple]:
    """What of the steps does not depend on time."""
    names = ("step", "loss", "grad_norm", "lr", "epoch", "real_tokens", "supervised_tokens")
    return [tuple(step[name] for name in names) for step in log(folder)]


def weights(folder: Path) -> bytes:
    return (folder / "out" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps."""
    folder = tmp_path_factory.mktemp("whole")
    ended, said = train(folder, "--valid_every", "4", "--checkpoint.every", "4", "--lr", "0.01")
    assert ended == "finished"
    (folder / "said").write_text(said)
    return folder


def test_a_run_leaves_a_model_its_log_and_its_configuration(whole):
    steps = log(whole)
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert [step["epoch"] for step in steps] == [0, 0, 0, 1, 1, 1]
    assert steps[0]["fill"] == steps[0]["real_tokens"] / (4 * 128)
    assert steps[3]["loss"] < 0.8 * steps[0]["loss"]
    validated = log(whole, "validation")
    assert [line["step"] for line in validated] == [4, 6]
    assert validated[1]["loss"] < validated[0]["loss"] < steps[0]["loss"]
    said = (whole / "said").read_text()
    assert f"step 6: validation loss {validated[1]['loss']:.4f}" in said
    assert log(whole, "start")[0]["config"]["optim.lr"] == 0.01
    config = read_config(whole / "out" / "config.yaml")
    expected = ("--valid_every", "4", "--checkpoint.every", "4", "--lr", "0.01")
    assert config == small_run(whole, *expected)
    names = sorted(p.name for p in (whole / "out" / "checkpoints").glob("step-*"))
    assert names == ["step-00000004", "step-00000006"]
    model = whole / "out" / "model"
    assert (model / "chat_template.jinja").read_bytes() == (
        whole / "llama" / "chat_template.jinja"
    ).read_bytes()
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model).state_dict()
    own = LlamaForSFT.from_pretrained(model)
    assert torch.equal(theirs["model.embed_tokens.weight"], own.embed_tokens.weight)
    before = LlamaForSFT.from_pretrained(whole / "llama")
    assert not torch.equal(before.embed_tokens.weight, own.embed_tokens.weight)


def stop_after(monkeypatch, number: int, number_of_signal: int) -> None:
    """The signal comes while the record of a step is taken."""
    written = Journal.step

    def step(journal: Journal, record: Any) -> None:
        written(journal, record)
        if record.step == number:
            os.kill(os.getpid(), number_of_signal)

    monkeypatch.setattr(Journal, "step", step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, number):
    arguments = ("--valid_every", "4", "--checkpoint.every", "4", "--lr", "0.01")
    with monkeypatch.context() as patched:
        stop_after(patched, 2, number)
        ended, said = train(tmp_path, *arguments, report=write_run_report)
    done = log(tmp_path)[-1]["step"]
    assert ended == "asked" and 2 <= done <= 4
    assert f"saved after step {done}; to go on: " in said
    assert not (tmp_path / "out" / "model").exists()
    page = tmp_path / "out" / "report.html"
    assert f"written: {page}" in said and "</html>" in page.read_text()
    with (tmp_path / "out" / "log.jsonl").open("a") as file:
        file.write('{"event": "st')  # as a killed run may leave it
    ended, said = train(tmp_path, *arguments)
    assert ended == "finished" and f"goes on after step {done} of 6" in said
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert lines.count('{"event": "st') == 1
    (tmp_path / "out" / "log.jsonl").write_text(
        "\n".join(line for line in lines if line != '{"event": "st') + "\n"
    )
    assert numbers(tmp_path) == numbers(whole)
    assert weights(tmp_path) == weights(whole)


def test_what_was_changed_is_told_and_other_batches_are_refused(whole):
    ended, said = train(whole, "--valid_every", "4", "--checkpoint.every", "4", "--lr", "0.5")
    assert ended == "finished" and "optim.lr was 0.01, is 0.5" in said
    assert [step["step"] for step in log(whole)] == list(range(1, 7))  # it was at its end
    kept = (whole / "out" / "config.yaml").read_bytes()
    with pytest.raises(InputError, match="seed was 0, is 1"):
        train(whole, "--seed", "1")
    with pytest.raises(InputError, match="checkpoints: the folder has checkpoints of a run"):
        train(whole, "--resume", "false")
    assert (whole / "out" / "config.yaml").read_bytes() == kept


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path):
    with pytest.raises(RuntimeError, match="the loss is nan|the gradient's norm nan"):
        train(tmp_path, "--lr", "1e38", "--checkpoint.every", "1", "--warmup", "0")
    assert list((tmp_path / "out" / "checkpoints").glob("step-0*1"))


def test_a_step_is_validated_and_then_saved_once(tmp_path, monkeypatch):
    save, found = Checkpointer.save, []

    def noted(checkpoints: Checkpointer, parts: Any, step: int) -> None:
        found.append((step, [line["step"] for line in log(tmp_path, "validation")]))
        save(checkpoints, parts, step)

    monkeypatch.setattr(Checkpointer, "save", noted)
    train(tmp_path, "--valid_every", "3", "--checkpoint.every", "3")
    assert found == [(3, [3]), (6, [3, 6])]


def test_a_checkpoint_that_fails_ends_the_run_before_the_next(tmp_path, monkeypatch):
    def full(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    written = Journal.step

    def step(journal: Journal, record: Any) -> None:
        written(journal, record)
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join(60)

    monkeypatch.setattr(checkpoint, "publish", full)
    monkeypatch.setattr(Journal, "step", step)
    with pytest.raises(RunError, match="step-00000006.tmp: .*No space left on device"):
        train(tmp_path, "--steps", "18", "--checkpoint.every", "6", "--valid", "[]")
    assert 7 <= log(tmp_path)[-1]["step"] < 12


COMPILED = pytest.param(
    ("--impl", "hf", "--compile", "true"),
    marks=[pytest.mark.e2e, pytest.mark.filterwarnings("default")],  # of the compiler
)


@pytest.mark.parametrize(
    "options", [("--impl", "hf"), ("--lora_rank", "2"), ("--isolate=false",), COMPILED]
)
def test_other_models_and_modes_train(tmp_path, options):
    ended, _ = train(tmp_path, "--steps", "3", "--lr", "0.01", "--valid_every", "3", *options)
    steps = log(tmp_path)
    assert ended == "finished" and steps[2]["updated"] and math.isfinite(steps[2]["loss"])
    assert [line["step"] for line in log(tmp_path, "validation")] == [3]
    names = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert "tokenizer.json" in names
    assert ("adapter_config.json" in names) == ("--lora_rank" in options)


def on_two(folder: Path, strategy: str, *options: str) -> tuple[str, str]:
    arguments = ("--lr", "0.01", "--checkpoint.every", "3", *options)
    return train(folder, "--strategy", strategy, *arguments)


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.e2e)])
def test_two_ranks_train_what_one_does(whole, tmp_path, strategy):
    small_run(tmp_path)  # writes the files
    first, second = on_ranks(2, on_two, tmp_path, strategy)
    assert first[0] == second[0] == "finished" and first[1] and not second[1]
    alone, both = numbers(whole), numbers(tmp_path)
    assert [step[3:] for step in alone] == [step[3:] for step in both]
    # Before the first update only sums have another order: some roundings of fp32. Then AdamW makes
    # up to lr of what is nothing but rounding (test_parallel holds the loop to numbers).
    for at, (one, two) in enumerate(zip(alone, both, strict=True)):
        assert math.isclose(one[1], two[1], rel_tol=1e-3 if at else 1e-6), at
    assert math.isclose(alone[0][2], both[0][2], rel_tol=1e-5)
    assert len(log(tmp_path, "start")) == 1
    models = [LlamaForSFT.from_pretrained(f / "out" / "model") for f in (whole, tmp_path)]
    one, two = (model.embed_tokens.weight.detach() for model in models)
    assert float((one - two).norm() / one.norm()) < 1e-3


def test_what_rank_0_finds_wrong_with_the_data_every_rank_is_told(tmp_path):
    small_run(tmp_path)
    bad = jsonl(tmp_path / "bad.jsonl", [*chats(2), {"messages": []}])
    first, second = on_ranks(2, on_two, tmp_path, "ddp", "--train", str(bad))
    assert first[0] == "InputError" and "bad.jsonl, row 3" in first[1]
    assert second[0] == "RankLost" and "bad.jsonl, row 3" in second[1]
