"""Llamas with random weights, and what a step of the whole-step GPU benchmark is made of."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import Sample
from varlen_sft.models.checkpoint import hf_parts
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.step_candidates import chat_like_lengths, chat_like_samples
from varlen_sft.tools.step_table import computed_when_padded
from varlen_sft.train.flops import step_flops

STD = 0.02  # of random weights, as transformers draws them


def llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> dict:
    """config.json of a Llama with a tied head and heads of 64."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 64,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
    }


def theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


SIZES = {
    "SmolLM2-135M": llama(576, 30, 9, 3, 1536, 49_152) | theta(1e5),
    "Llama-3.2-1B": llama(2048, 16, 32, 8, 8192, 128_256) | theta(5e5),
    "tiny": llama(128, 2, 4, 2, 160, 257) | theta(1e4),
}


@dataclass(frozen=True)
class Load:
    """A model's sizes, and the samples of a step, on a device."""

    name: str
    tokens: int
    seed: int
    device: str

    @cached_property
    def config(self) -> LlamaConfig:
        return LlamaConfig.from_hf(SIZES[self.name])

    @cached_property
    def samples(self) -> list[Sample]:
        lengths = chat_like_lengths(self.tokens, self.seed)
        return chat_like_samples(lengths, self.config.vocab_size, self.seed)

    @cached_property
    def batch(self) -> PackedBatch:
        return collate(self.samples)

    @cached_property
    def flops(self) -> int:
        """What the step has to compute."""
        lengths, rows = self.batch.sequences.lengths(), self.batch.rows
        return step_flops(
            self.config,
            self.batch.real_tokens,
            sum(length**2 for length in lengths),
            self.batch.supervised_tokens,
            pairs=int((self.batch.position_ids[rows[rows >= 0]] + 1).sum()),
        )

    def words(self) -> str:
        lengths = [len(sample) for sample in self.samples]
        padding = computed_when_padded(lengths) / sum(lengths)
        return (
            f"{len(lengths)} samples of {min(lengths)} to {max(lengths)} tokens, "
            f"{self.batch.supervised_tokens / sum(lengths):.0%} supervised; "
            f"micro-batches of 4 compute {padding:.2f}x the real tokens."
        )


# ------------------------------------------------------------------------- models


def hf_model(config: Mapping[str, Any], dtype: torch.dtype, device: str) -> Any:
    """transformers' model under SDPA, in training mode; its weights have yet to be filled."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa"
        ).train()


@torch.no_grad()
def fill(model: Any, seed: int) -> None:
    """Matrices normal with ``STD``, norms one: not as the installed transformers would have it."""
    draw = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STD, generator=draw)
        else:
            parameter.fill_(1)


def sharing(model: Any) -> Any:
    """A copy of the modules around the same parameters."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


@torch.no_grad()
def own_model(config: LlamaConfig, model: Any) -> LlamaForSFT:
    """LlamaForSFT with the weights of transformers' model."""
    with torch.device(model.device):
        own = LlamaForSFT(config).to(model.dtype).train()
    weights = model.state_dict()
    for name, parts in hf_parts(own).items():
        own.get_parameter(name).copy_(torch.cat([weights[key] for key, _ in parts]))
    return own
