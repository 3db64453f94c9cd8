"""How a conversation that is longer than a pack is cut: after an answer, and between turns."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.cuts import Asked, Case, Fitted, Samples, Search, Told
from varlen_sft.data.sample import Sample
from varlen_sft.data.turns import Parts, Turns

__all__ = ["all_turns", "first_turns"]

NONE: Samples = ()


def first_turns(case: Case) -> Search:
    """The most messages from the first on that fit and end with a trained answer."""
    assert isinstance(case.row, Conversation)
    if case.per_assistant:
        return _first_answers(case)
    if case.options.supervision_mode == "last_assistant":
        return case.dropped(f"{case.too_long}: only its last answer is trained")
    turns = Turns.of(case.row).by_answer()
    (whole,) = case.whole
    found = yield from _longest(case, turns, (0, len(turns)), whole)
    if isinstance(found, ConversationError):
        return found
    if found is None:
        return case.dropped(
            f"{case.too_long}: no messages from the first on fit and end with an answer that is "
            "trained"
        )
    last, samples = found
    return case.cut("truncated", Parts(turns, whole).own(samples, 0, last))


def _longest(
    case: Case, turns: Turns, span: tuple[int, int], too_long: Sample
) -> Generator[Asked, Told, tuple[int, Samples] | ConversationError | None]:
    """Where to end a part that begins where a span does, and its samples; None if none fits.

    Args:
        turns: by answer.
        too_long: the sample of the span.
    """
    first, last = span
    ends = Turns.of(turns.part(*span)).by_answer().ends(too_long) or [0] * (last - first)
    for end in range(last - 1, first, -1):
        # A part is never shorter than what it has in a longer one.
        if ends[end - first - 1] - 1 > case.max_tokens or not turns.last_answer(end - 1).weight:
            continue
        (samples,) = yield [turns.part(first, end)]
        if isinstance(samples, ConversationError):
            if turns.ends_at_user(end - 1):
                return _named(turns, first, end, samples)
            continue  # a template may have no way to end a conversation with a call
        if case.fits(samples):
            return end, samples
    return None


def _first_answers(case: Case) -> Fitted:
    """Of rows that are an answer each, with its history, those that fit."""
    fit = tuple(sample for sample in case.whole if case.fits((sample,)))
    out = f"{len(case.whole) - len(fit)} of {len(case.whole)} answers do not fit with their history"
    return case.cut("truncated", fit, (out,))


def all_turns(case: Case) -> Search:
    """Parts of turns that fit; of a single turn that does not, the first answers that do."""
    assert isinstance(case.row, Conversation)
    turns = Turns.of(case.row)
    found = yield from _fitting(case, turns)
    if isinstance(found, ConversationError):
        return found
    answers, kept, left_out = turns.by_answer(), found.fit, []
    for (first, last), samples in sorted(found.long.items(), key=_span):
        begun = yield from _begun(case, answers, (first, last), samples)
        if isinstance(begun, ConversationError):
            return begun
        kept[first, begun.end] = begun.samples
        left_out.append(begun.left_out)
    parts = Parts(answers, case.whole[0] if case.proven else None, each_closes=case.per_assistant)
    own = [
        parts.own(samples, *span) for span, samples in sorted(kept.items(), key=_span) if samples
    ]
    untrained = sum(not samples for samples in own)
    return case.cut("split", tuple(s for samples in own for s in samples), left_out, untrained)


class _Fitting(NamedTuple):
    """The samples of parts that fit, and of single turns that do not, by their turns by answer."""

    fit: dict[tuple[int, int], Samples]
    long: dict[tuple[int, int], Samples]


def _fitting(case: Case, turns: Turns) -> Generator[Asked, Told, _Fitting | ConversationError]:
    """By a first guess; parts that turn out too long are halved, down to single turns."""
    found, answers = _Fitting({}, {}), turns.by_answer()
    wanted = turns.plan(max(case.whole, key=len), case.max_tokens + 1)
    while wanted:
        told = yield [_part(case, turns, *span) for span in wanted]
        halves: list[tuple[int, int]] = []
        for (first, last), samples in zip(wanted, told, strict=True):
            if isinstance(samples, ConversationError):
                return _named(turns, first, last, samples)
            if not case.fits(samples) and last - first > 1:
                middle = (first + last) // 2
                halves += [(first, middle), (middle, last)]
                continue
            place = found.fit if case.fits(samples) else found.long
            place[answers.at(turns.edges[first]), answers.at(turns.edges[last])] = samples
        wanted = halves
    return found


class _Begun(NamedTuple):
    """What is kept of a turn that does not fit."""

    end: int  # where it ends, in turns by answer
    samples: Samples
    left_out: str


def _begun(
    case: Case, answers: Turns, span: tuple[int, int], samples: Samples
) -> Generator[Asked, Told, _Begun | ConversationError]:
    """Its first answers that fit, none of a conversation that trains its last answer alone."""
    first, last = span
    if case.per_assistant:
        fit = tuple(sample for sample in samples if case.fits((sample,)))
        few = f"{len(samples) - len(fit)} of {len(samples)} answers of {answers.name(*span)} do not"
        return _Begun(last, fit, f"{few} fit with their history")
    end, kept = first, NONE
    if case.options.supervision_mode != "last_assistant":
        found = yield from _longest(case, answers, span, samples[0])
        if isinstance(found, ConversationError):
            return found
        end, kept = found or (first, NONE)
    rows = max(map(len, samples)) - 1
    return _Begun(
        end,
        kept,
        f"{answers.name(end, last)} are left out: one turn of {rows} rows does not fit a pack of "
        f"{case.max_tokens} tokens",
    )


def _span(item: tuple[tuple[int, int], Samples]) -> tuple[int, int]:
    return item[0]


def _part(case: Case, turns: Turns, first: int, last: int) -> Conversation:
    """Of a conversation that trains its last answer alone, other parts train none."""
    trained = last == len(turns) or case.options.supervision_mode != "last_assistant"
    return turns.part(first, last, answers=trained)


def _named(turns: Turns, first: int, last: int, error: ConversationError) -> ConversationError:
    return ConversationError(
        f"the row is over-long, and {turns.name(first, last)} cannot be a part: {error} "
        "(messages counted within the part)"
    )
