"""The promise, through a patched Hugging Face model of every family: pack equals alone."""

from __future__ import annotations

import time

import pytest
import torch

from tests.helpers import ROPE_PARAMETERS, relative_error
from tests.integrations.families import FAMILIES, LENGTHS, packed_inputs, tiny_hf
from tests.integrations.hf_runs import alone, assert_close, assert_same_bits, together
from varlen_sft import patch, unpatch
from varlen_sft.integrations.families import FAMILIES as TABLE


def exact_attention(name: str) -> str:
    """HF's attention that keeps fp64; Gemma 2 has a softcap, which leaves it only the eager one."""
    return "eager" if name == "gemma2" else "sdpa"


@pytest.mark.parametrize("name", FAMILIES)
def test_pack_equals_huggingface_alone_in_fp64(name):
    packed = packed_inputs()
    model = tiny_hf(name, attention=exact_attention(name))
    expected = alone(model, packed)
    patch(model, loss=False)
    bound = 1e-10 if TABLE[model.config.model_type].keeps_fp64 else 1e-6
    assert_close(together(model, packed), expected, bound)
    assert_close(alone(model, packed), expected, 0.0)  # calls without a pack: as before


@pytest.mark.parametrize("name", FAMILIES)
def test_pack_equals_eager_alone_in_fp32(name):
    packed = packed_inputs()
    model = tiny_hf(name, torch.float32)
    expected = alone(model, packed)
    patch(model, loss=False)
    assert_close(together(model, packed), expected, 1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_no_worse_than_twice_eager(name):
    packed = packed_inputs()
    model = tiny_hf(name, torch.bfloat16)
    exact = tiny_hf(name, torch.float32)
    for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
        ours.data.copy_(theirs.data)  # the same rounded weights
    high, low = alone(exact, packed), alone(model, packed)
    patch(model, loss=False)
    actual = together(model, packed)
    for key in high:
        allowed = 2 * relative_error(low[key], high[key]) + torch.finfo(torch.bfloat16).eps
        assert relative_error(actual[key], high[key]) <= allowed, key


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_each_sequence_rotates_by_its_own_length(rope):
    parameters = dict(ROPE_PARAMETERS[rope])
    config = {"rope_parameters": parameters, "max_position_embeddings": 32}
    packed = packed_inputs()

    def model():
        return tiny_hf("smollm2", attention="sdpa", **config)

    expected: dict = {}
    for index in range(len(LENGTHS)):  # a new model each time: HF's tables remember lengths
        edges = packed["cu_seq_lens_q"].tolist()[index : index + 2]
        one = {
            "input_ids": packed["input_ids"][:, slice(*edges)],
            "shift_labels": packed["shift_labels"][:, slice(*edges)],
            "cu_seq_lens_q": torch.tensor([0, edges[1] - edges[0]]),
        }
        for key, value in alone(model(), one).items():
            known = expected.get(key)
            joined = torch.cat([known, value]) if key == "logits" and known is not None else None
            expected[key] = value if known is None else known + value if joined is None else joined
    ours = model()
    patch(ours, loss=False)
    assert_close(together(ours, packed), expected, 1e-10)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3"])
def test_neighbours_change_no_bit_and_get_no_gradient(name):
    model = tiny_hf(name, torch.float32)
    patch(model, loss=False)
    packed, other = packed_inputs([9, 12, 7]), packed_inputs([9, 12, 7], seed=1)
    changed = {**packed, "input_ids": packed["input_ids"].clone()}
    changed["input_ids"][:, 9:21] = other["input_ids"][:, 9:21]
    clean, dirty = (together(model, given)["logits"] for given in (packed, changed))
    assert torch.equal(clean[:9], dirty[:9]) and torch.equal(clean[21:], dirty[21:])
    assert not torch.equal(clean[9:21], dirty[9:21])

    given = {k: v for k, v in packed.items() if k not in ("input_ids", "shift_labels")}
    embedded = model.get_input_embeddings()(packed["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embedded, **given).logits[0, 9:21].sum().backward()
    assert (embedded.grad[0, :9] == 0).all() and (embedded.grad[0, 21:] == 0).all()
    assert (embedded.grad[0, 9:21].abs().sum(-1) > 0).all()


def test_position_ids_alone_are_enough():
    model = tiny_hf("qwen2_window", torch.float32)
    patch(model, loss=False)
    packed = packed_inputs()
    bare = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    expected = together(model, packed)
    assert_same_bits(together(model, packed, **bare), expected)
    ones = torch.ones_like(packed["input_ids"])
    assert_same_bits(together(model, packed, attention_mask=ones), expected)
    assert_same_bits(together(model, packed, position_ids=None), expected)


@pytest.mark.parametrize("options", [{"rope": False}, {"attention": False}], ids=str)
@pytest.mark.parametrize("name", ["smollm2", "smollm3", "gemma3"])
def test_either_half_alone(name, options):
    model = tiny_hf(name, attention="sdpa")
    packed = packed_inputs()
    expected = alone(model, packed)
    patch(model, loss=False, **options)
    assert_close(together(model, packed), expected, 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hf_numerics_rotate_bit_for_bit(name, dtype):
    """RoPE alone is replaced, so every other operation of both runs is the same."""
    packed = packed_inputs()
    model = tiny_hf(name, dtype)
    expected = together(model, packed, use_cache=False)
    patch(model, loss=False, attention=False, numerics="hf")
    actual = together(model, packed)
    # What reaches the norms of q and k lies in memory otherwise, so they sum it in another order.
    sums = {key for key in expected if "q_norm" in key or "k_norm" in key}
    if TABLE[model.config.model_type].fp32_rope and dtype == torch.bfloat16:
        sums = expected.keys() - {"logits", "loss"}  # HF rounds the gradient thrice, we once
    for key in sums:
        error = relative_error(actual[key], expected[key])
        assert error <= (1e-6 if dtype == torch.float32 else 2**-6), key
    same = expected.keys() - sums
    assert_same_bits({k: actual[k] for k in same}, {k: expected[k] for k in same})


def test_fp32_numerics_are_other_bits_in_bf16():
    packed = packed_inputs()
    model = tiny_hf("llama3", torch.bfloat16)
    expected = together(model, packed, use_cache=False)
    patch(model, loss=False, attention=False)
    assert not torch.equal(together(model, packed)["logits"], expected["logits"])


@pytest.mark.parametrize("name", FAMILIES)
def test_unpatch_restores_every_bit(name):
    packed = packed_inputs()
    model = tiny_hf(name, torch.bfloat16)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    config = model.config.to_dict()
    expected = together(model, packed, use_cache=False), alone(model, packed)
    patch(model, loss=False)
    together(model, packed)
    unpatch(model)
    assert_same_bits(together(model, packed, use_cache=False), expected[0])
    assert_same_bits(alone(model, packed), expected[1])
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "eager"
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys(), path
        assert vars(module).get("forward") is before[path].get("forward")
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_another_model_of_the_same_config_is_not_touched():
    from transformers import AutoModelForCausalLM

    model = tiny_hf("smollm2", torch.float32)
    shared = model.config
    other = AutoModelForCausalLM.from_config(shared)
    assert other.config is shared
    patch(model, loss=False)
    assert other.config._attn_implementation == shared._attn_implementation == "eager"
    assert model.config is not shared and model.model.layers[0].self_attn.config is model.config
    assert "forward" not in vars(other.model.layers[0].self_attn)


def test_the_report_tells_each_layer():
    model = tiny_hf("smollm3")
    report = patch(model, loss=False, elementwise=False)
    replaced = ["forward" in vars(layer.self_attn) for layer in model.model.layers]
    assert replaced == [True, False, True]
    assert [layer.rope for layer in report.layers] == ["table", "none", "table"]
    assert str(report) == (
        "varlen_sft: SmolLM3ForCausalLM (SmolLM3)\n"
        "  attention   full: 0-2\n"
        "              calls without a pack: eager\n"
        "  rope        table: 0, 2; none: 1; numerics fp32"
    )
    report = patch(tiny_hf("gemma3"), loss=False, numerics="hf")
    assert "  attention   window 8: 0, 2; full: 1\n" in str(report)
    assert "rope        sliding_attention: 0, 2; full_attention: 1; numerics hf" in str(report)
    assert [layer.window_size for layer in patch(tiny_hf("mistral"), loss=False).layers] == [8, 8]
    report = patch(tiny_hf("llama2", torch.float32), loss=False, rope=False)
    assert [layer.rope for layer in report.layers] == ["hf", "hf"] and "rope" not in str(report)
    told = "  elementwise 2 LlamaMLP, 4 LlamaRMSNorm: one pass over memory each, on "
    assert (told in str(report)) == bool(report.elementwise)


def test_tables_rounded_with_the_model_are_noted_and_not_used():
    packed = packed_inputs()
    model = tiny_hf("llama3", torch.float32)
    expected = alone(model, packed)
    for buffer in model.model.rotary_emb.buffers():
        buffer.data = buffer.data.bfloat16()
    report = patch(model, loss=False)
    assert report.notes == ("HF's original_inv_freq was rounded with the model; ours is not",)
    assert_close(together(model, packed), expected, 1e-5)


def test_patch_takes_less_than_a_tenth_of_a_second():
    model = tiny_hf("smollm2", torch.float32, num_hidden_layers=30)
    took = []
    for _ in range(3):
        start = time.perf_counter()
        patch(model, loss=False)
        took.append(time.perf_counter() - start)
        unpatch(model)
    assert min(took) < 0.1
