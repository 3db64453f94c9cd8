"""A rendered conversation and what of it is whose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from varlen_sft.data.conversation import Conversation

__all__ = ["Answer", "Job", "Layout"]


class Answer(NamedTuple):
    """One assistant turn: text[start:stop_start] is said, text[stop_start:end] is ``stop``."""

    number: int  # of the message, from 1, for errors
    start: int  # where the generation prompt ends
    stop_start: int
    end: int
    stop: str


@dataclass(frozen=True)
class Layout:
    """A rendered conversation.

    ``others`` are (start, end, role id, message number) of the messages that are not answers;
    ``owned`` are (start, end, message number) of every string that came from the data, and not
    from the template; ``rewritten`` are the numbers of answers whose reasoning was left out.
    """

    text: str
    answers: tuple[Answer, ...]
    others: tuple[tuple[int, int, int, int], ...]
    owned: tuple[tuple[int, int, int], ...]
    rewritten: tuple[int, ...] = ()


@dataclass(frozen=True)
class Job:
    """A conversation to tokenise; its last answer alone counts if ``only_last``."""

    conversation: Conversation
    layout: Layout
    only_last: bool
