"""Mistakes about where a sample begins: positions, pad tails and FlashAttention's edges."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from varlen_sft.tools.check_batch import FLASH_KEYS, BatchView, Span, array
from varlen_sft.tools.check_batch_masks import REACHES
from varlen_sft.tools.check_mistake import Mistake, ModelFacts
from varlen_sft.words import count, listed

__all__ = ["edge_mistakes"]


def edge_mistakes(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Those of one batch, each kind once, at the first place where it is seen."""
    yield from _positions(view)
    yield from _unmarked_edges(view, facts)
    yield from _zero_positions(view, facts)
    yield from _flash(view)


# ----------------------------------------------------------------- positions


def _positions(view: BatchView) -> Iterator[Mistake]:
    if view.known_by in ("rows", "position_ids") or view.mask is not None and view.mask.ndim == 4:
        return
    if view.position_ids is None:
        if rows := view.packed_rows:
            span = view.of_row(rows[0])[1]
            what = f"{view.place(span)} begins here, and there are no position_ids"
            yield _not_reset(view, what, span.row, span.start)
        return
    first = {span.row: int(view.position_ids[span.row, span.start]) for span in view.spans[::-1]}
    padding = _zero_runs(view)  # a mistake of its own
    for span in view.spans:
        got = view.position_ids[span.row, span.start : span.end]
        # A row may count from another number than 0, if all of its samples do.
        wanted = np.arange(len(got)) + first[span.row]
        wrong = np.flatnonzero((got != wanted) & ~padding[span.row, span.start : span.end])
        if len(wrong):
            at = int(wrong[0])
            what = f"token {at} of {view.place(span)} has position {got[at]}, not {wanted[at]}"
            yield _not_reset(view, what, span.row, span.start + at)
            return


def _not_reset(view: BatchView, what: str, row: int, column: int) -> Mistake:
    return Mistake(
        "positions are not reset", what, _running_on(view),
        "count from 0 in every sample: position_ids = torch.cat([torch.arange(n) for n in "
        "lengths])",
        row, column,
    )  # fmt: skip


def _running_on(view: BatchView) -> str:
    if all(key in view.flash for key in FLASH_KEYS):
        return (
            "cu_seq_lens keep the samples apart under FlashAttention alone; eager and sdpa read "
            "position_ids, and there every sample attends to those before it. Positions run past "
            "what a sample alone has, and perhaps past what the model was trained for"
        )
    return f"positions are what says where a sample begins: {REACHES}"


def _unmarked_edges(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Nothing says where samples begin, yet a token that begins or ends one stands inside a row."""
    if view.mask is not None or view.known_by not in ("rows", "position_ids") or view.packed_rows:
        return
    marks, begins = sorted(facts.stops), False
    if facts.bos is not None and facts.bos not in facts.stops:
        marks, begins = [facts.bos], True
    for span in view.spans:
        ids = view.input_ids[span.row, span.start : span.end]
        content = len(ids) - int((ids[::-1] == ids[-1]).argmin())  # a tail of pads says nothing
        inside = ids[1:content] if begins else ids[: content - 1]
        found = np.flatnonzero(np.isin(inside, marks))
        if len(found):
            at = int(found[0]) + 1
            token = int(ids[at if begins else at - 1])
            kind = "begin" if begins else "end"
            yield Mistake(
                "positions are not reset",
                f"token {token}, which can {kind} a sample, stands inside the row "
                f"{count(len(found), 'time')}, and nothing says that a sample begins",
                f"if these are several samples, {REACHES}",
                "give position_ids that start anew in each sample; if this is one conversation of "
                "several turns, all is well (give samples= or lengths to be sure)",
                span.row, span.start + at, certain=False,
            )  # fmt: skip
            return


def _zero_positions(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Runs of two zeros or more: every one of them is a sequence of one token."""
    if view.position_ids is None or view.attended() is not None:
        return
    zeros = _zero_runs(view)
    if not zeros.any():
        return
    row, column = (int(i) for i in np.argwhere(zeros)[0])
    tokens = int(zeros.sum())
    yield Mistake(
        "zero-padded position ids",
        f"from here on {tokens:,} tokens have position 0",
        f"each of them becomes a sequence of its own: {tokens:,} sequences more for the "
        f"attention to run{_scratch(tokens, facts)}",
        "let the tail count up in sequences no longer than the longest sample, as "
        "varlen_sft.Collator(pad_multiple=...) does, or do not pad",
        row,
        column,
    )


def _zero_runs(view: BatchView) -> np.ndarray:
    """(B, L) bool: position 0 beside another position 0, outside of samples that are known."""
    assert view.position_ids is not None
    zero = view.position_ids == 0
    for span in view.spans:
        if view.known_by == "samples":  # a sample of one token is right to have position 0
            zero[span.row, span.start : span.end] = False
    pairs = zero[:, 1:] & zero[:, :-1]
    runs = np.zeros_like(zero)
    runs[:, 1:] |= pairs
    runs[:, :-1] |= pairs
    return runs


def _scratch(tokens: int, facts: ModelFacts) -> str:
    """FlashAttention 2 keeps fp32 for 128 rows more of every sequence in its backward pass."""
    if facts.query_size is None:
        return ""
    megabytes = tokens * 128 * facts.query_size * 4 / 2**20
    return f"; FlashAttention 2's backward takes {megabytes:,.1f} MiB more for them"


# --------------------------------------------------------------------- flash


def _flash(view: BatchView) -> Iterator[Mistake]:
    """The four keywords by which FlashAttention takes edges, against each other and the batch."""
    if not view.flash:
        return
    name = "edges that FlashAttention cannot use"
    fault = _flash_fault(view)
    if fault is not None:
        what, effect = fault
        yield Mistake(
            name, what, effect,
            "give cu_seq_lens_q and cu_seq_lens_k as int32 (0, then the end of every sample) and "
            "max_length_q and max_length_k as Python ints (varlen_sft.Collator does)",
        )  # fmt: skip


Fault = tuple[str, str]
"""What is wrong, and what it does."""


def _flash_fault(view: BatchView) -> Fault | None:
    missing = [key for key in FLASH_KEYS if key not in view.flash]
    if missing:
        return (
            f"{listed(missing)} {'is' if len(missing) == 1 else 'are'} missing beside "
            f"{listed(view.flash)}",
            "transformers takes all four or ignores them, and guesses edges from position_ids",
        )
    for side in "qk":
        fault = _fault_of_edges(view, side)
        if fault is not None:
            return fault
    if hasattr(view.flash["max_length_q"], "dtype"):
        return (
            "max_length_q is a tensor",
            "attention waits for the device in every layer, and FlashAttention 4 compiles anew",
        )
    wrong = _wrong_edge(view, array(view.flash["cu_seq_lens_q"]).reshape(-1))
    if wrong is not None:
        where = f"column {wrong.start}, where {view.place(wrong)} begins"
        return f"cu_seq_lens_q has no edge at {where}", REACHES
    return None


def _fault_of_edges(view: BatchView, side: str) -> Fault | None:
    """Of ``cu_seq_lens`` and ``max_length`` of q or k."""
    key, total = f"cu_seq_lens_{side}", view.input_ids.size
    edges = array(view.flash[key]).reshape(-1)
    if edges[0] != 0 or edges[-1] != total or (np.diff(edges) < 0).any():
        return (
            f"{key} must rise from 0 to {total}, got {edges.tolist()}",
            "tokens outside of it are never written: their output is whatever was in memory",
        )
    if hasattr(view.flash[key], "dtype") and edges.dtype != np.int32:  # a list has none
        return f"{key} is {edges.dtype}, not int32", "the kernel refuses it, or reads it wrongly"
    longest, said = int(np.diff(edges).max()), int(array(view.flash[f"max_length_{side}"]))
    if said < longest:
        return (
            f"max_length_{side} is {said}, the longest sample has {longest} tokens",
            "rows past it are never computed",
        )
    return None


def _wrong_edge(view: BatchView, edges: np.ndarray) -> Span | None:
    length = view.input_ids.shape[1]
    known = {int(edge) for edge in edges}
    return next((s for s in view.spans if s.row * length + s.start not in known), None)
