"""``check`` on patched models of other families, and on what Hugging Face does wrong."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import ROPE_PARAMETERS
from tests.integrations.families import FAMILIES, tiny_hf
from tests.tools.small_tokenizer import VOCAB, write_tokenizer
from varlen_sft import cli
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.check import CheckOptions, check, prepare
from varlen_sft.tools.check_finding import Subject
from varlen_sft.tools.check_impls import chosen, implementations
from varlen_sft.tools.check_subject import PatchedModel, load_model

SMALL = {"conversations": 10, "prompts": 2, "generated": 4}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a folder with a tiny model of a family, a tokenizer and a template."""

    def make(name: str, seed: int = 0, **changes):
        folder = tmp_path_factory.mktemp(name)
        sizes = {"vocab_size": VOCAB, "max_position_embeddings": 2048, **changes}
        model = tiny_hf(name, torch.float32, seed, **sizes)
        model.config._attn_implementation = "eager"
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return make


def checked(folder, **more) -> dict:
    options = CheckOptions(model=folder, **SMALL, **more)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    return check(Subject(load_model(folder, dtype)), options, prepare(options))


def failed(result) -> list:
    return [f for f in result["findings"] if f["verdict"] == "fail"]


OTHERS = ["qwen3", "granite", "smollm3", "gemma3", "olmo2"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_patched_model_equals_its_conversations_alone(name, folder_of):
    folder = folder_of(name)
    assert isinstance(load_model(folder, torch.float32), PatchedModel)
    result = checked(folder)
    assert failed(result) == []
    layers = FAMILIES[name]().num_hidden_layers
    assert len(result["layers"]) == layers + 2
    ours = [route["name"] for route in result["routes"] if route["ours"]]
    assert ours == [f"patched: {label}" for label in implementations(torch.device("cpu"))]
    angles = next(f for f in result["findings"] if f["property"].startswith("RoPE angles"))
    assert angles["verdict"] == "pass"


def test_a_patched_model_in_bf16(folder_of):
    assert failed(checked(folder_of("mistral"), dtype="bf16")) == []


def test_a_fault_in_a_patched_model_is_named(folder_of):
    folder = folder_of("qwen2")
    options = CheckOptions(model=folder, **SMALL)
    subject = Subject(load_model(folder, torch.float32))
    with torch.no_grad():
        subject.model.hf.model.layers[1].self_attn.v_proj.weight[0] *= 1.5
    names = {f["property"]: f["detail"] for f in failed(check(subject, options, prepare(options)))}
    assert names["weights are those of transformers"].startswith(
        "model.layers.1.self_attn.v_proj.weight differs"
    )
    logits = names["logits of every position are those of HF alone"]
    assert "first difference after layer 1" in logits


def test_length_dependent_rope_is_told_of_hugging_face_and_not_of_ours(folder_of):
    rope = {**ROPE_PARAMETERS["longrope"], "original_max_position_embeddings": 200}
    folder = folder_of("llama3", seed=1, rope_parameters=rope)
    assert isinstance(load_model(folder, torch.float32), LlamaForSFT)
    result = checked(folder)
    assert failed(result) == []
    notes = {f["property"]: f["detail"] for f in result["findings"] if f["verdict"] == "note"}
    for kind in ("padded", "packed by position_ids"):
        detail = notes[f"Hugging Face, {kind}: as alone"]
        assert detail.startswith("it is not: log-probability, loss")
        assert "its frequencies are those of the longest conversation" in detail
    assert "samples above 200 tokens" in notes["transformers' RoPE by itself"]


def test_every_implementation_is_asked_for():
    """The sets name each implementation that runs here, and inside ``chosen`` it alone is known."""
    from varlen_sft.ops.backends import BACKENDS, backends, resolve

    sets = implementations(torch.device("cpu")).values()
    for op in ("attention", "rope", "cross_entropy", "elementwise"):
        able = {name for name, word in backends("cpu")[op] if word.startswith(("picked", "avail"))}
        assert {impls[op] for impls in sets} == able
    before = dict(BACKENDS)
    with chosen({"rope": "reference"}):
        assert resolve("rope", None, torch.device("cpu")) == "reference"
    assert before == BACKENDS


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "cohere"}, "got 'cohere': it has interleaved RoPE"),
        ({"model_type": "nothing"}, "got 'nothing'"),
    ],
)
def test_other_families_are_refused_by_name(change, reason, folder_of, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 9, **change}))
    assert cli.main(["check", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
