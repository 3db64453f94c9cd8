"""What ``varlen-sft doctor`` says: a question, a verdict, and the evidence in one sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "quoted", "shape"]

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


def shape(reason: str) -> str:
    """A reason without what it quotes and counts: rows that are refused alike share it."""
    return re.sub(r"'(?:[^'\\]|\\.)*'|\"[^\"]*\"|\d+|, the last answer", "_", reason)
