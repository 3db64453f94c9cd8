"""What a model's last layer computes for a loss: the rows that are scored, and keys and values.

Nothing reads another row of the last layer, so leaving them out changes no number. Attention, too,
needs queries of those rows alone; where the host knows which they are, they become sequences of
their own beside longer ones of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from varlen_sft.ops.cross_entropy import linear_cross_entropy
from varlen_sft.ops.cross_entropy_rows import readable
from varlen_sft.types import IGNORE_INDEX, LossOptions, LossOutput, Sequences

__all__ = ["LastRows", "QueryRuns", "last_rows", "pick_rows", "query_runs", "rows_cross_entropy"]

MOST_ROWS = 0.8
"""Above this share of supervised rows the copies that pick them cost what they spare."""
LONGEST_GAP = 32
"""A gap between two runs is queried, too, if it is not longer: less than a block of attention."""
KEYS_PER_QUERY = 3
SCORES_PER_KEY = 128
"""A query that is made for nothing costs as much as copying keys and values of so many rows, and so
do so many of the scores it would need (measured on a CPU, H = 9, K = 3, D = 64, C = 576)."""
FEW_SHAPES = 16
"""Counts of rows are rounded up to a multiple of it at least, where they are many."""
MOST_COPIES = 8
"""Keys that are copied, at most, relative to T: they are memory."""


class QueryRuns(NamedTuple):
    """Runs of neighbouring rows that make queries, each a sequence, and the keys of each.

    A run ends where its keys end: causality is aligned bottom-right.
    """

    rows: Tensor  # (Q,) int64, ascending, then -1: the rows that make queries
    sequences: Sequences  # where the runs begin and end among them
    k_rows: Tensor | None  # (T_k,) int64: rows whose keys are used; None: all T as they lie
    k_sequences: Sequences
    kept: Tensor | None  # (S,) int64, then -1: which queries are supervised; None: all


class LastRows(NamedTuple):
    """Rows that the last layer gives, and the queries that they come from."""

    rows: Tensor  # (S,) int64, ascending, then -1
    runs: QueryRuns | None = None  # None: every row of the pack makes a query

    def to(self, device: torch.device | str) -> LastRows:
        """The same on another device."""

        def move(value):
            return value.to(device) if isinstance(value, Tensor) else value

        runs = self.runs
        if runs is not None:
            runs = QueryRuns(
                move(runs.rows), Sequences(*map(move, runs.sequences)), move(runs.k_rows),
                Sequences(*map(move, runs.k_sequences)), move(runs.kept),
            )  # fmt: skip
        return LastRows(move(self.rows), runs)


def last_rows(
    rows: Tensor, total: int, sequences: Sequences | None = None, *, wait: bool = False
) -> LastRows | None:
    """What the last layer has to compute, or None where that is nearly everything, or nothing.

    Args:
        rows: (S,) int64 supervised rows in ascending order, padded with -1.
        total: T.
        sequences: of the pack; without them every row makes a query.
        wait: look at rows and sequences on a device as well, and wait for it. Without it every row
            makes a query there.

    Raises:
        ValueError: rows that were looked at and are not in ascending order.
    """
    on_host = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    if not on_host and not wait:
        return LastRows(rows) if 0 < rows.shape[0] <= MOST_ROWS * total else None
    seen = rows.cpu()
    seen = seen[seen >= 0]
    if not 0 < seen.shape[0] <= MOST_ROWS * total:
        return None
    if bool((seen.diff() <= 0).any()):
        raise ValueError("rows must be in ascending order, each once")
    # The backward of copied keys adds by index: on a device in no fixed order.
    runs = None if sequences is None else query_runs(seen, sequences, copy_keys=on_host)
    return _few_shapes(LastRows(seen, runs)) if on_host else LastRows(seen, runs).to(rows.device)


def _few_shapes(last: LastRows) -> LastRows:
    """With rows and queries that count nothing, at most an eighth more, so that few counts occur.

    CPU libraries compile a matrix product for each new shape, which takes longer than running it.
    """
    rows, runs = last
    more = _rounded(len(rows)) - len(rows)
    if runs is None:
        return LastRows(_padded(rows, more))
    if more and runs.kept is None:
        runs = runs._replace(kept=torch.arange(len(rows)))
    kept = None if runs.kept is None else _padded(runs.kept, more)
    extra = _rounded(len(runs.rows)) - len(runs.rows)
    if extra:  # a sequence of its own that sees no key
        queries, keys = (
            _one_more(s, n) for s, n in ((runs.sequences, extra), (runs.k_sequences, 0))
        )
        runs = runs._replace(rows=_padded(runs.rows, extra), sequences=queries, k_sequences=keys)
    return LastRows(_padded(rows, more), runs._replace(kept=kept))


def _rounded(count: int) -> int:
    """To a multiple of a power of two that is between an eighth and a sixteenth of it."""
    step = 1 << max(count.bit_length() - 4, 0)
    return count if step < FEW_SHAPES else -(-count // step) * step


def _padded(rows: Tensor, more: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, more), value=-1)


def _one_more(sequences: Sequences, length: int) -> Sequences:
    edges = torch.cat((sequences.cu_seqlens, sequences.cu_seqlens[-1:] + length))
    return Sequences(edges, max(sequences.max_seqlen, length), sequences.num_sequences + 1)


def query_runs(rows: Tensor, sequences: Sequences, *, copy_keys: bool = True) -> QueryRuns | None:
    """Which rows make queries: as few as pay; None if that is nearly all of them.

    A sequence whose first supervised row is r can query all rows from r on, with its keys as they
    lie. Or every run of supervised rows becomes a sequence, with a copy of the keys before it.

    Args:
        rows: (S,) int64 on the CPU, ascending, none -1, at least one.
        sequences: of the pack.
        copy_keys: whether the second may be chosen. Its backward adds by index.
    """
    edges = sequences.cu_seqlens.cpu().long()
    tails = _tails(rows, edges)
    if copy_keys:
        runs = _runs(rows, edges)
        copies = int((runs[2] - runs[0]).sum())
        worth = min(_worth(*tails) - _worth(*runs), MOST_COPIES * int(edges[-1]))
        if copies < worth:
            return _with_copied_keys(rows, *runs)
    _, first, end = tails
    queries = _spans(first, end)
    if len(queries) > MOST_ROWS * int(edges[-1]):
        return None
    lengths = edges.diff()
    own = torch.zeros_like(lengths).index_copy_(0, _sequence_of(first, edges), end - first)
    return QueryRuns(queries, _sequences(own), None, sequences, _kept(rows, queries))


def _sequence_of(rows: Tensor, edges: Tensor) -> Tensor:
    return torch.searchsorted(edges[1:].contiguous(), rows, right=True)


def _tails(rows: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each sequence with a supervised row: its begin, that row, its end."""
    sequence = _sequence_of(rows, edges)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = sequence.diff() != 0
    sequence = sequence[is_first]
    return edges[sequence], rows[is_first], edges[sequence + 1]


def _runs(rows: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each run of supervised rows: the begin of its sequence, its own begin and end."""
    sequence = _sequence_of(rows, edges)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = (sequence.diff() != 0) | (rows.diff() > LONGEST_GAP + 1)
    last = rows[torch.cat([is_first[1:], is_first[:1]])]
    return edges[sequence[is_first]], rows[is_first], last + 1


def _worth(begin: Tensor, first: Tensor, end: Tensor) -> int:
    """What the queries [first, end) cost, in copies of keys; each sees the keys from begin on."""
    queries = end - first
    scores = queries * (first - begin) + queries * (queries + 1) // 2
    return int(queries.sum()) * KEYS_PER_QUERY + int(scores.sum()) // SCORES_PER_KEY


def _with_copied_keys(rows: Tensor, begin: Tensor, first: Tensor, end: Tensor) -> QueryRuns:
    queries = _spans(first, end)
    return QueryRuns(
        queries, _sequences(end - first), _spans(begin, end), _sequences(end - begin),
        _kept(rows, queries),
    )  # fmt: skip


def _spans(first: Tensor, end: Tensor) -> Tensor:
    """All integers of the spans [first, end), one span after another."""
    lengths = end - first
    jumps = (first - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
    return jumps + torch.arange(jumps.shape[0])


def _sequences(lengths: Tensor) -> Sequences:
    edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    count = torch.tensor(lengths.shape[0], dtype=torch.int32)
    return Sequences(edges, int(lengths.max()), count)


def _kept(rows: Tensor, queries: Tensor) -> Tensor | None:
    return None if len(rows) == len(queries) else torch.searchsorted(queries, rows)


# ------------------------------------------------------------ rows of a tensor


def pick_rows(x: Tensor, rows: Tensor, *, repeated: bool = False) -> Tensor:
    """Rows of ``x`` by index, differentiable.

    Args:
        x: (T, ...).
        rows: (n,) int64 in [0, T), each once, or -1: such a row is another of them, and what comes
            back for it is dropped.
        repeated: rows may be there several times, and none is -1. Their gradients are then added,
            on a CPU in fp32 (fp64 for fp64), on a GPU in no fixed order.
    """
    return _PickRows.apply(x, rows, repeated)


class _PickRows(torch.autograd.Function):
    """Backward by copy: adding by index, torch's own backward, is atomic on a GPU and slow on a
    CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, repeated: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total, ctx.repeated = x.shape[0], repeated
        return x.index_select(0, rows if repeated else readable(rows))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,) = ctx.saved_tensors
        if ctx.repeated:
            total = grad.new_zeros(ctx.total, *grad.shape[1:])
            return total.index_add_(0, rows, grad), None, None
        # -1 writes to a row of its own behind the last.
        place = torch.where(rows >= 0, rows, ctx.total)
        out = grad.new_zeros(ctx.total + 1, *grad.shape[1:]).index_copy_(0, place, grad)
        return out[:-1], None, None


def rows_cross_entropy(
    hidden: Tensor,  # (S, C)
    linear_weight: Tensor,  # (V, C)
    labels: Tensor,  # (T,) int64
    *,
    rows: Tensor,  # (S,) int64
    token_weights: Tensor | None = None,  # (T,)
    linear_bias: Tensor | None = None,
    options: LossOptions | None = None,
) -> LossOutput:
    """``linear_cross_entropy`` of hidden states that are those of ``rows`` alone.

    Args:
        rows: where the rows of hidden lie in the pack, -1 for such as count nothing.
        labels, token_weights: of the pack.

    Returns:
        LossOutput with fields of (T,), as if hidden had been complete.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``.
    """
    index, total = rows.clamp(min=0), labels.shape[0]
    order = torch.arange(rows.shape[0], device=rows.device)
    output = linear_cross_entropy(
        hidden, linear_weight, torch.where(rows >= 0, labels[index], IGNORE_INDEX),
        token_weights=None if token_weights is None else token_weights[index],
        rows=torch.where(rows >= 0, order, -1), linear_bias=linear_bias, options=options,
    )  # fmt: skip
    place = torch.where(rows >= 0, rows, total)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros(total + 1).index_copy_(0, place, x)[:-1]

    return LossOutput(*output[:2], *(spread(x) for x in output[2:]))
