"""The last block on supervised rows only: the same loss and gradients in every family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import relative_error
from tests.integrations.families import FAMILIES, VOCAB, tiny_hf
from varlen_sft import patch, unpatch
from varlen_sft.integrations.families import FAMILIES as TABLE
from varlen_sft.integrations.prune import install_pruning
from varlen_sft.integrations.saving import saving
from varlen_sft.types import IGNORE_INDEX

# Of PEFT and transformers, to each other: names that will change one day.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Of each sample: its length and the spans of tokens that are supervised.
PACKS = {
    "one answer at the end": [(30, [(20, 30)]), (41, [(35, 41)]), (17, [(9, 17)])],
    "several turns": [(100, [(3, 6), (60, 65), (97, 99)]), (30, []), (60, [(2, 5), (50, 60)])],
}


def call(name: str, **more: Any) -> dict[str, Any]:
    """A pack as keywords of ``model(...)``."""
    generator = torch.Generator().manual_seed(1)
    lengths = [length for length, _ in PACKS[name]]
    edges = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(3, VOCAB, (sum(lengths),), generator=generator)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for start, (_, spans) in zip(edges.tolist(), PACKS[name], strict=False):
        for first, end in spans:
            own = slice(start + first, start + end)
            targets[own] = ids[own]
    shifted = torch.cat([targets[1:], targets.new_full((1,), IGNORE_INDEX)])
    shifted[edges[1:] - 1] = IGNORE_INDEX
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "shift_labels": shifted[None],
        "cu_seq_lens_q": edges.int(),
        "cu_seq_lens_k": edges.int(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        **more,
    }


def padded() -> dict[str, Any]:
    """Three rows of unlike lengths, padded at the end, labels not shifted."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB, (3, 20), generator=generator)
    mask = torch.arange(20) < torch.tensor([[20], [7], [15]])
    labels = ids.masked_fill(~mask, IGNORE_INDEX)
    labels[:, :5] = IGNORE_INDEX
    labels[0, :14] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def run(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys() and expected["loss"] > 1
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error < bound, f"{name}: {error:.2e}"


def pruned_and_whole(model: Any, given: dict[str, Any], **options: Any):
    patch(model, prune_last_layer=True, **options)
    pruned = run(model, given)
    unpatch(model)
    patch(model, **options)
    whole = run(model, given)
    unpatch(model)
    return pruned, whole


def rows_seen(model: Any, given: dict[str, Any]) -> dict[str, int]:
    """Rows that go through each part of the last block and the norm behind it."""
    base = model.base_model
    parts = dict(base.layers[-1].named_modules()) | {"norm": base.norm}
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
             "mlp.up_proj", "mlp.down_proj", "norm")  # fmt: skip
    seen: dict[str, int] = {}

    def hook(name: str):
        return lambda module, args: seen.__setitem__(name, args[0].shape[:-1].numel())

    handles = [parts[name].register_forward_pre_hook(hook(name)) for name in names]
    model(**given)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", [*PACKS, "padded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_whole_block(name, kind):
    if kind == "padded":  # in fp64 the mask of HF's eager attention overflows its fp32 softmax
        assert_equal(*pruned_and_whole(tiny_hf(name, torch.float32), padded()), 1e-5)
        return
    model = tiny_hf(name)
    bound = 1e-10 if TABLE[model.config.model_type].keeps_fp64 else 1e-6
    assert_equal(*pruned_and_whole(model, call(kind)), bound)


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma2", "olmo2"])
def test_fp32(name):
    assert_equal(*pruned_and_whole(tiny_hf(name, torch.float32), call("several turns")), 1e-5)


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_bf16_is_as_near_to_fp32_as_the_whole_block_is(name):
    model, given = tiny_hf(name, torch.bfloat16), call("several turns")
    exact_model = tiny_hf(name, torch.float32)
    exact_model.load_state_dict(model.state_dict())
    patch(exact_model)
    exact = run(exact_model, given)
    pruned, whole = pruned_and_whole(model, given)
    eps = torch.finfo(torch.bfloat16).eps
    for key, value in exact.items():
        assert relative_error(pruned[key], value) <= 2 * relative_error(whole[key], value) + eps, (
            key
        )


@pytest.mark.parametrize(
    "options", [{"rope": False}, {"numerics": "hf"}, {"attention": False}], ids=str
)
@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_beside_other_options(name, options):
    """Hugging Face's RoPE, its rounding, or its attention, which queries every row."""
    model = tiny_hf(name, torch.float32)
    assert_equal(*pruned_and_whole(model, call("several turns"), **options), 1e-5)


@pytest.mark.parametrize("kind", PACKS)
def test_a_last_layer_without_positions(kind):
    model = tiny_hf("smollm3", no_rope_layers=[1, 1, 0])
    assert not model.model.layers[-1].self_attn.use_rope
    assert_equal(*pruned_and_whole(model, call(kind)), 1e-10)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, given = tiny_hf("gemma3"), call("several turns")
    expected, _ = pruned_and_whole(model, given)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_equal(pruned_and_whole(model, given)[0], expected, 1e-12)
    patch(model, prune_last_layer=True)
    calls: list[int] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    run(model, given)
    assert len(calls) == 2  # once more in the backward


@pytest.mark.parametrize("kind", PACKS)
def test_adapters_of_peft_on_the_projections_of_the_last_layer(kind):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, layers_to_transform=[1])
    model = peft.get_peft_model(tiny_hf("qwen3"), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT begins with zeros, behind which a mistake would hide
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    pruned, whole = pruned_and_whole(model, call(kind))
    assert len(whole) == 1 + 2 * len(targets)
    assert_equal(pruned, whole, 1e-10)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "olmo2"])
def test_only_keys_and_values_are_computed_everywhere(name):
    model, given = tiny_hf(name), call("one answer at the end")
    patch(model, prune_last_layer=True)
    total, supervised = 88, 24
    seen = rows_seen(model, given)
    assert seen.pop("self_attn.k_proj") == seen.pop("self_attn.v_proj") == total
    assert seen.pop("self_attn.q_proj") == supervised + 3  # the last row of each has no target
    assert set(seen.values()) == {supervised}


def test_active_in_our_own_loss_alone():
    model, given = tiny_hf("smollm2", torch.float32), call("one answer at the end")
    plain = copy.deepcopy(model)
    patch(model, prune_last_layer=True)
    everything = {88}
    assert set(rows_seen(model, {**given, "skip_logits": False}).values()) == everything
    assert set(rows_seen(model, {**given, "output_hidden_states": True}).values()) == everything
    unlabelled = {k: v for k, v in given.items() if k != "shift_labels"}
    assert set(rows_seen(model, unlabelled).values()) == everything
    prompt = given["input_ids"][:, :9]
    for a, b in ((model, plain), (model.eval(), plain.eval())):
        assert torch.equal(a(input_ids=prompt).logits, b(input_ids=prompt).logits)
    assert torch.equal(
        model.generate(prompt, max_new_tokens=5, do_sample=False),
        plain.generate(prompt, max_new_tokens=5, do_sample=False),
    )


def test_taken_back_exactly():
    model, given = tiny_hf("smollm2"), call("one answer at the end")
    patch(model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    expected = run(model, given)
    undo = install_pruning(model)
    run(model, given)
    undo()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert vars(module).get("forward") == before[name].get("forward")
    for key, value in run(model, given).items():
        assert torch.equal(value, expected[key])


def test_a_block_that_is_built_otherwise_is_refused():
    model = tiny_hf("smollm2")
    model.model.layers[-1].extra = torch.nn.Identity()
    with pytest.raises(ValueError, match="LlamaDecoderLayer must hold .*, got extra, input_layer"):
        patch(model, prune_last_layer=True)
    assert "forward" not in vars(model) and "forward" not in vars(model.model.layers[-1])
    patch(model)


def test_the_report_of_patch_says_what_is_spared():
    model = tiny_hf("smollm2", torch.float32)
    report = patch(model, prune_last_layer=True)
    assert report.saving == saving(model.config)
    assert "supervised rows only, but for K and V\n" in str(report)
    assert "spares 18.8% of the FLOPs of a step (sequences of 1024 tokens, 40%" in str(report)
    unpatch(model)
    assert patch(model).saving is None


def test_no_pruning_without_our_loss():
    with pytest.raises(ValueError, match="prune_last_layer=True needs loss=True"):
        patch(tiny_hf("smollm2"), loss=False, prune_last_layer=True)
