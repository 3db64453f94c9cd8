"""How to keep the backward of flash-attn 2 below what its 32-bit offsets reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

SCRATCH_LIMIT = 2**31
"""Elements of the backward's fp32 scratch that flash-attn 2 can address: its offsets are 32-bit up
to release 2.8.3.post1, and in torch's copy of it. Above this it writes outside its memory."""
SCRATCH_ROWS_PER_SEQUENCE = 128


class Part(NamedTuple):
    """Neighbouring sequences that one call takes, and the tokens they are."""

    first: int
    last: int  # one past
    start: int
    end: int
    k_start: int
    k_end: int


def scratch_rows(heads: int, head_dim: int) -> int:
    """The most tokens + 128 * sequences that one backward of flash-attn 2 can take."""
    step = 32 if head_dim <= 128 else 64
    row = heads * (-(-head_dim // step) * step)
    return (SCRATCH_LIMIT - 1) // row


def split_plan(cu_seqlens: Sequence[int], k_cu_seqlens: Sequence[int], rows: int) -> list[Part]:
    """The fewest calls over neighbouring sequences with tokens + 128 * sequences <= rows in each.

    Args:
        cu_seqlens, k_cu_seqlens: edges of q's and k's sequences, on the host, as many each.
        rows: what ``scratch_rows`` says.

    Returns:
        Parts in order, which cover every query. Sequences without queries are in none of them,
        unless they lie between others of a part, where they count.

    Raises:
        ValueError: one sequence alone needs more.
    """
    parts: list[Part] = []
    for i, (start, end) in enumerate(zip(cu_seqlens, cu_seqlens[1:], strict=False)):
        if start == end:
            continue
        if end - start + SCRATCH_ROWS_PER_SEQUENCE > rows:
            raise ValueError(
                f"sequence {i} must be at most {rows - SCRATCH_ROWS_PER_SEQUENCE} tokens long "
                f"for the backward of flash-attn 2 with these heads, got {end - start}"
            )
        part = Part(i, i + 1, start, end, k_cu_seqlens[i], k_cu_seqlens[i + 1])
        if parts:
            longer = parts[-1]._replace(last=i + 1, end=end, k_end=k_cu_seqlens[i + 1])
            count = longer.last - longer.first
            if longer.end - longer.start + SCRATCH_ROWS_PER_SEQUENCE * count <= rows:
                parts[-1] = longer
                continue
        parts.append(part)
    return parts


def cut(x: Tensor, spans: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Views of the spans by one split, whose backward joins the gradients in one copy."""
    sizes, at = [], 0
    for start, end in spans:
        sizes += [start - at, end - start]
        at = end
    return x.split([*sizes, x.shape[0] - at])[1::2]
