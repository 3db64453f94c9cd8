"""The exported folder: of sharded models, in shards, and as transformers uses it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers import tiny_hf_config, tiny_model
from tests.train.ranks import on_ranks
from varlen_sft.models.checkpoint import INDEX, WEIGHTS
from varlen_sft.models.export import MAX_SHARD_BYTES, full_weights, save_checkpoint
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.distributed import world
from varlen_sft.train.parallel import shard


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sharded_export(out, limit: int) -> list[str]:
    """What each rank does; the names of the weights it got whole."""
    with world(timeout_s=30) as here:
        model = tiny_model(tiny_hf_config(), torch.bfloat16)
        shard(model, here)
        save_checkpoint(model, out / f"rank {here.rank}", max_shard_bytes=limit)
        return sorted(full_weights(model))


def test_two_ranks_write_what_one_does(tmp_path):
    model = tiny_model(tiny_hf_config(), torch.bfloat16)
    save_checkpoint(model, tmp_path / "alone", max_shard_bytes=9000)
    expected = files(tmp_path / "alone")
    assert len([name for name in expected if name.startswith("model-")]) > 3
    assert on_ranks(2, sharded_export, tmp_path, 9000) == [sorted(model.state_dict()), []]
    assert files(tmp_path / "rank 0") == expected
    assert not (tmp_path / "rank 1").exists()


def test_a_shared_matrix_is_shared_in_the_whole_weights():
    model = tiny_model(tiny_hf_config(tie_word_embeddings=True))
    weights = full_weights(model)
    assert weights["lm_head.weight"] is weights["embed_tokens.weight"]
    assert weights.keys() == model.state_dict().keys()
    assert not any(value.requires_grad for value in weights.values())


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path):
    model = tiny_model(tiny_hf_config(), torch.bfloat16)
    save_checkpoint(model, tmp_path)
    assert (tmp_path / WEIGHTS).exists()
    save_checkpoint(model, tmp_path, max_shard_bytes=9000)
    assert not (tmp_path / WEIGHTS).exists()  # readers would prefer it
    index = json.loads((tmp_path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [
        f"model-{k:05}-of-{len(names):05}.safetensors" for k in range(1, 1 + len(names))
    ]
    shards = [load_file(tmp_path / name) for name in names]
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in shards]
    assert max(sizes) <= 9000 and sum(sizes) == index["metadata"]["total_size"]
    save_checkpoint(model, tmp_path / "each", max_shard_bytes=1)
    count = len(index["weight_map"])
    assert len(list((tmp_path / "each").glob(f"model-*-of-{count:05}.safetensors"))) == count
    assert MAX_SHARD_BYTES == 5_000_000_000


@pytest.mark.parametrize("limit", [MAX_SHARD_BYTES, 2_000_000])
def test_transformers_generates_from_the_export(tmp_path, smollm2_tokenizer_dir, limit):
    config = tiny_hf_config(vocab_size=49152, max_position_embeddings=256, num_hidden_layers=1)
    model = tiny_model({**config, "eos_token_id": 2}, torch.float32)
    save_checkpoint(model, tmp_path, copy_from=smollm2_tokenizer_dir, max_shard_bytes=limit)
    assert (tmp_path / WEIGHTS).exists() == (limit == MAX_SHARD_BYTES)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is 20 + 22?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt = ids["input_ids"][0]
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    with torch.no_grad():
        said = hf.generate(**ids, do_sample=False, max_new_tokens=8, min_new_tokens=8)[0]
    assert torch.equal(said, greedy(LlamaForSFT.from_pretrained(tmp_path), prompt, 8))


@torch.no_grad()
def greedy(model: LlamaForSFT, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest continuation, by our own logits; without the stop token, as asked of HF."""
    from varlen_sft.ops.sequences import sequences_from_lengths

    for _ in range(count):
        logits = model.logits(ids, torch.arange(len(ids)), sequences_from_lengths([len(ids)]))[-1]
        logits[2] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None]])
    return ids
