"""The specification: every op in eager torch, on any device, in any precision up to fp64.

Kernels, C++ ops, tests and benchmarks are all judged against these functions; nobody re-declares
them. They need torch alone, and autograd differentiates them.

T total tokens of a pack, B sequences in it, H query heads, K kv heads, D head_dim, R rotary dims,
C hidden size, V vocabulary, S supervised rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from varlen_sft.rope_frequencies import inverse_frequencies
from varlen_sft.types import (
    IGNORE_INDEX,
    LossOptions,
    LossOutput,
    Numerics,
    Sequences,
    accumulation_dtype,
)

# ---------------------------------------------------------------- sequences


def sequences_from_lengths(lengths: Iterable[int]) -> Sequences:
    """Sequences of a pack from the lengths of its samples, on the CPU."""
    ends = torch.tensor([0, *lengths], dtype=torch.int64)
    longest = int(ends.max())
    cu_seqlens = ends.cumsum(0).to(torch.int32)
    return Sequences(cu_seqlens, longest, torch.tensor(len(ends) - 1, dtype=torch.int32))


def position_ids_from_lengths(lengths: Iterable[int]) -> Tensor:
    """(T,) int64: 0, 1, ... in every sequence."""
    return torch.cat([torch.zeros(0, dtype=torch.int64), *(torch.arange(n) for n in lengths)])


def sequences_from_position_ids(position_ids: Tensor) -> Sequences:
    """A new sequence starts where ``position_ids[i] != position_ids[i-1] + 1``."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[1:] = position_ids[1:] != position_ids[:-1] + 1
    edges = [*torch.nonzero(starts).flatten().tolist(), position_ids.numel()]
    sequences = sequences_from_lengths([b - a for a, b in zip(edges, edges[1:], strict=False)])
    return Sequences(
        sequences.cu_seqlens.to(position_ids.device),
        sequences.max_seqlen,
        sequences.num_sequences.to(position_ids.device),
    )


# --------------------------------------------------------------------- RoPE


def rope_table(
    rope_parameters: dict,
    head_dim: int,
    max_position: int,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin), each (P, R/2) fp32, attention scaling folded in.

    "longrope" has two sets of frequencies: its tables are stacked, (2 P, R/2), positions of a
    sequence longer than the pretrained length count from P.
    """
    lengths: list[int | None] = [None]
    if rope_parameters["rope_type"] == "longrope":
        lengths.append(rope_parameters["original_max_position_embeddings"] + 1)
    positions = torch.arange(max_position, device=device, dtype=torch.float32)
    cosines, sines = [], []
    for length in lengths:
        inv_freq, scaling = inverse_frequencies(
            rope_parameters, head_dim, sequence_length=length, device=device
        )
        angles = positions[:, None] * inv_freq
        cosines.append(angles.cos() * scaling)
        sines.append(angles.sin() * scaling)
    return torch.cat(cosines), torch.cat(sines)


def apply_rope(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, K, D)
    cos: Tensor,  # (P, R/2) fp32
    sin: Tensor,  # (P, R/2) fp32
    position_ids: Tensor,  # (T,) int32 or int64, in [0, P)
    *,
    interleaved: bool = False,
    numerics: Numerics = "fp32",
) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of every head by the angle of its token's position.

    numerics="fp32" computes in fp32 (fp64 for fp64) and rounds once. "hf" keeps the rounding order
    of Hugging Face's eager Llama: table, both products and their sum are each rounded to q's dtype.
    """
    compute = q.dtype if numerics == "hf" else accumulation_dtype(q.dtype)
    cos = cos[position_ids].to(compute)[:, None]
    sin = sin[position_ids].to(compute)[:, None]
    return tuple(_rotate(x, cos, sin, interleaved) for x in (q, k))  # type: ignore[return-value]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary].to(cos.dtype), x[..., rotary:]
    if interleaved:
        x1, x2 = turned[..., 0::2], turned[..., 1::2]
    else:
        x1, x2 = turned.chunk(2, dim=-1)
    y1, y2 = x1 * cos + -x2 * sin, x2 * cos + x1 * sin
    joined = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return torch.cat((joined.to(x.dtype), rest), -1)


# ---------------------------------------------------------------- attention


def attention_mask(
    q_length: int, k_length: int, window_size: int | None = None, device: torch.device | None = None
) -> Tensor:
    """(q_length, k_length) bool, True where a query may look.

    Causal, aligned bottom-right (the last query sees the last key). A window counts the query's own
    position: window_size=1 sees itself alone.
    """
    offset = k_length - q_length
    distance = torch.arange(q_length, device=device)[:, None] + offset
    distance = distance - torch.arange(k_length, device=device)
    mask = distance >= 0
    return mask if window_size is None else mask & (distance < window_size)


def varlen_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T_k, K, D)
    v: Tensor,  # (T_k, K, D)
    sequences: Sequences,
    *,
    k_sequences: Sequences | None = None,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention inside each sequence: (T, H, D). A query that sees no key gives 0."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k_lengths = (k_sequences or sequences).lengths()
    pieces = zip(q.split(sequences.lengths()), k.split(k_lengths), v.split(k_lengths), strict=True)
    out = [_attend(*piece, scale, window_size, softcap) for piece in pieces]
    return torch.cat(out) if out else torch.zeros_like(q)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window_size: int | None, softcap: float | None
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    mask = attention_mask(q.shape[0], k.shape[0], window_size, q.device)
    scores = scores.to(accumulation_dtype(q.dtype)).masked_fill(~mask, -math.inf)
    # A row without keys is all -inf, and its softmax NaN: it has to be 0, backward too.
    blind = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return torch.einsum("hqk,khd->qhd", weights.to(q.dtype), v)


# ------------------------------------------------------------ cross-entropy


def shifted_targets(
    labels: Tensor, token_weights: Tensor | None, sequences: Sequences
) -> tuple[Tensor, Tensor | None]:
    """Targets of unshifted labels: row i learns label i+1 of the same sequence, else nothing.

    Returns:
        labels (T,) and token_weights (T,) or None, aligned with the rows that predict them.
    """
    is_edge = torch.zeros(len(labels) + 1, dtype=torch.bool, device=labels.device)
    is_edge.index_fill_(0, sequences.cu_seqlens.long(), True)
    is_edge[-1] = True  # whatever cu_seqlens says, nothing follows the last row
    labels = labels.roll(-1).masked_fill(is_edge[1:], IGNORE_INDEX)
    return labels, None if token_weights is None else token_weights.roll(-1)


def masked_cross_entropy(
    logits: Tensor,  # (T, V)
    labels: Tensor,  # (T,) int64, -100 where nothing is learnt
    *,
    token_weights: Tensor | None = None,  # (T,) fp32
    sequences: Sequences | None = None,
    options: LossOptions | None = None,
) -> LossOutput:
    """Weighted cross-entropy over supervised rows (label != -100 and weight > 0).

    With ``sequences`` labels and weights are unshifted; without, row i is scored on label i.
    """
    options = options or LossOptions()
    if sequences is not None:
        labels, token_weights = shifted_targets(labels, token_weights, sequences)
    compute = accumulation_dtype(logits.dtype)
    weights = torch.ones_like(labels, dtype=compute)
    weights = weights if token_weights is None else token_weights.to(compute)
    supervised = (labels != IGNORE_INDEX) & (weights > 0)
    weights, target = weights * supervised, labels.where(supervised, 0)

    # Rows that are not supervised may hold anything, NaN included: they are cut off, not
    # multiplied.
    x = logits.to(compute).masked_fill(~supervised[:, None], 0) * options.logit_scale
    if options.softcap:
        x = options.softcap * torch.tanh(x / options.softcap)
    lse = x.logsumexp(-1)
    nll = lse - x.gather(-1, target[:, None]).squeeze(-1)
    eps = options.label_smoothing
    loss = (1 - eps) * nll + eps * (lse - x.mean(-1)) + options.z_loss * lse.square()
    loss = loss.where(supervised, 0)
    with torch.no_grad():
        correct = (x.argmax(-1) == target) & supervised
        entropy = (lse - (x.softmax(-1) * x).sum(-1)).where(supervised, 0)
        lse_out = lse.where(supervised, 0).detach()
    return LossOutput(
        (loss * weights).sum(), weights.sum(), loss.detach(), lse_out, correct, entropy
    )


def linear_cross_entropy(
    hidden: Tensor,  # (T, C)
    linear_weight: Tensor,  # (V, C)
    labels: Tensor,  # (T,) int64
    *,
    token_weights: Tensor | None = None,
    rows: Tensor | None = None,
    linear_bias: Tensor | None = None,
    options: LossOptions | None = None,
) -> LossOutput:
    """``masked_cross_entropy`` of ``hidden @ linear_weight.T + linear_bias``.

    ``rows`` names the supervised rows (-1 pads); the specification scores every row and so ignores
    it.
    """
    logits = F.linear(hidden, linear_weight, linear_bias)
    return masked_cross_entropy(logits, labels, token_weights=token_weights, options=options)


# -------------------------------------------------------------- elementwise


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm: weight * round(x / rms(x)), the mean square in fp32 (fp64 for fp64).

    Zhang and Sennrich 1910.07467; rounding order of HF's LlamaRMSNorm.
    """
    x_wide = x.to(accumulation_dtype(x.dtype))
    scale = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return weight * (x_wide * scale).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + residual, and that sum: (T, C) both."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, (T, I) each (SwiGLU, Shazeer 2002.05202); without ``up`` the two are halves
    of one fused (T, 2 I) projection, gate first."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up
