"""RoPE of a model that was rounded, or that depends on neighbours: found, and true."""

from __future__ import annotations

import importlib
from types import MethodType

import pytest
import torch

from tests.helpers import ROPE_PARAMETERS
from tests.integrations.families import FAMILIES, tiny_hf
from tests.tools.setups import features, packed, padded
from varlen_sft.tools.check_mistake import ModelFacts
from varlen_sft.tools.check_setup import inspect_batch, inspect_model


def llama(rope: str = "default", **changes):
    return tiny_hf("llama3", torch.float32, rope_parameters=dict(ROPE_PARAMETERS[rope]), **changes)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_as_transformers_loads_it_is_left_alone(name, dtype):
    assert inspect_model(tiny_hf(name, dtype)) == []


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_every_rope_type_is_known(rope):
    model = llama(rope)
    long = rope in ("dynamic", "longrope")
    for _ in range(2):
        found = inspect_model(model)
        assert [(m.name, m.certain) for m in found] == (
            [("RoPE depends on the longest of the batch", False)] if long else []
        )
        model(torch.arange(80)[None] % 53)  # long frequencies now lie in its buffers
    assert [m.what for m in found] == (
        [f"rope_type '{rope}', samples above {64 if rope == 'dynamic' else 16} tokens"]
        if long
        else []
    )


@pytest.mark.parametrize("name", ["llama3", "gemma3", "smollm3", "olmo2"])
@pytest.mark.parametrize(
    ("cast", "word"),
    [
        (lambda model: model.to(torch.bfloat16), "inv_freq is bf16"),
        (
            lambda model: model.to(torch.bfloat16).float(),
            "inv_freq was rounded to bf16, and casting",
        ),
        (lambda model: model.half(), "inv_freq is fp16"),
    ],
)
def test_frequencies_that_were_rounded(name, cast, word):
    model = cast(tiny_hf(name, torch.float32))
    found = inspect_model(model)
    assert len(found) == 1 and found[0].certain
    low = "fp16" if "fp16" in word else "bf16"
    assert found[0].name == f"a RoPE table is rounded to {low}"
    assert "model.rotary_emb." in found[0].what and word in found[0].what
    assert "radians at position 63" in found[0].effect
    batch = {**packed(features([5, 6])), "use_cache": False}
    assert [m.name for m in inspect_batch(batch, model)] == [found[0].name]


def test_a_table_in_bf16():
    model = llama()
    honest = model.model.rotary_emb.forward

    def rounded(self, x, position_ids):
        return tuple(table.bfloat16().float() for table in honest(x, position_ids))

    model.model.rotary_emb.forward = MethodType(rounded, model.model.rotary_emb)
    (mistake,) = inspect_model(model)
    assert mistake.name == "a RoPE table is rounded to bf16"
    assert mistake.what == "model.rotary_emb answers fp32 with values of bf16"


def test_a_rotary_module_of_ones_own_is_judged_by_its_dtype():
    importlib.import_module("varlen_sft.integrations.hf")  # it does not know such a model
    own = torch.nn.Module()
    own.register_buffer("inv_freq", torch.ones(4))
    model = torch.nn.ModuleDict({"rotary": own})
    samples = features([5, 6])
    batch = {**packed(samples), "use_cache": False}
    model.config = llama().config
    assert inspect_batch(batch, model, samples) == []
    (mistake,) = inspect_batch(batch, model.bfloat16(), samples)
    assert mistake.what == "rotary.inv_freq is bf16"


def test_asking_changes_nothing():
    model = llama("longrope")
    model(torch.arange(30)[None])  # beyond 16: the buffer holds the long frequencies now
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inspect_model(model)
    for name, buffer in model.named_buffers():
        assert torch.equal(before[name], buffer), name


def test_a_cached_table_in_bf16():
    model = llama()
    model.model.rotary_emb.register_buffer("cos_cached", torch.ones(4, 8, dtype=torch.bfloat16))
    (mistake,) = inspect_model(model)
    assert mistake.what == "model.rotary_emb.cos_cached is bf16"


def test_positions_counted_in_bf16_and_another_base():
    model = llama(max_position_embeddings=1024)
    honest = model.model.rotary_emb.forward

    def counted(self, x, position_ids):
        return honest(x, position_ids.bfloat16())

    model.model.rotary_emb.forward = MethodType(counted, model.model.rotary_emb)
    (mistake,) = inspect_model(model)
    assert mistake.name == "RoPE angles are not those of the config"
    assert "frequency 0 at position 257" in mistake.what
    assert "where a low dtype stops counting" in mistake.effect
    other = llama()
    other.model.rotary_emb.inv_freq *= 0.5
    (mistake,) = inspect_model(other)
    assert "at position 1:" in mistake.what


# ------------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("rope", "lengths", "moved", "seen"),
    [
        ("dynamic", [5, 70, 9], [0, 2], 70),
        ("dynamic", [70, 66], [1], 70),
        ("dynamic", [5, 64, 9], [], 64),
        ("longrope", [5, 20, 9], [0, 2], 20),
        ("longrope", [30, 20, 19], [], 30),
        ("longrope", [16, 9], [], 16),
        ("llama3", [5, 70, 9], [], 70),
    ],
)
@pytest.mark.parametrize("make", [packed, padded])
def test_lengths_that_a_pack_mixes(rope, lengths, moved, seen, make):
    samples = features(lengths)
    facts = ModelFacts.of(llama(rope).config)
    found = inspect_batch(make(samples), facts, samples)
    if not moved:
        assert found == []
        return
    (mistake,) = found
    assert mistake.name == "RoPE depends on the longest of the batch" and mistake.certain
    number, row = moved[0], 0 if make is packed else moved[0]
    column = 0 if make is padded else sum(lengths[:number])
    assert (mistake.row, mistake.column) == (row, column)
    assert f"sample {number} has {lengths[number]} tokens" in mistake.what
    assert f"frequencies of {seen}" in mistake.what
    assert f"{len(moved)} of {len(lengths)} samples" in mistake.what


# --------------------------------------------- what is said of them is true


def losses(model, batch) -> torch.Tensor:
    """Per-row losses of a packed batch."""
    rest = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**{"use_cache": False, **rest}).logits.double()
    targets = batch["input_ids"].roll(-1, dims=1)
    return torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="none")


def changed(name: str, batch: dict):
    return {
        "a mask beside packed ids": {**batch, "attention_mask": torch.ones(1, 21).long()},
        "positions are not reset": {**batch, "position_ids": torch.arange(21)[None]},
        "a cache beside packed ids": {**batch, "use_cache": True},
        "RoPE depends on the longest of the batch": batch,
    }[name]


@pytest.mark.parametrize(
    ("name", "rope", "lengths", "same"),
    [
        ("a mask beside packed ids", "default", [5, 12, 4], 5),
        ("positions are not reset", "default", [5, 12, 4], 5),
        ("a cache beside packed ids", "default", [5, 12, 4], 5),
        ("RoPE depends on the longest of the batch", "longrope", [4, 17], 0),
        ("RoPE depends on the longest of the batch", "default", [4, 17], 21),
    ],
)
@torch.no_grad()
def test_the_effect_is_real(name, rope, lengths, same):
    """From the token on that is named, a sample is not what it is alone; before, it is."""
    model = llama(rope).double()
    samples = features(lengths)
    alone = torch.cat([losses(model, packed([sample])) for sample in samples])
    batch = changed(name, packed(samples))
    together = losses(model, batch)
    ends = torch.tensor(lengths).cumsum(0) - 1
    error = (together - alone).abs()
    error[ends] = 0  # these learn another sample's token
    found = [m for m in inspect_batch(batch, ModelFacts.of(model), samples) if m.name == name]
    assert (error[:same] < 1e-5).all()
    if same == 21:
        assert found == []
    else:
        (mistake,) = found
        assert mistake.column == same and error[same + 1 : ends[ends > same][0]].max() > 1e-3


def test_a_cache_is_seen_in_the_config_of_a_live_model():
    samples = features([5, 6])
    model = llama()
    (mistake,) = inspect_batch(packed(samples), model, samples)
    assert (mistake.name, mistake.row, mistake.column) == ("a cache beside packed ids", 0, 5)
    for quiet in (
        inspect_batch(packed(samples), model.config, samples),  # a Trainer would turn it off
        inspect_batch(padded(samples), model, samples),
        inspect_batch({**packed(samples), "use_cache": False}, model, samples),
    ):
        assert quiet == []
    model.config.use_cache = False
    assert inspect_batch(packed(samples), model, samples) == []


def test_a_patched_model_is_not_blamed_for_what_patch_mends():
    from varlen_sft.integrations.hf import patch

    samples = features([5, 12, 4])
    batch = {**packed(samples), "attention_mask": torch.ones(1, 21).long()}
    model = llama("longrope")
    names = {mistake.name for mistake in inspect_batch(batch, model, samples)}
    assert names == {"a mask beside packed ids"}
    names = {mistake.name for mistake in inspect_batch(packed(samples), model, samples)}
    assert names == {"a cache beside packed ids"}
    patch(model)
    assert inspect_batch(batch, model, samples) == inspect_batch(packed(samples), model) == []
    assert inspect_model(model) == []
    longer = features([5, 20, 4])
    assert inspect_batch(packed(longer), model, longer) == []
    batch["attention_mask"][0, -1] = 0
    batch["labels"][0, -1] = -100
    (mistake,) = inspect_batch(batch, model)
    assert mistake.name == "a mask beside packed ids"
