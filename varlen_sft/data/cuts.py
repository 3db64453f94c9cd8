"""How a row that is longer than a pack is cut.

Every way is a search: it asks for the samples of parts, as often as it needs to, and returns what
became of the row. So the parts of many rows are tokenised together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from varlen_sft.data.conversation import Conversation, ConversationError, Row, Text
from varlen_sft.data.sample import Sample
from varlen_sft.data.turns import Parts, Turns

if TYPE_CHECKING:
    from varlen_sft.data.masks import MaskOptions

Outcome = Literal["whole", "dropped", "truncated", "split"]
Samples: TypeAlias = tuple[Sample, ...]


@dataclass(frozen=True)
class Fitted:
    """What became of a row.

    Args:
        samples: of at most max_tokens + 1 tokens each.
        outcome: "whole" if it was not over-long.
        left_out: why the row, or a part of it, is in no sample; one reason for each.
        parts_untrained: parts left out because nothing in them is trained.
        runs_masked: trained runs of tokens made elsewhere whose end was cut off.
        targets_lost: how many tokens fewer are trained than in the whole row.
    """

    samples: Samples
    outcome: Outcome = "whole"
    left_out: tuple[str, ...] = ()
    parts_untrained: int = 0
    runs_masked: int = 0
    targets_lost: int = 0


Asked: TypeAlias = list[Conversation]
Told: TypeAlias = list[Samples | ConversationError]
Found: TypeAlias = Fitted | ConversationError
Search: TypeAlias = Generator[Asked, Told, Found]


@dataclass(frozen=True)
class Case:
    """An over-long row: its samples, and what can be made of them."""

    row: Row
    whole: Samples
    options: MaskOptions
    max_tokens: int

    def fits(self, samples: Samples) -> bool:
        return all(len(sample) - 1 <= self.max_tokens for sample in samples)

    @property
    def too_long(self) -> str:
        longest = max(map(len, self.whole))
        return f"{longest - 1} rows do not fit a pack of {self.max_tokens} tokens"

    @property
    def per_assistant(self) -> bool:
        return isinstance(self.row, Conversation) and self.options.history == "per_assistant"

    @property
    def proven(self) -> bool:
        """Whether all its answers are in one sample, each with its stop token."""
        return not self.per_assistant and self.options.supervision_mode != "last_assistant"

    def dropped(self, reason: str, untrained: int = 0) -> Fitted:
        lost = _targets(self.whole)
        return Fitted((), "dropped", (reason,), parts_untrained=untrained, targets_lost=lost)

    def cut(
        self,
        outcome: Outcome,
        samples: Samples,
        left_out: Sequence[str] = (),
        untrained: int = 0,
        runs_masked: int = 0,
    ) -> Fitted:
        """What is left of the row; only what trains something is kept."""
        kept = tuple(sample for sample in samples if sample.token_weights[1:].any())
        untrained += len(samples) - len(kept)
        if not kept:
            reason = "; ".join(left_out) or "nothing of it that fits is trained"
            return self.dropped(f"{self.too_long}: {reason}", untrained)
        lost = max(0, _targets(self.whole) - _targets(kept))
        kept = self._balanced(kept)
        return Fitted(kept, outcome, tuple(left_out), untrained, runs_masked, lost)

    def _balanced(self, samples: Samples) -> Samples:
        """Weights that sum to 1, of all parts together, or of each row of an answer."""
        if not self.options.equal_sample_weight:
            return samples
        sums = [sample.token_weights[1:].sum(dtype=np.float64) for sample in samples]
        totals = sums if self.per_assistant else [sum(sums)] * len(sums)
        return tuple(
            replace(sample, token_weights=(sample.token_weights / total).astype(np.float32))
            for sample, total in zip(samples, totals, strict=True)
        )


def _targets(samples: Samples) -> int:
    return sum(int((sample.token_weights[1:] > 0).sum()) for sample in samples)


def search(case: Case, overlong: str) -> Search:
    """Fit an over-long row by one of the policies of ``overlong.fit_rows``."""
    row = case.row
    if overlong == "error":
        return ConversationError(case.too_long)
    if overlong == "drop":
        return case.dropped(case.too_long)
    if isinstance(row, Text) and row.prompt:
        return case.dropped(f"{case.too_long}: a prompt and its completion are not cut")
    if not isinstance(row, Conversation):
        return _first_tokens(case) if overlong == "truncate" else _chunks(case)
    return (yield from _first_turns(case) if overlong == "truncate" else _all_turns(case))


def _first_tokens(case: Case) -> Fitted:
    (whole,) = case.whole
    cut = _cut(whole, 0, case.max_tokens)
    weights = cut.token_weights
    trained = np.append(weights > 0, whole.token_weights[len(cut)] > 0)
    if not trained[-2:].all():
        return case.cut("truncated", (cut,))
    start = int((~trained).nonzero()[0][-1]) + 1 if not trained.all() else 0
    if start < 2:
        return case.cut("truncated", (cut,))
    weights[start:] = 0
    return case.cut("truncated", (cut,), runs_masked=1)


def _chunks(case: Case) -> Fitted:
    (whole,) = case.whole
    starts = range(0, len(whole) - 1, case.max_tokens)
    return case.cut("split", tuple(_cut(whole, start, case.max_tokens) for start in starts))


def _cut(whole: Sample, start: int, rows: int) -> Sample:
    """``rows`` rows from token ``start`` on, which is no target here."""
    place = slice(start, start + rows + 1)
    weights = whole.token_weights[place].copy()
    weights[: start > 0] = 0
    return Sample(whole.input_ids[place], weights, whole.roles[place])


def _first_turns(case: Case) -> Search:
    """The most turns from the first on that fit and end with a trained answer."""
    assert isinstance(case.row, Conversation)
    if case.per_assistant:
        return _first_answers(case)
    if case.options.supervision_mode == "last_assistant":
        return case.dropped(f"{case.too_long}: only its last answer is trained")
    turns = Turns.of(case.row)
    (whole,) = case.whole
    ends = turns.ends(whole) or [0] * len(turns)
    for count in range(len(turns) - 1, 0, -1):
        # A prefix is never shorter than what it has in the whole.
        if ends[count - 1] - 1 > case.max_tokens or not turns.last_answer(count - 1).weight:
            continue
        (samples,) = yield [turns.part(0, count)]
        if isinstance(samples, ConversationError):
            return _named(turns, 0, count, samples)
        if case.fits(samples):
            return case.cut("truncated", Parts(turns, whole).own(samples, 0, count))
    return case.dropped(
        f"{case.too_long}: no turns from the first on fit and end with an answer that is trained"
    )


def _first_answers(case: Case) -> Fitted:
    """Of rows that are an answer each, with its history, those that fit."""
    fit = tuple(sample for sample in case.whole if case.fits((sample,)))
    out = f"{len(case.whole) - len(fit)} of {len(case.whole)} answers do not fit with their history"
    return case.cut("truncated", fit, (out,))


def _all_turns(case: Case) -> Search:
    """Parts by the first guess; those that turn out too long are halved, down to single turns."""
    assert isinstance(case.row, Conversation)
    turns = Turns.of(case.row)
    longest = max(case.whole, key=len)
    made: dict[tuple[int, int], Samples] = {}
    left_out: dict[tuple[int, int], str] = {}
    wanted = turns.plan(longest, case.max_tokens + 1)
    while wanted:
        told = yield [_part(case, turns, *span) for span in wanted]
        halves: list[tuple[int, int]] = []
        for (first, last), samples in zip(wanted, told, strict=True):
            if isinstance(samples, ConversationError):
                return _named(turns, first, last, samples)
            if case.fits(samples):
                made[first, last] = samples
            elif last - first > 1:
                middle = (first + last) // 2
                halves += [(first, middle), (middle, last)]
            else:
                left_out[first, last] = _no_room(case, turns, first, samples)
        wanted = halves
    parts = Parts(turns, case.whole[0] if case.proven else None, each_closes=case.per_assistant)
    own = [parts.own(samples, *span) for span, samples in sorted(made.items(), key=_span)]
    reasons = [reason for _, reason in sorted(left_out.items())]
    untrained = sum(not samples for samples in own)
    return case.cut("split", tuple(s for samples in own for s in samples), reasons, untrained)


def _span(item: tuple[tuple[int, int], Samples]) -> tuple[int, int]:
    return item[0]


def _part(case: Case, turns: Turns, first: int, last: int) -> Conversation:
    """Of a conversation that trains its last answer alone, other parts train none."""
    trained = last == len(turns) or case.options.supervision_mode != "last_assistant"
    return turns.part(first, last, answers=trained)


def _no_room(case: Case, turns: Turns, turn: int, samples: Samples) -> str:
    rows = max(map(len, samples)) - 1
    return (
        f"{turns.name(turn, turn + 1)} are left out: one turn of {rows} rows does not fit a pack "
        f"of {case.max_tokens} tokens"
    )


def _named(turns: Turns, first: int, last: int, error: ConversationError) -> ConversationError:
    return ConversationError(
        f"the row is over-long, and {turns.name(first, last)} cannot be a part: {error} "
        "(messages counted within the part)"
    )
