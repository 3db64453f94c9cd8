"""The scripts under examples/ run: chats in, answers trained, a checkpoint out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import relative_error
from tests.integrations.families import tiny_hf
from tests.integrations.steps import (
    ONE_STEP,
    QUIET,
    ROOT,
    alone,
    assert_step,
    eight_samples,
)
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import tokenize_source

transformers = pytest.importorskip("transformers")
for package in ("accelerate", "datasets", "peft", "trl"):
    pytest.importorskip(package)
sys.path.append(str(ROOT / "examples"))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def expected(folder, chats):
    """Loss and gradients of all answers, each chat alone in HF's model."""
    samples = [
        s for _, row in tokenize_source(chats, ChatTokenizer.from_folder(folder)) for s in row
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return alone(model, samples)


ALL_IN_ONE_STEP = ONE_STEP | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}


def saved_steps(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """By how much each weight of a checkpoint moved."""
    from safetensors.torch import load_file

    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    return {name: before[name] - after[name] for name in before}


def test_trainer(tmp_path, folder, chats, expected):
    import hf_trainer

    trainer = hf_trainer.main(folder, chats, tmp_path, **ALL_IN_ONE_STEP)
    loss, gradients = expected
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(loss), rel=1e-5)
    for name, step in saved_steps(folder, tmp_path).items():
        # weights of size 0.3 in fp32 moved by gradients of any size
        assert relative_error(step, gradients[name]) < 1e-3, name


def test_trl(tmp_path, folder, chats, expected, monkeypatch):
    import datasets
    import trl
    import trl_sft

    monkeypatch.setattr(trl.SFTTrainer, "_send_telemetry", lambda self: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    trainer = trl_sft.main(folder, chats, tmp_path, bf16=False, **ALL_IN_ONE_STEP)
    assert trainer.args.gradient_checkpointing  # TRL's default
    loss, gradients = expected
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert 0 < first["entropy"] < 11 and 0 <= first["mean_token_accuracy"] <= 1
    for name, step in saved_steps(folder, tmp_path).items():
        assert relative_error(step, gradients[name]) < 1e-3, name


def test_peft_lora(tmp_path, folder, chats, expected):
    import peft
    import peft_lora

    trainer = peft_lora.main(
        folder, chats, tmp_path, **QUIET, per_device_train_batch_size=8, max_steps=3,
        learning_rate=0.01,
    )  # fmt: skip
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(float(expected[0]), rel=1e-5)  # B starts as zero
    assert losses[2] < losses[1] < losses[0]
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        trained = trainer.model.eval()(input_ids=ids).logits
        assert relative_error(loaded.eval()(input_ids=ids).logits, trained) < 1e-6


def test_fsdp2_shards_and_steps_as_one_big_batch(two_ranks):
    step = two_ranks[0]["fsdp2"]
    assert step["kinds"] == {"DTensor"}
    loss, gradients = alone(tiny_hf("llama3", attention="sdpa"), eight_samples(fractional=True))
    assert step["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert_step(step["before"], step["after"], gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp2_from_chats_to_a_checkpoint(two_ranks, folder, expected, dtype):
    first, second = two_ranks[0][dtype]
    error = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert first == pytest.approx(float(expected[0]), rel=error)
    assert second < first
    steps = saved_steps(folder, two_ranks[1] / str(dtype))
    assert all(step.dtype == torch.float32 for step in steps.values())
    assert all(0 < float(step.abs().max()) < 0.03 for step in steps.values())  # AdamW at 0.01
