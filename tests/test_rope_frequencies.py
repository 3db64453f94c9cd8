from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.helpers import ROPE_PARAMETERS, tiny_hf_config
from varlen_sft.modules import RotaryEmbedding
from varlen_sft.reference import position_ids_from_lengths, sequences_from_lengths
from varlen_sft.rope_frequencies import resolve_rope_parameters

YARN_VARIANTS = [
    {"attention_factor": 1.25},
    {"mscale": 0.7, "mscale_all_dim": 1.0},
    {"beta_fast": 20, "beta_slow": 2, "truncate": False},
]


def hf_angles(config: dict, length: int):
    """cos and sin (L, R/2) as transformers makes them for a sequence alone, in a fresh model."""
    rotary = LlamaRotaryEmbedding(LlamaConfig(**config))
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def assert_bits_equal_alone(config: dict, lengths: list[int]) -> None:
    rotary = RotaryEmbedding.from_config(config)
    rotation = rotary(position_ids_from_lengths(lengths), sequences_from_lengths(lengths))
    cos = rotation.cos[rotation.position_ids].split(lengths)
    sin = rotation.sin[rotation.position_ids].split(lengths)
    for index, length in enumerate(lengths):
        hf_cos, hf_sin = hf_angles(config, length)
        assert torch.equal(cos[index], hf_cos)
        assert torch.equal(sin[index], hf_sin)


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_every_sequence_of_a_pack_has_the_bits_of_transformers_alone(rope):
    # 16 and 32 are the lengths from which longrope and dynamic choose other frequencies.
    assert_bits_equal_alone(tiny_hf_config(rope), [5, 33, 16, 17, 1, 40, 32])


def test_frequencies_of_a_long_sequence_do_not_depend_on_its_place_in_a_pack():
    assert_bits_equal_alone(tiny_hf_config("dynamic"), [41, 73, 3, 61, 85, 109])


@pytest.mark.parametrize("extra", YARN_VARIANTS, ids=str)
def test_yarn_variants(extra):
    config = tiny_hf_config("yarn")
    config["rope_parameters"].update(extra)
    assert_bits_equal_alone(config, [20, 3])


def test_old_style_config_is_read_as_the_new_one():
    new = resolve_rope_parameters(tiny_hf_config("llama3"))
    scaling = {k: v for k, v in ROPE_PARAMETERS["llama3"].items() if k != "rope_theta"}
    scaling["type"] = scaling.pop("rope_type")
    old = {
        **tiny_hf_config(),
        "rope_parameters": None,
        "rope_scaling": scaling,
        "rope_theta": 500.0,
    }
    assert resolve_rope_parameters(old) == new


def test_a_model_cast_does_not_touch_the_tables():
    rotary = RotaryEmbedding.from_config(tiny_hf_config())
    lengths = [7]
    before = rotary(position_ids_from_lengths(lengths), sequences_from_lengths(lengths))
    rotary.to(torch.bfloat16)
    after = rotary(position_ids_from_lengths(lengths), sequences_from_lengths(lengths))
    assert after.cos.dtype == torch.float32
    assert torch.equal(before.cos, after.cos)


def test_errors_name_what_is_missing():
    with pytest.raises(ValueError, match="rope_type must be one of default, .*, got 'axial'"):
        resolve_rope_parameters({"rope_parameters": {"rope_type": "axial"}})
    with pytest.raises(ValueError, match="type 'llama3' must have .* missing: low_freq_factor, hi"):
        resolve_rope_parameters({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}})
    config = tiny_hf_config("longrope", head_dim=8)
    with pytest.raises(ValueError, match="short_factor must have R/2 = 4 numbers, got 8"):
        assert_bits_equal_alone(config, [3])
