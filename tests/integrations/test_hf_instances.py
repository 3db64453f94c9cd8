"""Copies of a patched model, and forwards that others wrapped before or after."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.hf_runs import assert_same_bits, together
from tests.integrations.test_hf_keeps_working import prompts
from varlen_sft import patch, unpatch
from varlen_sft.integrations.hf import is_patched


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_copy_is_patched_on_its_own(name):
    model = tiny_hf(name, torch.float32)
    patch(model)
    packed = packed_inputs()
    labelled = {k: v for k, v in packed.items() if k != "shift_labels"}
    labelled["shift_labels"] = packed["shift_labels"]
    other = copy.deepcopy(model)
    expected = together(model, packed)
    assert is_patched(other)
    assert_same_bits(together(other, packed), expected)
    assert torch.equal(other(**labelled).loss, model(**labelled).loss)
    unpatch(other)
    assert is_patched(model) and not is_patched(other)
    assert_same_bits(together(model, packed), expected)
    assert other.config._attn_implementation == "eager" and not other.model._forward_pre_hooks
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert_same_bits(together(model, packed), expected)


def test_pickling_says_what_works_instead():
    model = tiny_hf("llama3", torch.float32)
    patch(model, loss=False)
    with pytest.raises(TypeError, match="save_pretrained and state_dict work"):
        pickle.dumps(model)
    unpatch(model)
    pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("module", ["", "model.rotary_emb", "model.layers.0.self_attn"])
def test_a_forward_wrapped_after_patch_stays_and_passes_calls_on(module):
    """As Accelerate wraps the forward of a model that it prepares."""
    model = tiny_hf("llama3", torch.float32)
    given = {**prompts(), "labels": prompts()["input_ids"]}
    expected = model(**given)
    patch(model)
    owner = model.get_submodule(module)
    inner = owner.forward
    owner.forward = wrapper = functools.wraps(inner)(lambda *a, **k: inner(*a, **k))
    patched = model(**given)
    assert patched.logits is None and abs(patched.loss - expected.loss) < 1e-5
    together(model, packed_inputs())
    unpatch(model)
    assert owner.forward is wrapper
    actual = model(**given)
    assert torch.equal(actual.logits, expected.logits) and torch.equal(actual.loss, expected.loss)


def test_a_forward_wrapped_before_patch_is_kept():
    model = tiny_hf("llama3", torch.float32)
    expected = model(**prompts()).logits
    calls = []
    for owner in (model, model.model.rotary_emb):
        inner = owner.forward

        def wrapper(*args, inner=inner, **kwargs):
            calls.append(inner)
            return inner(*args, **kwargs)

        owner.forward = functools.wraps(inner)(wrapper)
    before = model.forward, model.model.rotary_emb.forward
    patch(model)
    assert torch.equal(model(**prompts()).logits, expected)
    assert len(calls) == 2
    unpatch(model)
    assert (model.forward, model.model.rotary_emb.forward) == before
    assert torch.equal(model(**prompts()).logits, expected)


GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's


@GRAD
def test_a_compiled_model_computes_its_packs():
    model = tiny_hf("llama3", torch.float32, num_hidden_layers=1)
    patch(model, loss=False)
    packed = packed_inputs()
    expected = {f"_orig_mod.{k}" if "." in k else k: v for k, v in together(model, packed).items()}
    assert_same_bits(together(torch.compile(model, backend="eager"), packed), expected)


@GRAD
@pytest.mark.e2e
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_a_compiled_model_with_its_loss_on_any_call(name):
    model = tiny_hf(name, torch.float32)
    patch(model)
    compiled = torch.compile(model, backend="eager")
    for lengths in ([5, 34, 2], [11, 20, 10, 4]):
        given = packed_inputs(lengths)
        assert torch.equal(compiled(**given).loss, model(**given).loss)
    assert torch.equal(compiled(**prompts()).logits, model(**prompts()).logits)
