"""Norms and SwiGLU of the blocks: which are ours, when, and again when checkpointing recomputes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.integrations.families import packed_inputs, tiny_hf
from tests.integrations.hf_runs import alone, assert_close, together
from varlen_sft import _extension, patch, reference, unpatch
from varlen_sft.integrations import hf_blocks

pytestmark = pytest.mark.skipif(not _extension.load(), reason=_extension.status())


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Our ops, in the order in which blocks called them."""
    calls: list[str] = []

    def counted(name, op):
        return lambda *args: (calls.append(name), op(*args))[1]

    for name in ("rms_norm", "silu_mul"):
        monkeypatch.setattr(hf_blocks, name, counted(name, getattr(hf_blocks, name)))
    return calls


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2", {"LlamaRMSNorm": 4, "LlamaMLP": 2}),
        ("mistral", {"MistralRMSNorm": 4, "MistralMLP": 2}),
        ("qwen2", {"Qwen2RMSNorm": 4, "Qwen2MLP": 2}),
        ("qwen3", {"Qwen3RMSNorm": 8, "Qwen3MLP": 2}),  # q and k have norms of their own
        ("granite", {"GraniteRMSNorm": 4, "GraniteMLP": 2}),
        ("smollm3", {"SmolLM3RMSNorm": 6, "SmolLM3MLP": 3}),
        ("gemma2", {}),  # 1 + weight, and GELU
        ("gemma3", {}),
        ("olmo2", {"Olmo2MLP": 2}),  # its norm multiplies before it rounds
    ],
)
def test_what_is_replaced_in_a_family(name, expected, ran):
    model = tiny_hf(name, torch.float32)
    report = patch(model, loss=False)
    assert dict(report.elementwise) == expected
    together(model, packed_inputs())
    norms = sum(count for kind, count in expected.items() if "Norm" in kind)
    assert (ran.count("rms_norm"), ran.count("silu_mul")) == (norms, sum(expected.values()) - norms)


def test_what_is_not_a_pack_is_computed_as_before(ran):
    model = tiny_hf("llama3", torch.float32)
    patch(model)
    ids = torch.randint(3, 53, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval().generate(ids[:1], max_new_tokens=2, do_sample=False)
    assert ran == []
    together(model, packed_inputs())
    assert ran != []
    ran.clear()
    unpatch(model)
    together(model, packed_inputs())
    assert ran == [] and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "options", [{"elementwise": False}, {"numerics": "hf"}, {"attention": False}]
)
def test_who_does_not_want_it(options, ran):
    model = tiny_hf("llama3", torch.float32)
    report = patch(model, **options)
    assert report.elementwise == () and "elementwise" not in str(report)
    if options.get("attention", True):
        together(model, packed_inputs())
    assert ran == []


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_the_same_again(prune, reentrant, ran):
    """Both passes use our ops; beside HF's own the second would not fit the first."""
    model = tiny_hf("llama3", torch.float32)
    patch(model, prune_last_layer=prune)
    whole = together(model, packed_inputs())
    once = list(ran)
    ran.clear()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again = together(model, packed_inputs())
    assert ran.count("silu_mul") == 2 * once.count("silu_mul") == 4
    assert ran.count("rms_norm") == 2 * once.count("rms_norm") == 8
    assert_close(again, whole, 1e-12)
    checkpoint = vars(model.model.layers[0])["_gradient_checkpointing_func"]
    assert "hf_blocks" not in checkpoint.__module__  # as HF left it


def test_in_fp64_ours_keeps_fp64_where_the_norm_of_hf_does_not():
    packed = packed_inputs()
    model = tiny_hf("llama3", torch.float64, attention="sdpa")  # its norms made to keep fp64
    exact = alone(model, packed)
    for module in model.modules():
        vars(module).pop("forward", None)  # HF's own again
    assert dict(patch(model).elementwise)["LlamaRMSNorm"] == 4
    assert_close(together(model, packed), exact, 1e-6)
    final = model.model.norm
    final.forward = lambda x: reference.rms_norm(x, final.weight, final.variance_epsilon)
    assert_close(together(model, packed), exact, 1e-10)


def test_the_error_of_bf16_is_that_of_eager():
    packed = packed_inputs()
    exact = alone(tiny_hf("llama3", torch.float64), packed)
    low = tiny_hf("llama3", torch.float32).bfloat16()
    eager = together_error(low, packed, exact, elementwise=False)
    fused = together_error(low, packed, exact, elementwise=True)
    for name, error in fused.items():
        assert error <= 2 * eager[name] + torch.finfo(torch.bfloat16).eps, name


def together_error(model, packed, exact, **options):
    patch(model, **options)
    made = together(model, packed)
    unpatch(model)
    return {
        name: float((made[name].double() - x).norm() / x.double().norm().clamp(min=1e-30))
        for name, x in exact.items()
    }


def test_a_norm_that_somebody_replaced_stays_theirs(ran):
    model = tiny_hf("llama3", torch.float32)
    theirs = model.model.layers[0].input_layernorm
    theirs.forward = lambda x: x * 2
    report = patch(model)
    assert dict(report.elementwise)["LlamaRMSNorm"] == 3
    unpatch(model)
    assert float(theirs(torch.ones(1, 1, 32))[0, 0, 0]) == 2


def test_adapters_and_other_dtypes(ran):
    """A norm in fp32 between bf16 layers, as some keep it, computes as before."""
    model = tiny_hf("llama3", torch.float32).bfloat16()
    for layer in model.model.layers:
        layer.post_attention_layernorm.float()
        layer.mlp.float()
        layer.mlp.register_forward_hook(lambda module, args, out: out.bfloat16())
    patch(model)
    together(model, packed_inputs())
    assert ran.count("rms_norm") == 2 and ran.count("silu_mul") == 2


def test_formulas_are_found_by_trying():
    config = tiny_hf("llama3").config

    class Other(LlamaMLP):
        def forward(self, x):
            return super().forward(x) + x

    class Named(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) * 1.01

    swiglu = LlamaMLP(config)
    assert hf_blocks._is_swiglu(swiglu) and not hf_blocks._is_swiglu(Other(config))
    swiglu.act_fn = ACT2FN["gelu"]
    assert not hf_blocks._is_swiglu(swiglu) and not hf_blocks._is_swiglu(nn.Linear(2, 2))
    assert hf_blocks._is_llama_norm(LlamaRMSNorm(8))
    for kind in (Named(8), Gemma2RMSNorm(8), nn.LayerNorm(8)):
        assert not hf_blocks._is_llama_norm(kind)


def test_nothing_is_replaced_where_nothing_is_faster(monkeypatch):
    monkeypatch.setattr(hf_blocks, "FUSED_ON", ())
    assert patch(tiny_hf("llama3")).elementwise == ()
