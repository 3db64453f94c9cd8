"""Mistakes about targets: boundaries that are trained, stop tokens that are not, shifts, pads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from varlen_sft.tools.check_batch import BatchView, Span
from varlen_sft.tools.check_mistake import Mistake, ModelFacts
from varlen_sft.types import IGNORE_INDEX
from varlen_sft.words import count

__all__ = ["label_mistakes"]


def label_mistakes(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """Those of one batch, each kind once, at the first place where it is seen."""
    if view.trained() is None:
        return
    shifted = list(_shifts(view))
    yield from shifted
    if not shifted:  # the places of a wrong shift would be named as if they were meant
        yield from _boundaries(view)
        yield from _stop_tokens(view, facts)
    yield from _pads(view)


# -------------------------------------------------------------------- shifts


def _shifts(view: BatchView) -> Iterator[Mistake]:
    """Unshifted labels repeat the ids, shifted ones the ids one place on."""
    wanted = {"labels": 0, "shift_labels": 1}
    key = "labels" if view.shift_labels is None else "shift_labels"
    labels = view.labels if view.shift_labels is None else view.shift_labels
    assert labels is not None
    at = np.argwhere(labels != IGNORE_INDEX)
    wrong = at[~_holds(view.input_ids, labels, at, wanted[key])]
    if not len(wrong):
        return
    row, column = (int(i) for i in wrong[0])
    other = next((s for s in (0, 1, 2) if _holds(view.input_ids, labels, at, s).all()), None)
    what = f"{key} have {int(labels[row, column])} here, "
    if other is None:
        what += f"the text has {int(view.input_ids[row, column + wanted[key]])}"
        effect = f"{count(len(wrong), 'target')} of {len(at):,} are not the next token of the text"
    else:
        what += f"the token {other} places on, instead of the one {wanted[key]} places on"
        effect = f"every row learns the token {other - wanted[key] + 1} places on, not the next"
    yield Mistake(
        "labels are shifted wrongly",
        what,
        effect,
        "give labels = input_ids with -100 (the model shifts them), or shift_labels that are "
        "shifted once per sample, not both",
        row,
        column,
    )


def _holds(ids: np.ndarray, labels: np.ndarray, at: np.ndarray, shift: int) -> np.ndarray:
    """For each place: is its label the token ``shift`` places on? Places past the end: yes."""
    column = at[:, 1] + shift
    inside = column < ids.shape[1]
    said = labels[at[:, 0], at[:, 1]]
    return ~inside | (said == ids[at[:, 0], np.minimum(column, ids.shape[1] - 1)])


# ---------------------------------------------------------------- boundaries


def _boundaries(view: BatchView) -> Iterator[Mistake]:
    """A sample's first token is nobody's target: the row before it belongs to another sample."""
    found = list(_trained_boundaries(view))
    if not found:
        return
    span, column = found[0]
    trained = view.trained()
    assert trained is not None
    targets = int(trained[:, 1:].sum())
    key = "labels" if view.shift_labels is None else "shift_labels"
    yield Mistake(
        "a boundary label is trained",
        f"{key} have {int(_labels(view)[span.row, column])} here, where {view.place(span)} "
        f"{'begins' if key == 'labels' else 'ends'}",
        f"the last token of a sample learns the first of the next, which it cannot know: "
        f"{count(len(found), 'wrong target')} among {targets:,}",
        "labels[first token of every sample] = -100"
        if key == "labels"
        else "shift_labels[last token of every sample] = -100: shift each sample before packing",
        span.row,
        column,
    )


def _labels(view: BatchView) -> np.ndarray:
    labels = view.labels if view.shift_labels is None else view.shift_labels
    assert labels is not None
    return labels


def _trained_boundaries(view: BatchView) -> Iterator[tuple[Span, int]]:
    """(sample, column of the label): its first token, or with shift_labels its last."""
    for span in view.spans:
        if view.shift_labels is not None:
            if view.shift_labels[span.row, span.end - 1] != IGNORE_INDEX:
                yield span, span.end - 1
        elif span.start > 0 and view.labels is not None:
            # Nothing predicts column 0, and a model's own shift drops its label.
            before = any(s.row == span.row and s.end == span.start for s in view.spans)
            if before and view.labels[span.row, span.start] != IGNORE_INDEX:
                yield span, span.start


# --------------------------------------------------------------- stop tokens


def _stop_tokens(view: BatchView, facts: ModelFacts) -> Iterator[Mistake]:
    """pad = eos, and everything that equals pad was masked: the real stop tokens, too."""
    trained = view.trained()
    assert trained is not None
    told = list(_told(view, trained))  # the samples themselves say what they train
    pads = facts.pads | _pad_by_mask(view)
    stops = pads & facts.stops if facts.stops else pads
    lost, certain = (told, True) if told else _lost(view, stops, trained)
    if not lost:
        return
    values = {int(view.input_ids[place]) for place in told}
    meant = stops or facts.stops or pads
    if told and (len(values) > 1 or (meant and not values & meant)):
        yield _without_label(view, told)
    else:
        yield _masked_by_value(view, lost, certain)


def _without_label(view: BatchView, told: list[tuple[int, int]]) -> Mistake:
    return Mistake(
        "trained tokens have no label",
        f"token {int(view.input_ids[told[0]])} is trained by its sample and has no label "
        f"({count(len(told), 'place')})",
        "the model never learns what the samples say it should",
        "carry each sample's labels into the batch as they are",
        *told[0],
    )


def _masked_by_value(view: BatchView, lost: list[tuple[int, int]], certain: bool) -> Mistake:
    doubt = "" if certain else ", if it is the text's own and no padding"
    return Mistake(
        "pad = eos is masked by value",
        f"token {int(view.input_ids[lost[0]])}, which ends what is trained here, has no label"
        f"{doubt}; it has none in the whole batch, and ends {count(len(lost), 'answer')}",
        "the stop token is never trained: the model does not learn to stop, and goes on until its "
        "limit",
        "mask padding by length (labels[attention_mask == 0] = -100), not by "
        "input_ids == pad_token_id, or give the tokenizer a pad token of its own",
        *lost[0],
        certain,
    )


def _lost(
    view: BatchView, stops: frozenset[int], trained: np.ndarray
) -> tuple[list[tuple[int, int]], bool]:
    """Places where a stop token should have been trained, and whether that is beyond doubt."""
    if not stops or (trained & np.isin(view.input_ids, list(stops))).any():
        return [], True
    attended = view.attended()
    ends = [place for place in _ends(view, trained) if int(view.input_ids[place]) in stops]
    real = [place for place in ends if attended is not None and attended[place]]
    if not real and view.known_by in ("samples", "lengths", "cu_seq_lens_q"):
        real = [place for place in ends if any(_holds_place(s, place) for s in view.spans)]
    return (real, True) if real else (ends, False)


def _holds_place(span: Span, place: tuple[int, int]) -> bool:
    return span.row == place[0] and span.start <= place[1] < span.end


def _told(view: BatchView, trained: np.ndarray) -> Iterator[tuple[int, int]]:
    """Tokens that a given sample trains and the batch does not."""
    for span in view.spans:
        wanted = None if span.sample is None else view.samples[span.sample][1]
        if wanted is not None:
            # A sample's first token has no row that could predict it.
            lost = wanted[1:] & ~trained[span.row, span.start + 1 : span.end]
            for at in np.flatnonzero(lost).tolist():
                yield span.row, span.start + 1 + at


def _ends(view: BatchView, trained: np.ndarray) -> Iterator[tuple[int, int]]:
    """The token after each trained run that does not reach the end of its row."""
    stops = trained[:, :-1] & ~trained[:, 1:]
    for row, column in np.argwhere(stops).tolist():
        yield row, column + 1


def _pad_by_mask(view: BatchView) -> set[int]:
    """What stands where the mask is 0, if it is one token."""
    attended = view.attended()
    if attended is None:
        return set()
    values = set(np.unique(view.input_ids[~attended]).tolist())
    return values if len(values) == 1 else set()


# ---------------------------------------------------------------------- pads


def _pads(view: BatchView) -> Iterator[Mistake]:
    trained, attended = view.trained(), view.attended()
    assert trained is not None
    if attended is None:
        return
    found = np.argwhere(trained & ~attended)
    if len(found):
        row, column = (int(i) for i in found[0])
        yield Mistake(
            "padding is trained",
            f"attention_mask is 0 here and the label is {int(view.input_ids[row, column])} "
            f"({count(len(found), 'place')})",
            "the model learns to write pad tokens, and the loss falls with the share of padding",
            "labels[attention_mask == 0] = -100",
            row,
            column,
        )
