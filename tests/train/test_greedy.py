"""Greedy answers are those of Hugging Face's generate, however a model is trained, and leave it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import counting_backend, random_samples, tiny_hf_config, tiny_model
from tests.train.ranks import on_ranks
from varlen_sft.data.batch import collate
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.train.config import ModelConfig
from varlen_sft.train.distributed import World, world
from varlen_sft.train.greedy import Prompt, decoder, greedy
from varlen_sft.train.parallel import blocks, shard
from varlen_sft.train.setup_model import PatchedForSFT, load_model

transformers = pytest.importorskip("transformers")
LENGTHS = (5, 1, 9, 3, 14)
MOST = 12


def prompts(*stops: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    made = (torch.randint(3, 53, (n,), generator=draw).tolist() for n in LENGTHS)
    return [Prompt(ids, frozenset(stops)) for ids in made]


def generated(model: Any, asked: list[Prompt]) -> list[list[int]]:
    """By transformers, one prompt at a time."""
    said = []
    for ids, stops in asked:
        out = model.eval().generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=MOST, eos_token_id=sorted(stops) or None, pad_token_id=0,
        )  # fmt: skip
        said.append(out[0, len(ids) :].tolist())
    return said


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("llama")
    tiny_model(tiny_hf_config(), torch.float64).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def expected(folder):
    """What it says, until it has said so much."""
    said = generated(loaded(folder), prompts())
    assert all(len(ids) == MOST for ids in said) and len({tuple(ids) for ids in said}) == 5
    return said


def stop_and_cut(said: list[list[int]]) -> tuple[int, list[list[int]]]:
    """A token that they say sooner or later or not at all, and what they say through it."""

    def cut(token: int) -> list[list[int]]:
        return [ids[: ids.index(token) + 1] if token in ids else ids for ids in said]

    stop = max(range(53), key=lambda token: len({len(ids) for ids in cut(token)}))
    assert len({len(ids) for ids in cut(stop)}) > 2
    return stop, cut(stop)


def test_a_llama_says_what_generate_says(folder, expected):
    model = LlamaForSFT.from_pretrained(folder, dtype=torch.float64)
    assert greedy(model, prompts(), MOST, World()) == expected
    assert greedy(model, prompts(), 1, World()) == [ids[:1] for ids in expected]
    stop, cut = stop_and_cut(expected)
    assert generated(loaded(folder), prompts(stop)) == cut
    assert greedy(model, prompts(stop), MOST, World()) == cut


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3", "longrope", "dynamic"])
def test_what_is_read_on_is_what_is_read_at_once(rope):
    """No sequence outgrows what its first tokens were turned for, so all have one rotation."""
    model = tiny_model(tiny_hf_config(rope, attention_bias=True))
    long = [17, 3] if rope == "longrope" else [33, 3] if rope == "dynamic" else [9, 3]
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 53, (n + 4,), generator=draw) for n in long]
    with torch.no_grad(), decoder(model):
        read = [model([of[:n] for of, n in zip(ids, long, strict=True)])]
        read += [model([of[n + k : n + k + 1] for of, n in zip(ids, long, strict=True)])
                 for k in range(4)]  # fmt: skip
    if rope == "dynamic":  # its frequencies follow the length: only the first call is the whole
        read, ids = read[:1], [of[:n] for of, n in zip(ids, long, strict=True)]
    for at, of in enumerate(ids):
        sequences = sequences_from_lengths([len(of)])
        whole = model.logits(of, torch.arange(len(of)), sequences)[-len(read) :]
        torch.testing.assert_close(torch.stack([r[at] for r in read]), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2", "smollm3"])
def test_a_patched_model_says_what_generate_says(family):
    import varlen_sft
    from tests.integrations.families import tiny_hf

    model: Any = tiny_hf(family, torch.float64)
    said = generated(model, prompts())
    assert len({tuple(ids) for ids in said}) > 1
    varlen_sft.patch(model, prune_last_layer=True)
    assert greedy(PatchedForSFT(model), prompts(), MOST, World()) == said


@pytest.mark.filterwarnings("default")  # of the compiler
def test_blocks_compiled_for_packs_answer_eagerly(folder, expected):
    import varlen_sft

    model = loaded(folder)
    varlen_sft.patch(model)
    patched = PatchedForSFT(model).train()
    graphs, backend = counting_backend()
    for block in blocks(patched):
        block.forward = torch.compile(block.forward, backend=backend, dynamic=True)
    batch = collate(random_samples([5, 9, 12]))
    for _ in range(2):
        patched(batch)
        compiled = len(graphs)
        assert compiled
        assert greedy(patched, prompts(), MOST, World()) == expected
        assert len(graphs) == compiled
    assert compiled == 1  # the pack's, which is there still


def test_nothing_of_the_model_or_of_random_numbers_is_changed(folder):
    model = load_model(ModelConfig(name="m", dtype="fp32", activation_checkpointing=True), folder)
    model.rotary(torch.arange(4), sequences_from_lengths([4]))
    before = [dict(vars(module)) for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    asked = [*prompts(), Prompt([7] * 40, frozenset())]  # beyond max_position_embeddings
    greedy(model, asked, MOST, World())
    assert [dict(vars(module)) for module in model.modules()] == before
    assert model.training and all(layer.training for layer in model.layers)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(drawn[0], after[0]) and drawn[1:] == after[1:]
    assert model.eval() and greedy(model, asked[:1], 1, World()) and not model.training


def test_another_module_is_refused():
    with pytest.raises(TypeError, match="LlamaForSFT or a PatchedForSFT, got Linear"):
        decoder(torch.nn.Linear(1, 1))


def on_a_rank(folder: Path, stop: int) -> dict[str, Any]:
    """What a rank says, of models whole, sharded, and sharded with LoRA; and whether FSDP's root
    holds its shards alone again."""
    options = {"name": "m", "dtype": "fp32"}
    said: dict[str, Any] = {}
    with world(timeout_s=30) as here:
        whole = load_model(ModelConfig(**options), folder).double()
        said["whole"] = greedy(whole, prompts(stop), MOST, here)
        for name, more in (("sharded", {}), ("lora", {"lora_rank": 2})):
            model = load_model(ModelConfig(**options, **more), folder).double()
            shard(model, here)
            said[name] = greedy(model, prompts(stop), MOST, here)
            one = greedy(model, prompts(stop)[:1], MOST, here)  # the other rank has none
            assert one == said[name][:1]
            said[f"{name}, weights"] = {type(p).__name__ for p in model.parameters()}
    return said


def test_ranks_share_the_prompts_and_all_know_the_answers(folder, expected):
    pytest.importorskip("peft")
    stop, cut = stop_and_cut(expected)
    first, second = on_ranks(2, on_a_rank, folder, stop)
    assert first == second
    assert first["whole"] == first["sharded"] == first["lora"] == cut  # LoRA's B is 0 at the start
    assert first["sharded, weights"] == first["lora, weights"] == {"DTensor"}
