"""What ``varlen-sft doctor`` says: a question, a verdict, and the evidence in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "count", "listed", "quoted", "shape"]

Verdict = Literal["pass", "fail", "note"]
SHOWN = 60  # characters of a text that is quoted


@dataclass(frozen=True)
class Finding:
    """One row of the screen."""

    question: str
    verdict: Verdict
    evidence: str


def quoted(text: str) -> str:
    """A text in quotes with its white space visible; the end of a long one, where answers begin."""
    return repr(text if len(text) <= SHOWN else "..." + text[-SHOWN:])


def count(number: int, what: str) -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def shape(reason: str) -> str:
    """A reason without what it quotes and counts: rows that are refused alike share it."""
    return re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\d+|, the last answer", "_", reason)
