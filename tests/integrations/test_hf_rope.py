"""Where RoPE of a patched model comes from, and that it is the right one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.integrations.families import FAMILIES, packed_inputs, tiny_hf
from tests.integrations.hf_runs import together
from varlen_sft import patch
from varlen_sft.integrations.families import family_of
from varlen_sft.integrations.hf_rope import (
    attention_forward,
    check_rotation,
    rotary_tables,
    rounded_tables,
)
from varlen_sft.modules import Rotation


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_are_those_of_huggingface(name):
    model = tiny_hf(name, torch.float32)
    tables = rotary_tables(model.config, family_of(model.config))
    x, ids = torch.zeros(1, 1, 32), torch.arange(64)[None]
    for layer_type, table in tables.items():
        extra = () if layer_type is None else (layer_type,)
        cos, sin = model.model.rotary_emb(x, ids, *extra)
        ours = table._tables(64, torch.device("cpu"))
        for full, half in zip((cos, sin), ours, strict=True):
            assert torch.equal(full[0], torch.cat([half, half], -1))
    assert (None in tables) == (name != "gemma3")
    assert rounded_tables(model.model.rotary_emb, tables) == []


def test_gemma3_has_a_table_for_each_layer_type():
    tables = rotary_tables((config := FAMILIES["gemma3"]()), family_of(config))
    assert {kind: table.rope_parameters["rope_theta"] for kind, table in tables.items()} == {
        "full_attention": 1_000_000.0,
        "sliding_attention": 10_000.0,
    }


def test_a_pack_gets_a_rotation_and_other_calls_a_table():
    model = tiny_hf("llama3", torch.bfloat16)
    patch(model, loss=False)
    seen = []
    layer = model.model.layers[0].self_attn
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    packed = packed_inputs()
    together(model, packed)
    given, nothing = seen.pop()
    rotation = given.rotation
    assert isinstance(rotation, Rotation) and given.rounded_to == torch.bfloat16 and nothing is None
    assert rotation.cos.dtype == torch.float32 and rotation.cos.shape[1] == 8
    assert torch.equal(rotation.position_ids, packed["position_ids"][0])
    model(input_ids=packed["input_ids"])
    assert all(torch.is_tensor(table) and table.dtype == torch.bfloat16 for table in seen.pop())


@pytest.mark.parametrize("fails", [False, True])
def test_a_pack_is_forgotten_after_its_call(fails):
    model = tiny_hf("gemma3", torch.float32)
    patch(model, loss=False)
    rotary, x, ids = model.model.rotary_emb, torch.zeros(1, 1, 32), torch.arange(5)[None]
    expected = rotary(x, ids, "full_attention")
    if fails:
        model.model.layers[1].mlp.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            together(model, packed_inputs())
    else:
        together(model, packed_inputs())
    actual = rotary(x, ids, "full_attention")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("broken", ["inv_freq", "shape"])
def test_other_frequencies_than_the_config_says_are_refused(broken):
    model = tiny_hf("llama3", torch.float32)
    rotary = model.model.rotary_emb
    buffer = rotary.original_inv_freq
    rotary.original_inv_freq = buffer * 1.01 if broken == "inv_freq" else buffer[:4].clone()
    with pytest.raises(ValueError, match="original_inv_freq must be what the config's rope_param"):
        patch(model, loss=False)
    patch(model, loss=False, rope=False)


class Base(nn.Module):
    def forward(self, q, k, cos, sin, *, scale=1.0):
        q, k = apply_rotary_pos_emb(q, k, cos, sin)  # noqa: F821
        return q * scale, k


def layer_that_calls(apply) -> nn.Module:
    """An attention layer whose forward calls this function under HF's name."""
    from types import FunctionType

    forward = FunctionType(Base.forward.__code__, {**globals(), "apply_rotary_pos_emb": apply})
    forward.__kwdefaults__ = {"scale": 2.0}
    return type("Layer", (nn.Module,), {"forward": forward})()


def interleaved(q, k, cos, sin):
    def turn(x):
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return x * cos + torch.stack([-x2, x1], -1).flatten(-2) * sin

    return turn(q), turn(k)


def by_halves(q, k, cos, sin):
    def turn(x):
        return (
            x * cos + torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1) * sin
        )

    return turn(q), turn(k)


def test_a_function_that_rotates_otherwise_is_refused():
    check_rotation(layer_that_calls(by_halves))
    with pytest.raises(ValueError, match="apply_rotary_pos_emb of Layer must rotate by halves"):
        check_rotation(layer_that_calls(interleaved))
    with pytest.raises(ValueError, match="must call apply_rotary_pos_emb"):
        check_rotation(nn.Linear(2, 2))


def test_a_decorated_forward_is_refused():
    import functools

    layer = layer_that_calls(by_halves)
    inner = type(layer).forward
    type(layer).forward = functools.wraps(inner)(lambda *args: inner(*args))
    with pytest.raises(ValueError, match="Layer.forward must be a plain function"):
        check_rotation(layer)


def test_the_forward_is_the_same_code_with_one_name_bound_anew():
    theirs = type(tiny_hf("llama3").model.layers[0].self_attn).forward
    ours = attention_forward(theirs, "fp32")
    assert ours.__code__ is theirs.__code__ and ours.__defaults__ == theirs.__defaults__
    names, own = theirs.__globals__, ours.__globals__
    assert {key for key in own if own[key] is not names.get(key)} == {"apply_rotary_pos_emb"}
    x, table = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    actual = own["apply_rotary_pos_emb"](x, x, table, table)
    expected = names["apply_rotary_pos_emb"](x, x, table, table)
    assert torch.equal(actual[0], expected[0])


def test_defaults_of_keywords_stay():
    theirs = type(layer_that_calls(by_halves)).forward
    x, table = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    actual, expected = (
        f(None, x, x, table, table) for f in (attention_forward(theirs, "hf"), theirs)
    )
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[0], 2 * actual[1])
