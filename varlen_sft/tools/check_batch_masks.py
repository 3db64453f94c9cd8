"""Mistakes about who attends to whom: a mask or a cache beside a pack, masks that are wrong."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from varlen_sft.tools.check_batch import BatchView
from varlen_sft.tools.check_mistake import Mistake, ModelFacts
from varlen_sft.words import count

__all__ = ["REACHES", "mask_mistakes"]

REACHES = "every sample attends to those before it in its row, so that loss and gradients are wrong"


def mask_mistakes(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Those of one batch, each kind once, at the first place where it is seen."""
    yield from _mask_beside_pack(view, facts)
    yield from _dense_mask(view)
    yield from _holes(view)
    yield from _cache_beside_pack(view, facts)


def _mask_beside_pack(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    attended = view.attended()
    if attended is None or view.mask is None:
        return
    rows = view.packed_rows or _restarting_rows(view)
    if not rows or (facts.patched and attended.all()):  # patch drops a mask that says nothing
        return
    row, column = rows[0], _second_start(view, rows[0])
    if view.mask.max() > 1:
        kind = f"its values 0 to {int(view.mask.max())} number the samples, and are read as true"
    else:
        zeros = int((~attended).sum())
        kind = f"{count(zeros, 'zero')} in it" if zeros else "all ones"
    yield Mistake(
        "a mask beside packed ids",
        f"a 2-D attention_mask ({kind}) comes with a row of samples; the second begins here",
        f"transformers looks for packed samples only where there is no mask: {REACHES}. "
        "FlashAttention does the same as soon as the mask has a zero, also beside cu_seq_lens",
        "leave attention_mask out of packed batches and let position_ids start anew in each sample "
        "(varlen_sft.Collator does)",
        row,
        column,
    )


def _restarting_rows(view: BatchView) -> list[int]:
    """Rows whose positions start anew under tokens that a mask would have attended to."""
    attended = view.attended()
    if view.position_ids is None or attended is None:
        return []
    jumps = (np.diff(view.position_ids, axis=1) != 1) & attended[:, 1:] & attended[:, :-1]
    return np.flatnonzero(jumps.any(axis=1)).tolist()


def _second_start(view: BatchView, row: int) -> int:
    spans = view.of_row(row)
    if len(spans) > 1:
        return spans[1].start
    assert view.position_ids is not None
    return int(np.flatnonzero(np.diff(view.position_ids[row]) != 1)[0]) + 1


def _dense_mask(view: BatchView) -> Iterator[Mistake]:
    """A mask of one's own, (B, 1, L, L): true or 0 where a query (row) sees a key (column)."""
    if view.mask is None or view.mask.ndim != 4:
        return
    sees = view.mask if view.mask.dtype == bool else view.mask > -1
    for at, span in enumerate(view.spans):
        if at == 0 or view.spans[at - 1].row != span.row:
            continue
        plane = sees[min(span.row, len(sees) - 1), :, span.start : span.end, : span.start]
        if plane.any():
            _, query, key = (int(i) for i in np.argwhere(plane)[0])
            yield Mistake(
                "a mask that lets samples see each other",
                f"the 4-D attention_mask lets token {query} of {view.place(span)} see column "
                f"{key}, which is another sample's",
                REACHES,
                "make it block-diagonal and causal, or leave it out: position_ids that start anew "
                "say the same",
                span.row,
                span.start + query,
            )
            return


def _cache_beside_pack(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """use_cache is true in most configs, and Trainer alone turns it off."""
    made = facts.caches if view.use_cache is None else view.use_cache
    if not made or facts.patched or view.mask is not None or not view.packed_rows:
        return
    row = view.packed_rows[0]
    yield Mistake(
        "a cache beside packed ids",
        f"the model is called with use_cache ({'config' if view.use_cache is None else 'batch'}), "
        "and a second sample begins here",
        f"under eager and sdpa attention transformers does not look for packed samples where there "
        f"is a cache: {REACHES}",
        "put use_cache=False into the batch (varlen_sft.Collator does) or into model.config",
        row,
        view.of_row(row)[1].start,
    )


def _holes(view: BatchView) -> Iterator[Mistake]:
    """A mask that is 0 between ones was made by comparing with the pad token."""
    attended = view.attended()
    if attended is None:
        return
    later = np.flip(np.logical_or.accumulate(np.flip(attended, 1), axis=1), 1)
    earlier = np.logical_or.accumulate(attended, axis=1)
    holes = np.argwhere(~attended & later & earlier)
    if not len(holes):
        return
    row, column = (int(i) for i in holes[0])
    yield Mistake(
        "the attention mask has holes",
        f"token {int(view.input_ids[row, column])} is masked between tokens that are not "
        f"({count(len(holes), 'place')})",
        "stop tokens inside a conversation are hidden from all that follows, as they never are "
        "when the model writes",
        "make the mask from lengths, not from input_ids != pad_token_id",
        row,
        column,
    )
