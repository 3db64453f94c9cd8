"""The questions that ``varlen-sft doctor --data`` asks of a file, from what was counted."""

from __future__ import annotations

from collections.abc import Iterator

from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES
from varlen_sft.tools.doctor_data import EXAMPLES, Census
from varlen_sft.tools.doctor_finding import Finding
from varlen_sft.words import count, listed

__all__ = ["ask_data"]


def ask_data(census: Census, masks: MaskOptions) -> list[Finding]:
    """Every question once."""
    return [
        _refused(census),
        _trained(census),
        _nothing(census),
        _agree(census),
        _history(census, masks),
        _unstopped(census),
        *_notes(census),
    ]


def _refused(census: Census) -> Finding:
    name = "are rows refused?"
    number = sum(one.count for one in census.refused.values())
    if not number:
        return Finding(name, "pass", f"none of {count(census.rows, 'row')}")
    kinds = f", for {count(len(census.refused), 'reason')}" if len(census.refused) > 1 else ""
    return Finding(name, "fail", f"{number:,} of {count(census.rows, 'row')}{kinds}, see below")


def _trained(census: Census) -> Finding:
    name = "what is trained?"
    if not census.tokens:
        return Finding(name, "note", "nothing, there is no usable row")
    share = census.trained / census.tokens
    roles = [
        f"{role} {trained / tokens:.1%} of {tokens:,}"
        for role, tokens, trained in zip(
            ROLES, census.role_tokens, census.role_trained, strict=True
        )
        if tokens
    ]
    return Finding(
        name, "note", f"{share:.1%} of {count(census.tokens, 'token')}: {', '.join(roles)}"
    )


def _nothing(census: Census) -> Finding:
    name = "are there rows with nothing to train?"
    rows = [row.row for row in census.traits if not row.trained]
    if not rows:
        return Finding(name, "pass", "none")
    return Finding(name, "fail", f"{len(rows):,} of {count(census.rows, 'row')}: {_first(rows)}")


def _agree(census: Census) -> Finding:
    name = "do two ways to find answers agree?"
    if census.disagreements:
        row, reason = census.disagreements[0]
        told = f"not in {len(census.disagreements)} of {census.checked}: row {row}: {reason}"
        return Finding(name, "fail", told)
    if not census.checked:
        return Finding(name, "note", "no conversation was compared")
    return Finding(name, "pass", f"on {count(census.checked, 'conversation')}, drawn at random")


def _history(census: Census, masks: MaskOptions) -> Finding:
    """As of the template, but on the answers that are there."""
    name = "is history written as it was said?"
    rows = [row.row for row in census.traits if row.rewritten]
    if not rows:
        return Finding(name, "pass", "no thinking is left out")
    lost = (
        f"{count(len(rows), 'row')} with earlier answers that lose their thinking: {_first(rows)}"
    )
    if masks.history == "per_assistant" or masks.supervision_mode == "last_assistant":
        return Finding(name, "pass", f"{lost}; it is not trained there")
    return Finding(name, "fail", f"{lost}; use history=preserve or per_assistant")


def _unstopped(census: Census) -> Finding:
    name = "does what is trained end with a stop token?"
    rows = [row.row for row in census.traits if row.unstopped]
    if not rows:
        return Finding(name, "pass", "yes")
    return Finding(name, "note", f"not in {count(len(rows), 'row')} of input_ids: {_first(rows)}")


def _notes(census: Census) -> Iterator[Finding]:
    """What is handled, and good to know."""
    for name, rows, what in (
        (
            "do tokens straddle the start of an answer?",
            [row.row for row in census.traits if row.straddles],
            "the text is cut there, as it is when a model is prompted",
        ),
        (
            "do messages spell control tokens?",
            [row.row for row in census.traits if row.spelled],
            "they are text there",
        ),
        (
            "are there duplicates?",
            [row.row for row in census.traits if row.repeats],
            "each trains what an earlier row trains",
        ),
    ):
        if rows:
            yield Finding(name, "note", f"in {count(len(rows), 'row')}: {_first(rows)}; {what}")
        else:
            yield Finding(name, "pass", "no")


def _first(rows: list[int]) -> str:
    """``rows 3, 8 and 9``, with dots if there are more than a few."""
    if len(rows) == 1:
        return f"row {rows[0]}"
    named = [str(row) for row in rows[:EXAMPLES]]
    return f"rows {listed(named) if len(rows) <= EXAMPLES else ', '.join(named) + ', ...'}"
