"""Public modules that anyone's Llama can be built of: RoPE by position ids, varlen attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varlen_sft.ops.attention import varlen_attention
from varlen_sft.ops.last_layer import LastRows, QueryRuns, pick_rows
from varlen_sft.ops.rope import apply_rope, rope_table
from varlen_sft.rope_frequencies import (
    inverse_frequencies,
    needs_long_frequencies,
    resolve_rope_parameters,
)
from varlen_sft.types import Numerics, Sequences


class Rotation(NamedTuple):
    """What turns q and k in one step: made once by ``RotaryEmbedding``, used by every layer."""

    cos: Tensor  # (P, R/2) fp32
    sin: Tensor  # (P, R/2) fp32
    position_ids: Tensor  # (T,) rows of the table


class RotaryEmbedding(nn.Module):
    """RoPE of every HF type, by position ids; a sequence's frequencies depend on it alone.

    "dynamic" and "longrope" choose frequencies by a sequence's length. HF takes the longest of the
    batch, so that a neighbour changes a conversation; here each sequence has those of its own
    length.

    The tables are fp32 and no buffers: ``model.to(torch.bfloat16)`` cannot round them.

    Args:
        rope_parameters: as ``resolve_rope_parameters`` returns them.
        head_dim: D.
    """

    def __init__(self, rope_parameters: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        self.rope_parameters = dict(rope_parameters)
        self.head_dim = head_dim
        self._table: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_config(cls, config: Any) -> RotaryEmbedding:
        """Built from a HF config, an object or the dictionary of its ``config.json``."""
        config = _as_dict(config)
        return cls(resolve_rope_parameters(config), _head_dim(config))

    def forward(self, position_ids: Tensor, sequences: Sequences) -> Rotation:
        """Tables and row indices for the (T,) int32 or int64 position ids of a pack.

        Position ids must stay below the larger of ``max_position_embeddings`` and ``max_seqlen``.
        """
        rope_type, longest = self.rope_parameters["rope_type"], sequences.max_seqlen
        if rope_type == "dynamic" and needs_long_frequencies(self.rope_parameters, longest):
            return self._per_token(position_ids, sequences)
        cos, sin = self._tables(longest, position_ids.device)
        if rope_type == "longrope":
            original = self.rope_parameters["original_max_position_embeddings"]
            is_long = _own_length(position_ids, sequences) > original
            position_ids = position_ids + is_long * (cos.shape[0] // 2)
        return Rotation(cos, sin, position_ids)

    def _tables(self, longest: int, device: torch.device) -> tuple[Tensor, Tensor]:
        positions = max(longest, self.rope_parameters.get("max_position_embeddings", 0))
        tables = 2 if self.rope_parameters["rope_type"] == "longrope" else 1
        cached = self._table
        if cached is None or cached[0].device != device or cached[0].shape[0] < tables * positions:
            cached = rope_table(self.rope_parameters, self.head_dim, positions, device=device)
            self._table = cached
        return cached

    def _per_token(self, position_ids: Tensor, sequences: Sequences) -> Rotation:
        """A table row for every token, from the frequencies of its own sequence."""
        inv_freq, scaling = inverse_frequencies(
            self.rope_parameters,
            self.head_dim,
            sequence_length=_own_length(position_ids, sequences)[:, None],
            device=position_ids.device,
        )
        angles = position_ids[:, None].float() * inv_freq
        rows = torch.arange(position_ids.shape[0], device=position_ids.device)
        return Rotation(angles.cos() * scaling, angles.sin() * scaling, rows)

    def extra_repr(self) -> str:
        return f"rope_type={self.rope_parameters['rope_type']}, head_dim={self.head_dim}"


def _own_length(position_ids: Tensor, sequences: Sequences) -> Tensor:
    """(T,) the length of each token's sequence; output_size spares a wait for the device."""
    lengths = sequences.cu_seqlens.diff().long()
    return lengths.repeat_interleave(lengths, output_size=position_ids.shape[0])


class VarlenAttention(nn.Module):
    """Grouped-query attention with RoPE over the sequences of a pack.

    With ``fused=False`` the parameters are named as in HF's ``LlamaAttention`` (q_proj, k_proj,
    v_proj, o_proj); with ``fused=True`` the first three are one qkv_proj, rows in that order.

    Args:
        hidden_size: C.
        num_heads: H query heads.
        num_kv_heads: K, which divides H.
        head_dim: D.
        bias: whether the projections have biases.
        softmax_scale: D ** -0.5 by default.
        window_size: keys that a query sees at most, its own counted.
        softcap: see ``varlen_attention``.
        numerics: see ``apply_rope``.
        fused: one matrix for q, k and v.

    Raises:
        ValueError: K does not divide H.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        softmax_scale: float | None = None,
        window_size: int | None = None,
        softcap: float | None = None,
        numerics: Numerics = "fp32",
        fused: bool = False,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={num_heads}, got {num_kv_heads}")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.softmax_scale, self.window_size, self.softcap = softmax_scale, window_size, softcap
        self.numerics: Numerics = numerics
        self.fused = fused
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        if fused:
            self.qkv_proj = nn.Linear(hidden_size, q_size + 2 * kv_size, bias=bias)
        else:
            self.q_proj = nn.Linear(hidden_size, q_size, bias=bias)
            self.k_proj = nn.Linear(hidden_size, kv_size, bias=bias)
            self.v_proj = nn.Linear(hidden_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(q_size, hidden_size, bias=bias)

    @classmethod
    def from_config(cls, config: Any, *, fused: bool = False) -> VarlenAttention:
        """Built from the config of a HF Llama: an object, or its config.json as a dictionary."""
        config = _as_dict(config)
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            _head_dim(config),
            bias=bool(config.get("attention_bias", False)),
            fused=fused,
        )

    def forward(
        self,
        hidden: Tensor,
        rotation: Rotation,
        sequences: Sequences,
        last: LastRows | None = None,
    ) -> Tensor:
        """(T, C) to (T, C), or with ``last`` to (S, C), the rows that it names."""
        if last is not None and last.runs is not None:
            return self.o_proj(self._attend_runs(hidden, rotation, last.runs))
        q, k, v = self._project(hidden)
        q, k = apply_rope(q, k, *rotation, numerics=self.numerics)
        out = self._attend(q, k, v, sequences, None).flatten(1)
        return self.o_proj(out if last is None else pick_rows(out, last.rows))

    def read_on(
        self,
        hidden: Tensor,
        rotation: Rotation,
        sequences: Sequences,
        keep: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Sequences]],
    ) -> Tensor:
        """(T, C) to (T, C) of rows that go on in sequences read before.

        Args:
            sequences: of the new rows.
            keep: takes k and v (T, K, D) of the new rows; gives those of all rows of the same
                sequences, the new ones last in each, and where these sequences begin and end.
        """
        q, k, v = self._project(hidden)
        q, k = apply_rope(q, k, *rotation, numerics=self.numerics)
        k, v, k_sequences = keep(k, v)
        return self.o_proj(self._attend(q, k, v, sequences, k_sequences).flatten(1))

    def _attend_runs(self, hidden: Tensor, rotation: Rotation, runs: QueryRuns) -> Tensor:
        """(S, H D), with no more queries than the supervised rows need."""
        q, k, v = self._project_apart(pick_rows(hidden, runs.rows), hidden)
        own = rotation._replace(position_ids=rotation.position_ids[runs.rows])
        q, _ = apply_rope(q, q[:, :0], *own, numerics=self.numerics)
        _, k = apply_rope(k[:, :0], k, *rotation, numerics=self.numerics)
        if runs.k_rows is not None:
            k, v = (pick_rows(x, runs.k_rows, repeated=True) for x in (k, v))
        out = self._attend(q, k, v, runs.sequences, runs.k_sequences).flatten(1)
        return out if runs.kept is None else pick_rows(out, runs.kept)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, k_sequences: Sequences | None
    ) -> Tensor:
        return varlen_attention(
            q, k, v, sequences, k_sequences=k_sequences, softmax_scale=self.softmax_scale,
            window_size=self.window_size, softcap=self.softcap,
        )  # fmt: skip

    def _project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (T, H, D), k and v (T, K, D); views of one buffer when fused."""
        if not self.fused:
            return self._project_apart(hidden, hidden)
        qkv = self.qkv_proj(hidden).unflatten(1, (-1, self.head_dim))
        return qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)

    def _project_apart(self, q_hidden: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of other rows than k and v."""
        if not self.fused:
            pairs = (self.q_proj, q_hidden), (self.k_proj, hidden), (self.v_proj, hidden)
            return tuple(proj(x).unflatten(1, (-1, self.head_dim)) for proj, x in pairs)
        sizes = self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim
        weights = self.qkv_proj.weight.split(sizes)
        bias = self.qkv_proj.bias
        biases = (None, None) if bias is None else bias.split(sizes)
        q, kv = (
            nn.functional.linear(x, *own).unflatten(1, (-1, self.head_dim))
            for x, own in zip((q_hidden, hidden), zip(weights, biases, strict=True), strict=True)
        )
        return q, *kv.split(self.num_kv_heads, dim=1)


def _as_dict(config: Any) -> dict[str, Any]:
    return dict(config) if isinstance(config, Mapping) else config.to_dict()


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
