from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import tiny_hf_config, tiny_model
from varlen_sft.errors import InputError
from varlen_sft.models.checkpoint import INDEX, WEIGHTS
from varlen_sft.models.export import save_checkpoint
from varlen_sft.models.llama import LlamaForSFT


@pytest.fixture
def hf_folder(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "hf"
    config = LlamaConfig(**tiny_hf_config("llama3"))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_what_transformers_saved_comes_back_byte_for_byte(hf_folder, tmp_path):
    out = tmp_path / "ours"
    LlamaForSFT.from_pretrained(hf_folder).save_pretrained(out, copy_from=hf_folder)
    assert (out / WEIGHTS).read_bytes() == (hf_folder / WEIGHTS).read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (hf_folder / "config.json").read_text()
    )
    again = LlamaForCausalLM.from_pretrained(out)
    expected = LlamaForCausalLM.from_pretrained(hf_folder)
    for (name, a), b in zip(
        again.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_shards_go_out_and_come_in(hf_folder, tmp_path):
    model = LlamaForSFT.from_pretrained(hf_folder)
    out = tmp_path / "shards"
    save_checkpoint(model, out, max_shard_bytes=4000)
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (out / WEIGHTS).exists()
    merged = {key: value for shard in shards for key, value in load_file(shard).items()}
    original = load_file(hf_folder / WEIGHTS)
    assert merged.keys() == original.keys()
    assert all(torch.equal(merged[key], original[key]) for key in original)
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    back = LlamaForSFT.from_pretrained(out)
    for a, b in zip(back.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    LlamaForCausalLM.from_pretrained(out)  # transformers reads our index


def test_shards_that_transformers_wrote(hf_folder, tmp_path):
    out = tmp_path / "hf-shards"
    hf = LlamaForCausalLM.from_pretrained(hf_folder)
    hf.save_pretrained(out, max_shard_size="8KB")
    assert (out / INDEX).exists()
    model = LlamaForSFT.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, hf.lm_head.weight)
    up = hf.model.layers[1].mlp.up_proj.weight
    assert torch.equal(model.layers[1].mlp.gate_up_proj.weight[48:], up)


def test_a_cast_is_written_into_the_config(hf_folder, tmp_path):
    model = LlamaForSFT.from_pretrained(hf_folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "fp32")
    assert json.loads((tmp_path / "fp32/config.json").read_text())["dtype"] == "float32"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "fp32").dtype == torch.float32


def test_transformers_is_not_imported(hf_folder):
    code = f"""
import sys
sys.modules["transformers"] = None
from varlen_sft.models.llama import LlamaForSFT
LlamaForSFT.from_pretrained({str(hf_folder)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "config.json: model_type must be one of llama, got 'gemma2'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0, got 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints are not supported"),
        (
            {"intermediate_size": 50},
            r"model.safetensors: tensor model.layers.0.mlp.gate_proj.weight must have shape "
            r"\(50, 32\) by config.json, got \(48, 32\)",
        ),
        ({"num_hidden_layers": 3}, "lacks tensor model.layers.2.input_layernorm.weight and 8 more"),
        ({"num_hidden_layers": 1}, "has unknown tensor model.layers.1.input_layernorm"),
    ],
)
def test_what_does_not_fit_is_named(hf_folder, changes, message):
    change_config(hf_folder, **changes)
    with pytest.raises(InputError, match=message):
        LlamaForSFT.from_pretrained(hf_folder)


def test_missing_and_damaged_files_are_named(hf_folder, tmp_path):
    with pytest.raises(InputError, match="nothing: no config.json"):
        LlamaForSFT.from_pretrained(tmp_path / "nothing")
    weights = hf_folder / WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="model.safetensors: not a readable safetensors file"):
        LlamaForSFT.from_pretrained(hf_folder)
    weights.unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor model.safetensors.index"):
        LlamaForSFT.from_pretrained(hf_folder)
    (hf_folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(InputError, match="'../../etc/passwd' must be a file of this folder"):
        LlamaForSFT.from_pretrained(hf_folder)
    (hf_folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: Expecting property name"):
        LlamaForSFT.from_pretrained(hf_folder)


def test_a_failed_save_leaves_the_old_file(hf_folder, monkeypatch):
    import safetensors.torch

    before = (hf_folder / WEIGHTS).read_bytes()

    def full_disk(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(tiny_hf_config()).save_pretrained(hf_folder)
    assert (hf_folder / WEIGHTS).read_bytes() == before
    assert not list(hf_folder.glob(".*"))


def test_a_tied_head_is_stored_once(tmp_path):
    model = tiny_model(tiny_hf_config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = LlamaForSFT.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    # A file that carries the shared matrix twice is read all the same.
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              tmp_path / WEIGHTS)  # fmt: skip
    assert LlamaForSFT.from_pretrained(tmp_path).lm_head.weight.shape == (53, 32)
