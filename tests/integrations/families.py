"""A tiny random model of each supported Hugging Face family, and packs to run it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from tests.helpers import ROPE_PARAMETERS

VOCAB = 53
LENGTHS = [5, 34, 2, 17, 18, 41]  # crosses windows of 8 and 16; one much longer than the others

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": True,
}


def _family(kind: type[PreTrainedConfig], **changes: Any) -> Callable[[], PreTrainedConfig]:
    shape = {**SHAPE, **changes}
    return lambda: kind(**{key: value for key, value in shape.items() if value is not None})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    # MHA, as Llama 1 and 2 have it; the others have GQA
    "llama2": _family(LlamaConfig, num_key_value_heads=4, head_dim=8),
    "llama3": _family(LlamaConfig, rope_parameters=dict(ROPE_PARAMETERS["llama3"])),
    "smollm2": _family(LlamaConfig, tie_word_embeddings=True, rms_norm_eps=1e-5),
    "mistral": _family(MistralConfig, sliding_window=8),
    "qwen2": _family(Qwen2Config, tie_word_embeddings=True),
    "qwen2_window": _family(
        Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": _family(Qwen3Config),
    "granite": _family(
        GraniteConfig,
        embedding_multiplier=3.0,
        logits_scaling=4.0,
        residual_multiplier=0.5,
        attention_multiplier=0.2,
        head_dim=None,
    ),  # fmt: skip
    "smollm3": _family(SmolLM3Config, no_rope_layers=[1, 0, 1], num_hidden_layers=3),
    "gemma2": _family(
        Gemma2Config,
        sliding_window=8,
        query_pre_attn_scalar=12,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=4.0,
    ),  # fmt: skip
    "gemma3": _family(
        Gemma3TextConfig,
        sliding_window=8,
        query_pre_attn_scalar=12,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        num_hidden_layers=3,
    ),  # fmt: skip
    "olmo2": _family(Olmo2Config),
}
"""Real config classes. Every number that a family can set differs from its neutral value."""


def tiny_hf(
    name: str,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    attention: str = "eager",
    **changes: Any,
) -> PreTrainedModel:
    """A random model in train mode, its weights large enough that attention and norms matter.

    In fp64 its norms keep fp64 (HF's cast to fp32). HF's eager attention takes its softmax in
    fp32 whatever comes: where 1e-10 is asked of HF itself, take ``attention="sdpa"`` (which Gemma
    2 with its softcap does not have).

    Args:
        name: a key of ``FAMILIES``.
        changes: attributes of the config to change first.
    """
    config = FAMILIES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
            start = parameter.double() if parameter.dim() == 1 else 0.0  # norms and biases
            parameter.data = (start + noise).to(dtype)  # buffers keep their dtype
    model.config.dtype = dtype
    if dtype == torch.float64:
        keep_fp64(model)
    return model.train()


def keep_fp64(model: nn.Module) -> None:
    """Every RMSNorm of this instance computes in its input's dtype instead of fp32."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
    weight = self.weight + (1.0 if type(self).__name__.startswith("Gemma") else 0.0)
    return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


def packed_inputs(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> dict[str, Any]:
    """What our collator hands to ``model(...)``: random samples of these lengths in one row.

    About a third of the targets are -100, and always the last of each sample.
    """
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(3, VOCAB, (total,), generator=generator)
    edges = torch.tensor([0, *lengths]).cumsum(0)
    labels = torch.cat([ids[1:], ids.new_full((1,), -100)])
    labels[torch.rand(total, generator=generator) < 0.3] = -100
    labels[edges[1:] - 1] = -100
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "shift_labels": labels[None],
        "cu_seq_lens_q": edges.int(),
        "cu_seq_lens_k": edges.int(),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def alone_inputs(packed: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The samples of such a pack one by one: input_ids and shift_labels, (1, L) each."""
    edges = packed["cu_seq_lens_q"].tolist()
    spans = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return [{key: packed[key][:, s] for key in ("input_ids", "shift_labels")} for s in spans]
