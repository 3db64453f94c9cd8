"""The strangest rows of a data file: a plain score, and the reasons in words.

Each row gets points:

- length and trained share: how many doublings (powers of two) its number of tokens lies from the
  file's median, on either side, and its trained share below the median; a row that trains nothing
  gets 5;
- 1 for each token that straddles the start of an answer, for each odd character (control
  characters, U+FFFD, private use, zero width, marks that turn the direction of writing), each
  empty answer, and each answer whose thinking is left out, 3 at most for each kind;
- 2 if a trained answer does not end with a stop token, 2 if it repeats an earlier row, 1 if a
  message spells a control token.

A row below 1 point is not strange.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from varlen_sft.data.conversation import Conversation, Row, Text
from varlen_sft.words import count

__all__ = ["Strange", "Traits", "odd_characters", "strangest"]

NOTHING_TRAINED = 5.0
MOST = 3  # points for one kind of trait that can be counted
LEAST = 1.0

_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069"
    "\ufeff\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]"
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What is remembered of a usable row."""

    row: int
    tokens: int
    trained: int
    straddles: int = 0
    odd: int = 0
    empty: int = 0  # answers
    rewritten: int = 0  # answers without their thinking
    spelled: bool = False
    unstopped: bool = False
    repeats: int = 0  # the earlier row, 0 for none


@dataclass(frozen=True)
class Strange:
    """A row, its score, and why."""

    row: int
    score: float
    reasons: tuple[str, ...]


def strangest(traits: Sequence[Traits], most: int = 10) -> list[Strange]:
    """The rows of the highest scores, the highest first, earlier ones first among equals."""
    if not traits:
        return []
    length = float(np.median([row.tokens for row in traits]))
    share = float(np.median([row.trained / max(row.tokens, 1) for row in traits]))
    scored = (_scored(row, length, share) for row in traits)
    strange = [one for one in scored if one.score >= LEAST]
    return sorted(strange, key=lambda one: (-one.score, one.row))[:most]


def _scored(row: Traits, length: float, share: float) -> Strange:
    points = list(_points(row, length, share))
    points.sort(key=lambda point: -point[0])
    score = round(sum(value for value, _ in points), 2)
    # What adds little to a score explains nothing.
    return Strange(row.row, score, tuple(reason for value, reason in points if value >= 0.5))


def _points(row: Traits, length: float, share: float) -> Iterator[tuple[float, str]]:
    doublings = abs(math.log2(max(row.tokens, 1) / max(length, 1)))
    how = "long" if row.tokens > length else "short"
    yield doublings, f"{how}: {count(row.tokens, 'token')}, the median is {length:,.0f}"
    mine = row.trained / max(row.tokens, 1)
    if not row.trained:
        yield NOTHING_TRAINED, "nothing is trained"
    elif mine < share:
        yield math.log2(share / mine), f"{mine:.1%} of it is trained, the median is {share:.1%}"
    for number, what in (
        (row.straddles, "straddling token"),
        (row.odd, "odd character"),
        (row.empty, "empty answer"),
        (row.rewritten, "answer without its thinking"),
    ):
        if number:
            yield float(min(number, MOST)), _counted(number, what)
    if row.unstopped:
        yield 2.0, "a trained answer does not end with a stop token"
    if row.repeats:
        yield 2.0, f"the same as row {row.repeats}"
    if row.spelled:
        yield 1.0, "a message spells a control token"


def _counted(number: int, what: str) -> str:
    head, _, tail = what.partition(" without")
    return count(number, head) + (f" without{tail}" if tail else "")


def odd_characters(row: Row) -> int:
    """How many characters of a row's texts hardly belong into a text."""
    return sum(len(_ODD.findall(text)) for text in _texts(row))


def _texts(row: Row) -> Iterator[str]:
    if isinstance(row, Text):
        yield from (row.prompt, row.completion)
    elif isinstance(row, Conversation):
        for message in row.messages:
            yield message.content
            yield message.reasoning_content or ""
