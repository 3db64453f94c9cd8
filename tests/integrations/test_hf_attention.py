"""The attention name that remembers, and where calls without a pack go."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.hf_runs import alone, assert_close, assert_same_bits, together
from varlen_sft import patch, unpatch
from varlen_sft.integrations import hf_attention
from varlen_sft.integrations.hf_attention import AttentionName
from varlen_sft.integrations.packed import Packed


def padded_inputs(lengths=(5, 9, 3)):
    """A right-padded batch: ids and the mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 53, (len(lengths), max(lengths)), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_name_is_a_string_that_remembers(copied):
    name = copied(AttentionName("sdpa"))
    assert name == "varlen_sft" and isinstance(name, AttentionName) and name.before == "sdpa"
    assert {name: 1}["varlen_sft"] == 1
    assert copied(AttentionName(None)).before is None


def test_it_is_not_written_to_config_json(tmp_path):
    model = tiny_hf("llama3", torch.float32)
    before = model.config.to_json_string()
    patch(model, loss=False)
    assert model.config._attn_implementation == "varlen_sft"
    assert model.config.to_json_string() == before
    model.config.save_pretrained(tmp_path)
    assert "varlen" not in (tmp_path / "config.json").read_text()


def test_a_model_made_of_a_patched_config_computes_as_the_one_before():
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    other = AutoModelForCausalLM.from_config(model.config)
    other.load_state_dict(model.state_dict())
    given = padded_inputs()
    assert torch.equal(other(**given).logits, model(**given).logits)


NAMES = ["llama3", "mistral", "gemma3", "smollm3"]


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, kind) for name in NAMES for kind in ("eager", "sdpa")), ("gemma2", "eager")],
)
def test_a_padded_batch_goes_where_it_went(name, attention):
    model, given = tiny_hf(name, torch.float32, attention=attention), padded_inputs()
    expected = model(**given).logits
    patch(model, loss=False)
    assert torch.equal(model(**given).logits, expected)


@pytest.fixture
def registered():
    """Another attention of the user's own, which reads its name as HF's flash attention does."""
    seen = []

    def attention(module, *args, **kwargs):
        assert isinstance(module, hf_attention._Overlay)
        module.marked = True  # what it writes is written to the module
        seen.append((module.config._attn_implementation, module.layer_idx, sorted(kwargs)))
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("users_own", attention)
    AttentionMaskInterface.register("users_own", sdpa_mask)
    yield seen
    del AttentionInterface._global_mapping["users_own"]
    del AttentionMaskInterface._global_mapping["users_own"]


def test_any_registered_attention_is_called_with_its_own_name(registered):
    model, given = tiny_hf("llama3", torch.float32, attention="sdpa"), padded_inputs()
    expected = model(**given).logits
    model.set_attn_implementation("users_own")
    patch(model, loss=False)
    assert torch.equal(model(**given).logits, expected)
    assert [name for name, _, _ in registered] == ["users_own", "users_own"]
    assert [layer for _, layer, _ in registered] == [0, 1]
    assert "packed" not in registered[0][2]
    assert model.model.layers[0].self_attn.marked
    model(**{k: v for k, v in packed_inputs().items() if k != "shift_labels"})
    assert len(registered) == 2  # a pack asks nobody else
    unpatch(model)
    assert model.config._attn_implementation == "users_own"


def test_no_mask_is_made_for_a_pack(monkeypatch):
    model = tiny_hf("gemma3", torch.float32)
    patch(model, loss=False)
    made = []
    monkeypatch.setitem(
        AttentionMaskInterface._global_mapping, "eager", lambda *a, **k: made.append(1)
    )
    together(model, packed_inputs())
    assert made == []
    model(input_ids=packed_inputs()["input_ids"])
    assert made == [1, 1]  # one for each layer type


def test_the_name_without_patch_says_what_to_do():
    hf_attention.register()
    model = tiny_hf("llama3", torch.float32, attention="varlen_sft")
    with pytest.raises(ValueError, match=r"must be set by varlen_sft\.patch\(model\)"):
        model(**padded_inputs())


def test_a_name_taken_by_others_is_left_to_them(monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "varlen_sft", print)
    model = tiny_hf("llama3", torch.float32)
    with pytest.raises(ValueError, match="'varlen_sft' is already registered in AttentionInterf"):
        patch(model, loss=False)
    assert model.config._attn_implementation == "eager" and not model.model._forward_pre_hooks
    assert AttentionInterface._global_mapping["varlen_sft"] is print


def test_an_attention_set_after_patch_is_refused_in_a_pack():
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="was set to 'sdpa' after varlen_sft.patch"):
        together(model, packed_inputs())
    unpatch(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"use_cache": True}, "use_cache must not be True"),
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"is_causal": False}, "is_causal must not be False"),
        ({"attention_mask": torch.zeros(1, 117)}, "attention_mask must not have zeros"),
    ],
)
def test_a_pack_refuses(call, words):
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    with pytest.raises(ValueError, match=words):
        together(model, packed_inputs(), **call)
    assert_close(together(model, packed_inputs()), together(model, packed_inputs()), 0.0)


def test_dropout_set_after_patch_is_refused():
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    model.model.layers[1].self_attn.attention_dropout = 0.25
    with pytest.raises(ValueError, match="attention dropout must be 0 in a pack, got 0.25"):
        together(model, packed_inputs())
    model.eval()
    together(model, packed_inputs())


@pytest.mark.parametrize("options", [{}, {"rope": False}, {"attention": False}], ids=str)
def test_autocast_computes_as_huggingface_under_autocast(options):
    model = tiny_hf("qwen3", torch.float32, attention="sdpa")
    packed = packed_inputs()
    high = alone(model, packed)
    with torch.autocast("cpu", torch.bfloat16):
        low = alone(model, packed)
        patch(model, loss=False, **options)
        actual = together(model, packed)
    for key in high:
        norm = high[key].double().norm()
        ours, theirs = ((x[key].double() - high[key].double()).norm() for x in (actual, low))
        assert ours / norm <= 2 * theirs / norm + torch.finfo(torch.bfloat16).eps, key


def test_a_batch_of_our_own_goes_in_as_packed():
    from tests.helpers import random_samples
    from varlen_sft.data.batch import collate

    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    batch = collate(random_samples([6, 9, 4]), pad_multiple=16)
    ids, positions = batch.input_ids[None], batch.position_ids[None]
    actual = model(input_ids=ids, packed=Packed.from_batch(batch)).logits
    assert torch.equal(actual, model(input_ids=ids, position_ids=positions).logits)


def test_hidden_states_can_be_asked_for():
    model = tiny_hf("llama3", torch.float32)
    packed = {k: v for k, v in packed_inputs().items() if k != "shift_labels"}
    patch(model, loss=False)
    states = model(**packed, output_hidden_states=True).hidden_states
    assert len(states) == 3 and all(state.shape == (1, 117, 32) for state in states)


def test_both_halves_leave_gradients_of_a_pack_bit_stable():
    model = tiny_hf("gemma2", torch.float32)
    patch(model, loss=False)
    first = together(model, packed_inputs())
    assert_same_bits(together(model, packed_inputs()), first)
