"""A Llama for fine-tuning without padding: packed (T, C) inside, no batch axis anywhere.

Read top-down: the model, its blocks, their parts. T total tokens, C hidden size, I intermediate
size, H query heads, K kv heads, D head_dim, V vocabulary, S supervised rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from varlen_sft.data.batch import PackedBatch
from varlen_sft.models.config import LlamaConfig
from varlen_sft.modules import RotaryEmbedding, Rotation, VarlenAttention
from varlen_sft.ops.cross_entropy import LossOptions, LossOutput, linear_cross_entropy
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul
from varlen_sft.ops.last_layer import LastRows, last_rows, pick_rows, rows_cross_entropy
from varlen_sft.types import Numerics, Sequences

__all__ = ["LlamaForSFT"]


class LlamaForSFT(nn.Module):
    """A causal Llama whose forward is the loss of a pack.

    Args:
        config: sizes, from ``LlamaConfig.from_folder`` or ``from_hf``.
        numerics: rounding of RoPE, see ``apply_rope``.
        prune_last_layer: compute of the last layer only what the loss reads: keys and values
            everywhere, all else for supervised rows. It changes no number, but for the rounding
            of matrix products that have other shapes.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        numerics: Numerics = "fp32",
        prune_last_layer: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.prune_last_layer = prune_last_layer
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = RotaryEmbedding(config.rope_parameters, config.head_dim)
        self.layers = nn.ModuleList(Block(config, numerics) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        numerics: Numerics = "fp32",
    ) -> LlamaForSFT:
        """Load a HF checkpoint folder: one safetensors file or a sharded index.

        Args:
            folder: holds config.json and the weights.
            dtype: cast the weights to it; None keeps the checkpoint's.
            numerics: rounding of RoPE, see ``apply_rope``.

        Raises:
            InputError: no config, an unsupported family, or weights that do not fit it.
        """
        from varlen_sft.models.checkpoint import load_weights

        config = LlamaConfig.from_folder(folder)
        with torch.device("meta"):
            model = cls(config, numerics=numerics)
        load_weights(model, folder, dtype=dtype)
        return model

    def save_pretrained(self, folder: str | Path, *, copy_from: str | Path | None = None) -> None:
        """Write a folder that HF's ``from_pretrained`` opens (``export.save_checkpoint``)."""
        from varlen_sft.models.export import save_checkpoint

        save_checkpoint(self, folder, copy_from=copy_from)

    def forward(self, batch: PackedBatch, *, options: LossOptions | None = None) -> LossOutput:
        """Weighted loss of a pack; only supervised rows meet the vocabulary.

        Returns:
            LossOutput. Divide ``loss_sum`` by the weights of all packs that make one step.
        """
        total, last = batch.input_ids.shape[0], None
        if self.prune_last_layer:
            last = last_rows(batch.rows, total, batch.sequences)
        hidden = self.hidden_states(batch.input_ids, batch.position_ids, batch.sequences, last)
        score = linear_cross_entropy if last is None else rows_cross_entropy
        return score(
            hidden, self.lm_head.weight, batch.labels, token_weights=batch.token_weights,
            rows=batch.rows if last is None else last.rows, options=options,
        )  # fmt: skip

    def hidden_states(
        self,
        input_ids: Tensor,  # (T,) int64
        position_ids: Tensor,  # (T,) int64
        sequences: Sequences,
        last: LastRows | None = None,
    ) -> Tensor:
        """(T, C) after the last norm: what the head reads; with ``last`` (S, C), its rows alone."""
        rotation = self.rotary(position_ids, sequences)
        residual = Residual(self.embed_tokens(input_ids))
        *first, final = self.layers
        for layer in first:
            residual = layer(residual, rotation, sequences)
        return self.norm(final(residual, rotation, sequences, last))[0]

    def logits(self, input_ids: Tensor, position_ids: Tensor, sequences: Sequences) -> Tensor:
        """(T, V): every row through the head. For inspection; training never makes it."""
        return self.lm_head(self.hidden_states(input_ids, position_ids, sequences))


class Residual(NamedTuple):
    """The residual stream (T, C), and an update that the next norm adds to it as it reads."""

    stream: Tensor
    update: Tensor | None = None

    def value(self) -> Tensor:
        return self.stream if self.update is None else self.stream + self.update


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, numerics: Numerics) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VarlenAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            bias=config.attention_bias, numerics=numerics, fused=True,
        )  # fmt: skip
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        residual: Residual,
        rotation: Rotation,
        sequences: Sequences,
        last: LastRows | None = None,
    ) -> Residual:
        normed, stream = self.input_layernorm(residual)
        update = self.self_attn(normed, rotation, sequences, last)
        if last is not None:
            stream = pick_rows(stream, last.rows)
        normed, stream = self.post_attention_layernorm(Residual(stream, update))
        return Residual(stream, self.mlp(normed))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up as one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(silu_mul(self.gate_up_proj(hidden)))


class RMSNorm(nn.Module):
    """The norm of the residual stream, weight * x / rms(x), and the stream itself."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, residual: Residual) -> tuple[Tensor, Tensor]:
        stream, update = residual
        if update is None:
            return rms_norm(stream, self.weight, self.eps), stream
        return add_rms_norm(update, stream, self.weight, self.eps)
