"""What patch refuses, by name, and that nothing is changed then."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from tests.integrations.families import SHAPE, packed_inputs, tiny_hf
from tests.integrations.hf_runs import assert_same_bits, together
from varlen_sft import patch, unpatch
from varlen_sft.integrations.families import family_of
from varlen_sft.integrations.hf import is_patched


def state(model: nn.Module):
    """Everything that patch might change."""
    return [
        (path, dict(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks))
        for path, m in model.named_modules()
    ], getattr(getattr(model, "config", None), "_attn_implementation", None)


def refuse(model: nn.Module, error: type[Exception], words: str, **options) -> None:
    before = state(model)
    with pytest.raises(error, match=words):
        patch(model, **options)
    assert state(model) == before


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (transformers.CohereConfig, "got 'cohere': it has interleaved RoPE"),
        (transformers.GlmConfig, "got 'glm': it has interleaved RoPE"),
        (transformers.GPTNeoXConfig, "must be one of llama, mistral, .* got 'gpt_neox'$"),
        (transformers.Qwen3MoeConfig, "got 'qwen3_moe'$"),
    ],
)
def test_other_families(kind, words):
    model = AutoModelForCausalLM.from_config(kind(**SHAPE))
    refuse(model, ValueError, words)


def test_families_with_images_or_three_positions_are_named():
    for kind, words in (
        ("qwen2_5_vl", "three position ids per token"),
        ("gemma3", "images beside text"),
        ("jamba", "state-space"),
    ):
        with pytest.raises(ValueError, match=words):
            family_of(SimpleNamespace(model_type=kind))
    with pytest.raises(ValueError, match="got None"):
        family_of(SimpleNamespace())


def test_no_model():
    refuse(nn.Linear(2, 2), TypeError, "PreTrainedModel or a PEFT model around one .* got Linear")
    wrapped = nn.Sequential(tiny_hf("llama3"))
    refuse(wrapped, TypeError, "before any other wrapper.*got Sequential")


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_hf("llama3").config)
    refuse(model, ValueError, "weights must be loaded before patch, got model.embed_tokens.weight")


def test_one_weight_on_the_meta_device():
    model = tiny_hf("llama3")
    model.model.layers[1].mlp.up_proj.to("meta")
    refuse(model, ValueError, "got model.layers.1.mlp.up_proj.weight on the meta device")


def test_attention_dropout():
    model = tiny_hf("llama3", attention_dropout=0.1)
    refuse(model, ValueError, "attention of layer 0 must have attention_dropout 0, got 0.1")
    patch(model, attention=False, loss=False)


def test_attention_that_looks_ahead():
    model = tiny_hf("gemma3", use_bidirectional_attention=True)
    refuse(model, ValueError, "attention of layer 0 must be causal, got is_causal=False")


class Foreign(nn.Module):
    """An attention layer that knows nothing of transformers' interface."""

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None


def test_a_model_with_one_layer_of_another_kind():
    model = tiny_hf("llama3")
    model.model.layers[1].self_attn = Foreign()
    words = "attention of layer 1 must use ALL_ATTENTION_FUNCTIONS"
    refuse(model, ValueError, words)
    words = "Foreign.forward must call apply_rotary_pos_emb"
    refuse(model, ValueError, words, attention=False, loss=False)


def test_an_attention_forward_that_somebody_replaced():
    model = tiny_hf("llama3")
    layer = model.model.layers[1].self_attn
    layer.forward = layer.forward
    refuse(model, ValueError, "attention of layer 1 must have the forward of LlamaAttention")


def test_a_transformers_without_the_interface(monkeypatch):
    model = tiny_hf("llama3")
    older = ModuleType("transformers")
    older.PreTrainedModel = transformers.PreTrainedModel
    older.AttentionInterface = transformers.AttentionInterface
    monkeypatch.setitem(sys.modules, "transformers", older)
    refuse(model, ValueError, "transformers must have AttentionMaskInterface")


def test_a_transformers_that_drops_keywords(monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    model = tiny_hf("llama3")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states: hidden_states)
    refuse(model, ValueError, "LlamaDecoderLayer.forward must hand unknown keywords down")


def test_a_transformers_that_rotates_otherwise(monkeypatch):
    from transformers.models.llama import modeling_llama

    model = tiny_hf("llama3")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k))
    refuse(model, ValueError, "apply_rotary_pos_emb of LlamaAttention must rotate by halves")


def test_a_model_with_parts_of_other_names():
    model = tiny_hf("llama3")
    del model.model.rotary_emb
    refuse(model, ValueError, "LlamaModel must have rotary_emb")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
def test_a_head_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_hf("llama3"), LoraConfig(r=2, target_modules=["lm_head"]))
    refuse(model, ValueError, "adapter")
    patch(model, loss=False)


def test_a_quantised_head():
    model = tiny_hf("llama3")
    model.lm_head = nn.Module()
    model.lm_head.weight = nn.Parameter(torch.zeros(53, 32, dtype=torch.int8), requires_grad=False)
    refuse(model, ValueError, "head")


def test_a_model_without_a_head():
    refuse(tiny_hf("llama3").model, ValueError, "head")
    patch(tiny_hf("llama3").model, loss=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune_last_layer": True, "loss": False}, "prune_last_layer=True needs loss=True"),
        ({"numerics": "bf16"}, "numerics must be 'fp32' or 'hf', got 'bf16'"),
        ({"rope": False, "attention": False, "loss": False}, "one of rope, attention and loss"),
    ],
)
def test_options(options, words):
    refuse(tiny_hf("llama3"), ValueError, words, **options)


@pytest.mark.parametrize("options", [{}, {"loss": False}, {"attention": False, "loss": False}])
def test_copies_of_data_parallel(options, monkeypatch):
    """With several devices it copies the modules; weights need none for that here."""
    from torch.nn.parallel import replicate

    def same(tensors, devices, detach=False):
        return [list(tensors) for _ in devices]

    monkeypatch.setitem(replicate.__globals__, "_broadcast_coalesced_reshape", same)
    model = tiny_hf("llama3")
    assert len(replicate(model, [0, 1])) == 2
    patch(model, **options)
    words = "torch.nn.DataParallel is not supported .* one process per device"
    for outer in (model, nn.Sequential(model), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=words):
            replicate(outer, [0, 1])
    with pytest.raises(TypeError, match="before any other wrapper.*got DataParallel"):
        patch(nn.DataParallel(tiny_hf("llama3")))
    unpatch(model)
    assert len(replicate(model, [0, 1])) == 2


def test_twice_and_never():
    model = tiny_hf("llama3")
    with pytest.raises(ValueError, match="model must be patched"):
        unpatch(model)
    patch(model)
    before = state(model)
    with pytest.raises(ValueError, match="patched already: call varlen_sft.unpatch"):
        patch(model, loss=False)
    assert state(model) == before


def test_an_error_half_way_leaves_nothing(monkeypatch):
    from varlen_sft.integrations import trl_guard

    model, packed = tiny_hf("llama3", torch.float32), packed_inputs()
    expected = together(model, packed, use_cache=False)
    monkeypatch.setattr(trl_guard, "guard", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch(model)
    assert not is_patched(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "eager" and not model.model._forward_pre_hooks
    assert_same_bits(together(model, packed, use_cache=False), expected)
