"""The table of families says of each what HF's own code does."""

from __future__ import annotations

import inspect

import pytest
import torch

from tests.integrations.families import FAMILIES as TINY
from tests.integrations.families import packed_inputs, tiny_hf
from varlen_sft.integrations.families import FAMILIES, family_of


def test_every_family_has_a_tiny_model():
    assert {make().model_type for make in TINY.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", TINY)
def test_scale_and_softcap_of_the_logits(name):
    model = tiny_hf(name)
    family, config = family_of(model.config), model.config
    ids = packed_inputs([7])["input_ids"]
    with torch.no_grad():
        plain = model.lm_head(model.model(ids).last_hidden_state) * family.logit_scale(config)
        softcap = family.logit_softcap(config)
        ours = softcap * torch.tanh(plain / softcap) if softcap else plain
        assert torch.allclose(ours, model(ids).logits, rtol=1e-12, atol=0)
    assert (family.logit_scale(config) != 1.0) == (name == "granite")
    assert (softcap != 0.0) == (name == "gemma2")


def test_a_softcap_that_is_not_set_is_none():
    config = TINY["gemma2"]()
    config.final_logit_softcapping = None
    assert family_of(config).logit_softcap(config) == 0.0


@pytest.mark.parametrize("name", TINY)
def test_norms_and_their_places(name):
    model = tiny_hf(name)
    family, layer = family_of(model.config), model.model.layers[0]
    norms = [n for n, _ in layer.named_children() if n.endswith("layernorm")]
    assert norms == {
        "before": ["input_layernorm", "post_attention_layernorm"],
        "after": ["post_attention_layernorm", "post_feedforward_layernorm"],
        "around": [
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ],
    }[family.norms]  # fmt: skip
    source = inspect.getsource(type(layer).forward.__wrapped__)
    first = source.index("self.self_attn(")
    assert ("input_layernorm(" in source[:first]) == (family.norms != "after")
    attention = layer.self_attn
    size = {None: None, "head": 16, "all": 64}[family.qk_norm]
    assert (attention.q_norm.weight.numel() if hasattr(attention, "q_norm") else None) == size


@pytest.mark.parametrize("name", TINY)
def test_windows_softcaps_and_scales_are_what_the_layer_tells_its_attention(name):
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    told = []

    def spy(module, query, key, value, mask, **kwargs):
        told.append((module, kwargs))
        return query.transpose(1, 2), None

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    try:
        model = tiny_hf(name, attention="spy")
        model(packed_inputs([7])["input_ids"])
    finally:
        del AttentionInterface._global_mapping["spy"]
        del AttentionMaskInterface._global_mapping["spy"]
    family = family_of(model.config)
    assert len(told) == len(model.model.layers)
    for module, kwargs in told:
        assert kwargs.get("sliding_window") == family.window_size(module)
        assert kwargs["scaling"] == module.scaling
        assert (kwargs.get("softcap") is not None) == family.attention_softcap
    windows = [family.window_size(module) for module, _ in told]
    assert windows == {
        "mistral": [8, 8], "qwen2_window": [None, 8], "gemma2": [8, None], "gemma3": [8, None, 8],
    }.get(name, [None] * len(told))  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_which_families_keep_fp32_tables(name):
    model = tiny_hf(name, torch.bfloat16)
    x, ids = torch.zeros(1, 1, 32, dtype=torch.bfloat16), torch.arange(9)[None]
    extra = ("full_attention",) if name == "gemma3" else ()
    cos, _ = model.model.rotary_emb(x, ids, *extra)
    assert (cos.dtype == torch.float32) == family_of(model.config).fp32_rope == (name == "olmo2")
