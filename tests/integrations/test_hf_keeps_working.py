"""What people do with a model works on a patched one as before: with equal bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.integrations.families import FAMILIES, packed_inputs, tiny_hf
from tests.integrations.hf_runs import alone, assert_close, assert_same_bits, together
from varlen_sft import patch, unpatch
from varlen_sft.integrations.hf import is_patched

NAMES = ["llama3", "mistral", "smollm3", "gemma2", "gemma3", "olmo2"]


def prompts():
    ids = torch.randint(3, 53, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0  # padded on the left, as for generation
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *((name, cache) for name in NAMES for cache in ({}, {"use_cache": False})),
        ("llama3", {"cache_implementation": "static"}),
        ("gemma3", {"cache_implementation": "static"}),
    ],
)
def test_generate(name, cache):
    model = tiny_hf(name, torch.float32).eval()
    settings = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True, **cache}
    one = {key: value[1:] for key, value in prompts().items()}
    expected = [model.generate(**given, **settings) for given in (prompts(), one)]
    patch(model)
    for given, tokens in zip((prompts(), one), expected, strict=True):
        assert torch.equal(model.generate(**given, **settings), tokens)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_step_by_step_with_a_cache(name):
    model = tiny_hf(name, torch.float32).eval()
    ids = prompts()["input_ids"][1:]

    def logits():
        cache, steps = None, []
        with torch.no_grad():
            for part in (ids[:, :9], ids[:, 9:10], ids[:, 10:]):
                out = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits)
        return torch.cat(steps, 1)

    expected = logits()
    patch(model)
    assert torch.equal(logits(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_without_a_pack(name):
    model = tiny_hf(name, torch.bfloat16).eval()
    given = prompts()
    expected = model(**given).logits
    patch(model)
    assert torch.equal(model(**given).logits, expected)
    states = model(**given, output_hidden_states=True, output_attentions=True)
    assert len(states.hidden_states) == len(model.model.layers) + 1
    assert all(weights.shape == (2, 4, 12, 12) for weights in states.attentions)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_saved_files_are_the_same_bytes(name, tmp_path):
    model = tiny_hf(name, torch.float32)
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    parameters = [n for n, _ in model.named_parameters()]
    modules = [n for n, _ in model.named_modules()]
    patch(model)
    together(model, packed_inputs(), skip_logits=False)
    model.save_pretrained(tmp_path / "patched")
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == parameters
    assert [n for n, _ in model.named_modules()] == modules
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert "model.safetensors" in files and "config.json" in files
    assert sorted(path.name for path in (tmp_path / "patched").iterdir()) == files
    for file in files:
        assert (tmp_path / "patched" / file).read_bytes() == (
            tmp_path / "before" / file
        ).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "patched")
    assert not is_patched(again) and again.config._attn_implementation == "sdpa"


def test_a_state_dict_goes_in():
    model, other = tiny_hf("qwen3", torch.float32), tiny_hf("qwen3", torch.float32, seed=1)
    patch(model, loss=False)
    model.load_state_dict(other.state_dict())
    patch(other, loss=False)
    assert_same_bits(together(model, packed_inputs()), together(other, packed_inputs()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(name, reentrant):
    model = tiny_hf(name, torch.float32)
    patch(model, loss=False)
    expected = together(model, packed_inputs())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same_bits(together(model, packed_inputs()), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's
@pytest.mark.parametrize("patched_first", [False, True])
def test_peft_lora(patched_first):
    from peft import LoraConfig, get_peft_model

    def lora(model):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)  # zero otherwise, and A without a gradient
        return wrapped

    packed = packed_inputs()
    expected = alone(lora(tiny_hf("qwen2", torch.float32)), packed)
    inner = tiny_hf("qwen2", torch.float32)
    if patched_first:
        patch(inner, loss=False)
    model = lora(inner)
    if not patched_first:
        patch(model, loss=False)
    assert is_patched(model)
    actual = together(model, packed)
    assert sum("lora_" in key for key in actual) == 12
    assert_close(actual, expected, 1e-5)
    unpatch(model)
    assert not is_patched(model) and not is_patched(inner)
    assert model.config._attn_implementation == "eager"
    assert_same_bits(alone(model, packed), expected)


class Int8Linear(nn.Module):
    """A stand-in for the frozen layers of a quantised base: integers and a scale, no weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.data.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("quantised", (linear.weight.data / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        weight = self.quantised.to(x.dtype) * self.scale.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


def test_a_quantised_base_with_an_ordinary_head():
    def quantised():
        model = tiny_hf("llama3", torch.float32)
        for layer in model.model.layers:
            for owner in (layer.self_attn, layer.mlp):
                for name, linear in list(owner.named_children()):
                    if isinstance(linear, nn.Linear):
                        setattr(owner, name, Int8Linear(linear))
        return model

    packed = packed_inputs()
    expected = alone(quantised(), packed)
    model = quantised()
    patch(model)
    assert_close(together(model, packed), expected, 1e-5)


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_of_a_pack_is_that_of_the_samples_alone(name, prune):
    packed = packed_inputs()
    model = tiny_hf(name, torch.float32)
    names = {path: set(vars(module)) for path, module in model.named_modules()}
    expected = alone(model, packed)
    patch(model, prune_last_layer=prune)
    model.zero_grad()
    out = model(**packed, num_items_in_batch=torch.tensor(1))
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    assert out.logits is None
    expected.pop("logits")
    assert_close({"loss": out.loss.detach(), **grads}, expected, 1e-5)
    unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == names
