"""A check is worth what it catches: every planted fault is seen, and named."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import tiny_hf_config, tiny_model
from tests.tools.small_tokenizer import VOCAB, write_tokenizer
from varlen_sft import cli, reference
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.tools.check import CheckOptions, check, prepare
from varlen_sft.tools.check_finding import Finding, Subject
from varlen_sft.tools.check_impls import implementations
from varlen_sft.tools.demo_model import smollm2_folder

IMPLS = list(implementations(torch.device("cpu")))
FINDINGS = 15 + 2 + len(IMPLS) + 1
"""Properties, Hugging Face padded and packed, ours by each implementation, the patched model."""


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> CheckOptions:
    """A tiny Llama with a tokenizer and template; few and short conversations."""
    folder = tmp_path_factory.mktemp("model")
    config = tiny_hf_config(vocab_size=VOCAB, max_position_embeddings=2048, pad_token_id=2)
    config |= {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    tiny_model(config, torch.float32).save_pretrained(folder)
    write_tokenizer(folder)
    return CheckOptions(model=folder, conversations=20, prompts=2, generated=4)


@pytest.fixture(scope="module")
def material(options):
    return prepare(options)


@pytest.fixture
def subject(options) -> Subject:
    return Subject(LlamaForSFT.from_pretrained(options.model, dtype=torch.float32))


def failures(subject, options, material) -> dict[str, str]:
    findings = check(subject, options, material)["findings"]
    return {f["property"]: f["detail"] for f in findings if f["verdict"] == "fail"}


def changed(batch: PackedBatch, **fields) -> PackedBatch:
    """A pack that its own invariants would refuse."""
    twin = object.__new__(PackedBatch)
    for name, value in {**vars(batch), **fields}.items():
        object.__setattr__(twin, name, value)
    return twin


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_sound_model_passes(dtype, options, material):
    wanted = replace(options, dtype=dtype)
    weights = LlamaForSFT.from_pretrained(
        options.model, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16
    )
    result = check(Subject(weights), wanted, material)
    assert [f for f in result["findings"] if f["verdict"] == "fail"] == []
    assert len(result["findings"]) == FINDINGS
    assert_routes(result["routes"])
    assert [row["name"] for row in result["layers"]] == ["embedding", "layer 0", "layer 1", "norm"]
    assert all(0 <= row["ours"] <= row["bound"] for row in result["layers"])
    rows = [len(sample) - 1 for sample in material.samples]
    assert [len(row["errors"]) for row in result["positions"]] == rows


def assert_routes(routes):
    alone, padded, packed, *ours, patched = routes
    assert [r["name"] for r in ours] == [f"LlamaForSFT: {label}" for label in IMPLS]
    assert alone["name"] == "Hugging Face, alone" and padded["name"] == "Hugging Face, padded"
    assert packed["name"].startswith("Hugging Face, packed") and patched["name"] == "patched"
    for route in routes[1:]:
        assert list(route["figures"]) == [
            "log-probability", "loss", "gradient of embedding", "gradient of attention",
            "gradient of MLP", "gradient of norms", "leakage", "generated",
        ]  # fmt: skip
        assert route["figures"]["leakage"] == {"error": 0.0, "bound": 0.0}
        for group, norm in route["norms"].items():
            assert norm == pytest.approx(alone["norms"][group], rel=0.02)


def not_reset(samples, **pad):
    batch = collate(samples, **pad)
    return changed(batch, position_ids=torch.arange(len(batch.position_ids)))


def boundary_label(samples, **pad):
    """Shift after packing: the last token of a conversation learns the first of the next."""
    ids = torch.from_numpy(np.concatenate([s.input_ids for s in samples])).long()
    sequences = sequences_from_lengths([len(s) for s in samples])
    labels = ids.roll(-1)
    labels[-1] = -100
    weights = (labels != -100).float()
    return PackedBatch(
        input_ids=ids,
        labels=labels,
        token_weights=weights,
        position_ids=reference.position_ids_from_lengths([len(s) for s in samples]),
        cu_seqlens=sequences.cu_seqlens,
        max_seqlen=sequences.max_seqlen,
        num_sequences=sequences.num_sequences,
        rows=torch.arange(len(ids)),
        weight_sum=weights.sum(),
    )


def shifted_twice(samples, **pad):
    batch = collate([replace(s, token_weights=s.token_weights * 0 + 1) for s in samples], **pad)
    labels = batch.labels.roll(-1)
    return changed(batch, labels=labels.where(batch.token_weights > 0, -100))


def zero_tail(samples, pad_to=None, **more):
    batch = collate(samples, pad_to=pad_to, **more)
    if not batch.pad_tokens:
        return batch
    real = batch.real_tokens
    ids = batch.position_ids.clone()
    ids[real:] = 0
    kept = batch.cu_seqlens[batch.cu_seqlens <= real]
    tail = torch.arange(real + 1, len(ids) + 1, dtype=torch.int32)
    return changed(batch, position_ids=ids, cu_seqlens=torch.cat((kept, tail)))


@pytest.mark.parametrize(
    ("fault", "row", "name"),
    [
        (not_reset, "positions restart", "positions are not reset: row .* of conversation 1"),
        (boundary_label, "every row learns the next token", "a boundary label is trained"),
        (shifted_twice, "every row learns the next token", "the label shift is off by one"),
        (zero_tail, "the pad tail costs nothing", "37 sequences, 1 would do: .* are all 0"),
    ],
)
def test_a_fault_in_the_pack_is_named(fault, row, name, subject, options, material):
    subject.collate = fault
    failed = failures(subject, options, material)
    detail = next(detail for text, detail in failed.items() if text.startswith(row))
    assert re.search(name, detail), failed


def test_attention_across_samples_is_named(subject, options, material):
    honest = subject.model.hidden_states

    def leaking(input_ids, position_ids, sequences, last=None):
        return honest(input_ids, position_ids, sequences_from_lengths([len(input_ids)]), last)

    subject.model.hidden_states = leaking
    failed = failures(subject, options, material)
    assert "attention reaches across samples" in failed["no gradient crosses an edge"]
    logits = failed["logits of every position are those of HF alone"]
    assert "first difference after layer 0" in logits
    assert "the pack's loss is the sum over conversations alone" in failed


def test_another_rope_base_is_named(subject, options, material):
    subject.model.rotary.rope_parameters["rope_theta"] = 5000.0
    failed = failures(subject, options, material)
    detail = next(d for text, d in failed.items() if text.startswith("RoPE angles"))
    assert detail == "the RoPE base is 5,000, the model's is 10,000"


def test_frequencies_rounded_to_bf16_are_named(subject, options, material, monkeypatch):
    honest = reference.inverse_frequencies

    def rounded(*args, **kwargs):
        inv_freq, scaling = honest(*args, **kwargs)
        return inv_freq.bfloat16().float(), scaling

    monkeypatch.setattr(reference, "inverse_frequencies", rounded)
    failed = failures(subject, options, material)
    detail = next(d for text, d in failed.items() if text.startswith("RoPE angles"))
    assert detail == "inv_freq was rounded to bf16 before the angles were made"


def test_a_permuted_head_is_named_with_its_layer(subject, options, material):
    weight = subject.model.layers[1].self_attn.qkv_proj.weight
    with torch.no_grad():
        heads = weight[:64].view(4, 16, -1)
        heads[[0, 3]] = heads[[3, 0]].clone()
    failed = failures(subject, options, material)
    assert failed["weights are those of transformers"] == (
        "attention heads are permuted: model.layers.1.self_attn.q_proj.weight, head 0 holds head 3"
    )
    logits = failed["logits of every position are those of HF alone"]
    assert "first difference after layer 1" in logits


def test_a_mean_of_means_is_named(subject, options, material):
    subject.mean_loss = lambda outputs: torch.stack(
        [output.loss_sum / output.weight_sum for output in outputs]
    ).mean()
    failed = failures(subject, options, material)
    assert list(failed) == ["micro-batches add up to one batch"]
    assert "it is the mean of the micro-batches' means" in failed[next(iter(failed))]


def test_a_nan_fails():
    assert Finding.measured("x", float("nan"), 1.0).verdict == "fail"
    assert Finding.measured("x", 1.0, 1.0).verdict == "pass"


def test_the_command_prints_a_screen_and_exits_with_1_on_failure(
    options, tmp_path, capsys, monkeypatch
):
    words = ["check", str(options.model), "--conversations", "20", "--prompts", "1",
             "--generated", "2", "--json", str(tmp_path / "c.json")]  # fmt: skip
    assert cli.main(words) == 0
    screen = capsys.readouterr().out
    assert "packed equals alone" in screen and "FAIL" not in screen
    result = json.loads((tmp_path / "c.json").read_text())
    assert result["conversations"] == 20 and len(result["findings"]) == FINDINGS
    assert "LlamaForSFT: " in screen and "Hugging Face, padded" in screen
    monkeypatch.setattr("varlen_sft.tools.check_finding.collate", zero_tail)
    monkeypatch.setattr(Subject, "__init__", lambda self, model: self.__dict__.update(
        model=model, collate=zero_tail, mean_loss=Subject.mean_loss))  # fmt: skip
    assert cli.main(words) == 1
    assert "FAIL" in capsys.readouterr().out


def test_bad_input_is_named_before_weights_are_loaded(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForSFT, "from_pretrained", None)  # nothing may ask for weights
    assert cli.main(["check", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    few.write_text(json.dumps(row) + "\n")
    assert cli.main(["check", str(options.model), "--data", str(few)]) == 2
    assert "few.jsonl: four conversations or more are needed, got 1" in capsys.readouterr().err


def test_smollm2_packed_equals_smollm2_alone(tmp_path):
    """The real model: 50 conversations, 640 tokens that HF generated, every gradient."""
    wanted = CheckOptions(model=smollm2_folder())
    ours = Subject(LlamaForSFT.from_pretrained(wanted.model, dtype=torch.float32))
    findings = check(ours, wanted, prepare(wanted))["findings"]
    assert [f for f in findings if f["verdict"] == "fail"] == []
    generated = next(f for f in findings if f["property"].startswith("64 greedy tokens"))
    assert (
        generated["detail"].endswith("of 640 equal, 0 near ties") or generated["verdict"] == "pass"
    )
    positions = next(f for f in findings if f["property"].startswith("the most likely"))
    assert positions["worst"] <= 1e-3
