"""Rows that are longer than a pack: refused, dropped, truncated or split, and counted.

A sample of L tokens makes L - 1 rows of a pack. Whatever is cut, no header is left without its
answer, no answer is trained without its stop token, and nothing is trained twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from varlen_sft.data.conversation import Conversation, ConversationError, Row, Text
from varlen_sft.data.cuts import (
    Asked,
    Case,
    Fitted,
    Found,
    Search,
    Told,
    chunks,
    first_tokens,
)
from varlen_sft.data.cuts_turns import all_turns, first_turns

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.data.masks import MaskOptions

__all__ = ["Fitted", "Overlong", "OverlongCounts", "fit_rows"]

Overlong = Literal["error", "drop", "truncate", "split"]


@dataclass
class OverlongCounts:
    """What became of the rows that were over-long.

    ``rows`` are the numbers of the rows that were dropped, truncated and split. ``parts`` are the
    samples of split rows; ``parts_dropped`` were left out because they do not fit,
    ``parts_untrained`` because nothing in them is trained.
    """

    rows: dict[str, list[int]] = field(
        default_factory=lambda: {"dropped": [], "truncated": [], "split": []}
    )
    parts: int = 0
    parts_dropped: int = 0
    parts_untrained: int = 0
    runs_masked: int = 0
    targets_lost: int = 0

    dropped = property(lambda self: len(self.rows["dropped"]))
    truncated = property(lambda self: len(self.rows["truncated"]))
    split = property(lambda self: len(self.rows["split"]))

    def add(self, number: int, fitted: Fitted) -> None:
        """Count what became of row ``number``."""
        if fitted.outcome == "whole":
            return
        self.rows[fitted.outcome].append(number)
        self.parts += len(fitted.samples) * (fitted.outcome == "split")
        self.parts_dropped += len(fitted.left_out) * (fitted.outcome != "dropped")
        self.parts_untrained += fitted.parts_untrained
        self.runs_masked += fitted.runs_masked
        self.targets_lost += fitted.targets_lost


def fit_rows(
    tokenizer: ChatTokenizer,
    rows: Sequence[Row],
    options: MaskOptions,
    max_tokens: int | None = None,
    overlong: Overlong = "error",
) -> list[Fitted | ConversationError]:
    """For each row, in its place, the samples that it gives, or the reason why there are none.

    ``error`` refuses an over-long row and ``drop`` leaves it out. The others depend on what it is:

    - A conversation is cut after an answer, which may be a call of a tool. ``truncate`` keeps the
      first messages, as many as fit and end with a trained answer. ``split`` makes parts of
      consecutive turns, each with the system message before them, which is trained in the first
      part only; of a turn that does not fit alone it keeps what ``truncate`` would. A conversation
      that trains its last answer alone has nothing to truncate to, and is dropped; ``split`` leaves
      out its last turn if that does not fit. With ``history="per_assistant"`` the answers are kept
      that fit with their history, in ``split`` with that of their part.
    - A document is cut anywhere. ``truncate`` keeps the first tokens, without a stop token, since
      it does not end there. The parts of ``split`` begin with the last token of the part before,
      so that every token but the first of the document is a target exactly once.
    - A prompt with its completion is one turn, and left out.
    - Tokens made elsewhere are cut like a document, and keep their weights. A trained run that
      ``truncate`` cuts would be an answer without its stop token, so it loses its weights, unless
      it begins at one of the first two tokens: then it is a document.

    With ``equal_sample_weight`` the weights of all parts of a row sum to 1. The counts of the
    tokenizer are of whole rows, as if none were cut.

    Args:
        max_tokens: the most rows of a sample; None for no limit.

    Raises:
        ValueError: an unknown policy, or a limit below 1.
    """
    if overlong not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {get_args(Overlong)}, got {overlong!r}")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be 1 or more, got {max_tokens}")
    outcomes = tokenizer.encode_rows(rows, options)
    fitted: list[Fitted | ConversationError] = [
        made if isinstance(made, ConversationError) else Fitted(made) for made in outcomes
    ]
    searches: dict[int, Search] = {}
    for i, (row, made) in enumerate(zip(rows, outcomes, strict=True)):
        if max_tokens is None or isinstance(made, ConversationError):
            continue
        case = Case(row, made, options, max_tokens)
        if not case.fits(made):
            searches[i] = _search(case, overlong)
    for i, found in _run(tokenizer, searches, options).items():
        fitted[i] = found
    return fitted


def _search(case: Case, overlong: str) -> Search:
    """Fit an over-long row by one of the policies."""
    row = case.row
    if overlong == "error":
        return ConversationError(case.too_long)
    if overlong == "drop":
        return case.dropped(case.too_long)
    if isinstance(row, Text) and row.prompt:
        return case.dropped(f"{case.too_long}: a prompt and its completion are not cut")
    if not isinstance(row, Conversation):
        return first_tokens(case) if overlong == "truncate" else chunks(case)
    return (yield from first_turns(case) if overlong == "truncate" else all_turns(case))


def _run(
    tokenizer: ChatTokenizer, searches: dict[int, Search], options: MaskOptions
) -> dict[int, Found]:
    """Answer all searches, one question of each at a time, on all of the tokenizer's threads."""
    options = replace(options, equal_sample_weight=False)
    counts = tokenizer.counts.copy()
    found: dict[int, Found] = {}
    told: dict[int, Told | None] = dict.fromkeys(searches)
    while told:
        asked: dict[int, Asked] = {}
        for i, answers in told.items():
            try:
                asked[i] = searches[i].send(answers)  # type: ignore[arg-type]
            except StopIteration as end:
                found[i] = end.value
        parts = iter(tokenizer.encode_rows([p for all in asked.values() for p in all], options))
        told = {i: [next(parts) for _ in wanted] for i, wanted in asked.items()}
    tokenizer.counts.clear()  # in place: it is shared with what counts
    tokenizer.counts.update(counts)
    return found
