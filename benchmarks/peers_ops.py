"""RoPE, attention and sequences as the benchmarks compare them, each called as its users call it.

T tokens, H query heads, K kv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.attention import varlen_attention
from varlen_sft.ops.rope import apply_rope, rope_table
from varlen_sft.ops.sequences import sequences_from_lengths, sequences_from_position_ids
from varlen_sft.tools import step_bench
from varlen_sft.types import Sequences

Step = Callable[[], Any]


@dataclass(frozen=True)
class HeadsLoad:
    """q, k, v of SmolLM2-135M's shapes, or others, on chat-like lengths."""

    dtype: str
    tokens: int
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    device: str = "cpu"
    seed: int = 0

    def make(self) -> HeadsInputs:
        draw = torch.Generator(self.device).manual_seed(self.seed)
        lengths = step_bench.chat_like_lengths(self.tokens, self.seed)
        parts = (self.heads, self.kv_heads, self.kv_heads)
        shape, dtype = (sum(lengths), sum(parts), self.head_dim), step_bench.DTYPES[self.dtype]
        qkv = torch.randn(shape, generator=draw, device=self.device).to(dtype)
        # Views as the fused projection gives them; each a leaf, so that a step times the op alone.
        q, k, v = (x.detach().requires_grad_() for x in qkv.split(parts, dim=1))
        cu_seqlens, longest, count = sequences_from_lengths(lengths)
        cos, sin = rope_table(
            {"rope_type": "default", "rope_theta": 1e5}, self.head_dim, longest, device=self.device
        )
        ids = reference.position_ids_from_lengths(lengths).to(self.device)
        edges = Sequences(cu_seqlens.to(self.device), longest, count.to(self.device))
        return HeadsInputs(q, k, v, cos, sin, ids, edges, lengths)


class HeadsInputs(NamedTuple):
    q: Tensor  # (T, H, D)
    k: Tensor  # (T, K, D)
    v: Tensor  # (T, K, D)
    cos: Tensor  # (P, D/2) fp32
    sin: Tensor  # (P, D/2) fp32
    position_ids: Tensor  # (T,)
    sequences: Sequences
    lengths: list[int]


def there_and_back(
    forward: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], grads: tuple
) -> Step:
    """Forward and backward; outputs, then gradients of the inputs."""

    def step() -> tuple[Tensor, ...]:
        out = forward(*inputs)
        return (*(x.detach() for x in out), *torch.autograd.grad(out, inputs, grads))

    return step


def _grads(*like: Tensor) -> tuple[Tensor, ...]:
    draw = torch.Generator(like[0].device).manual_seed(1)
    return tuple(
        torch.randn(x.shape, generator=draw, device=x.device, dtype=torch.float32).to(x.dtype)
        for x in like
    )


# ----------------------------------------------------------------------- RoPE


def rope_ours(x: HeadsInputs, numerics: str = "fp32") -> Step:
    def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, k, x.cos, x.sin, x.position_ids, numerics=numerics)  # type: ignore

    return there_and_back(forward, (x.q, x.k), _grads(x.q, x.k))


def rope_reference(x: HeadsInputs, dtype: torch.dtype | None = None) -> Step:
    """The specification, in fp64 if asked for."""
    q, k = (t.detach().to(dtype or t.dtype).requires_grad_() for t in (x.q, x.k))

    def forward(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return reference.apply_rope(q, k, x.cos, x.sin, x.position_ids)

    return there_and_back(forward, (q, k), tuple(g.to(q.dtype) for g in _grads(x.q, x.k)))


def hf_layout(x: HeadsInputs) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """q and k as HF's attention holds them, (1, H, T, D) views, and its tables (1, T, D)."""
    views = tuple(t.detach().contiguous().transpose(0, 1)[None].requires_grad_() for t in x[:2])
    cos, sin = (table[x.position_ids].repeat(1, 2)[None].to(x.q.dtype) for table in x[3:5])
    return views, (cos, sin)  # type: ignore[return-value]


def rope_hf(x: HeadsInputs, wrap: Callable = lambda f: f) -> Step:
    """transformers' eager formula on its own layout; ``wrap`` may compile it."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    views, (cos, sin) = hf_layout(x)
    function = wrap(apply_rotary_pos_emb)
    grads = tuple(g.transpose(0, 1)[None] for g in _grads(x.q, x.k))
    return there_and_back(lambda q, k: function(q, k, cos, sin), views, grads)


def rope_liger(x: HeadsInputs) -> Step:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    views, (cos, sin) = hf_layout(x)
    grads = tuple(g.transpose(0, 1)[None] for g in _grads(x.q, x.k))
    return there_and_back(lambda q, k: liger_rotary_pos_emb(q, k, cos, sin), views, grads)


def rope_flash_attn(x: HeadsInputs) -> Step:
    """flash-attn's rotary for packed sequences: q and k in a call each, edges instead of ids."""
    from flash_attn.layers.rotary import apply_rotary_emb

    edges = {"cu_seqlens": x.sequences.cu_seqlens, "max_seqlen": x.sequences.max_seqlen}
    cos, sin = x.cos.to(x.q.dtype), x.sin.to(x.q.dtype)

    def forward(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return tuple(apply_rotary_emb(t, cos, sin, **edges) for t in (q, k))

    return there_and_back(forward, (x.q, x.k), _grads(x.q, x.k))


# ------------------------------------------------------------------ attention


def attention_ours(x: HeadsInputs, impl: str | None = None) -> Step:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (varlen_attention(q, k, v, x.sequences, impl=impl),)

    return there_and_back(forward, x[:3], _grads(x.q))


def attention_reference(x: HeadsInputs, dtype: torch.dtype | None = None) -> Step:
    inputs = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in x[:3])
    grads = tuple(g.to(inputs[0].dtype) for g in _grads(x.q))
    return there_and_back(
        lambda q, k, v: (reference.varlen_attention(q, k, v, x.sequences),), inputs, grads
    )


def attention_sdpa(x: HeadsInputs) -> Step:
    """torch's kernel on every sequence alone."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        out = []
        for piece in zip(*(t.split(x.lengths) for t in (q, k, v)), strict=True):
            qkv = (t.transpose(0, 1)[None] for t in piece)
            o = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
            out.append(o[0].transpose(0, 1))
        return (torch.cat(out),)

    return there_and_back(forward, x[:3], _grads(x.q))


def attention_block_mask(x: HeadsInputs) -> Step:
    """One call under a T x T mask, as HF's packed rows have it."""
    lengths = torch.tensor(x.lengths, device=x.q.device)
    owner = torch.arange(len(x.lengths), device=x.q.device).repeat_interleave(lengths)
    mask = (owner[:, None] == owner) & reference.attention_mask(
        len(owner), len(owner), device=x.q.device
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        qkv = (t.transpose(0, 1)[None] for t in (q, k, v))
        o = F.scaled_dot_product_attention(*qkv, attn_mask=mask, enable_gqa=True)
        return (o[0].transpose(0, 1),)

    return there_and_back(forward, x[:3], _grads(x.q))


# ------------------------------------------------------------------ sequences


def position_ids(tokens: int, device: str = "cpu") -> Tensor:
    """(T,) int64 of chat-like sequences."""
    return reference.position_ids_from_lengths(step_bench.chat_like_lengths(tokens, 0)).to(device)


def find_sequences(ids: Tensor, impl: str | None = None, capacity: int | None = None) -> Step:
    return lambda: sequences_from_position_ids(ids, capacity=capacity, impl=impl)


# --------------------------------------------------------------------- checks


def errors(step: Step, truth: tuple[Tensor, ...]) -> list[float]:
    """Relative errors (L2) of outputs and gradients."""
    pairs = zip(step(), truth, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def check(ours: Step, low: Step, high: Step, dtype: torch.dtype) -> float:
    """The largest of our errors against fp64.

    Args:
        ours, low, high: what is checked, the reference in the same dtype, the reference in fp64.

    Raises:
        AssertionError: one is above twice that of the reference, plus one rounding.
    """
    truth = high()
    found, allowed = errors(ours, truth), errors(low, truth)
    for error, eager in zip(found, allowed, strict=True):
        assert error <= 2 * eager + torch.finfo(dtype).eps, f"{found} against {allowed}"
    return max(found)
