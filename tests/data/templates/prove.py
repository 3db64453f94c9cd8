"""Holds what the library trains against what the oracle says, pair by pair."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from unicodedata import normalize
from unittest.mock import patch

import numpy as np

from tests.data.templates import oracle
from tests.data.templates.facts import Facts
from tests.data.templates.oracle import Expected, expected
from tests.data.templates.templates import FACTS, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import Sample
from varlen_sft.data.template import ChatTemplate

_REWRITES = "the template rewrites history"
_SAYS = {
    oracle.RAISES: "the chat template (refused|failed)",
    oracle.PROMPT: rf"{_REWRITES}: the prompt|generation prompt ends at|does not prompt with",
    oracle.LOST: "the template leaves out|cannot prompt|the template cuts",
    oracle.ORDER: f"into the answer|the end of an earlier one|no stop|begins at|{_REWRITES}",
    oracle.NO_STOP: rf"no stop token closes|{_REWRITES}: the answer",
    oracle.SPELLED: "spells? the control token",
    oracle.DROPPED: "history=preserve: the template leaves out",
    oracle.TAGS: "generation tags enclose",
    oracle.UNPLACED: rf"does not write every message as it is|{_REWRITES}|does not prompt with it",
}
"""What a refusal has to say for each reason of the oracle."""


@dataclass
class Verdict:
    """What came out of some pairs of template and conversation.

    Attributes:
        proven: pairs whose every trained text is the oracle's.
        refused: pairs that had to be refused and were, by reason.
        turns: answers that were trained.
        faults: what is wrong, one line each.
    """

    proven: int = 0
    turns: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def of(self, template: str) -> Verdict:
        """The same, its faults with the template's name."""
        return replace(self, faults=[f"{template}: {fault}" for fault in self.faults])

    def add(self, other: Verdict) -> None:
        self.proven += other.proven
        self.turns += other.turns
        self.refused += other.refused
        self.faults += other.faults


@cache
def chat_template(name: str) -> ChatTemplate:
    return ChatTemplate(sources()[name], FACTS[name].variables, FACTS[name].stops)


def chat_tokenizer(tokenizer_json: str, name: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json, chat_template(name))


def with_template(chat: ChatTokenizer, name: str) -> ChatTokenizer:
    """The same tokenizer with another template: reading a large one takes seconds."""
    known = {"TextEncoder": lambda _: chat._encoder, "ControlTokens": lambda *_: chat.control}
    with patch.multiple("varlen_sft.data.chat", **known):
        return chat_tokenizer(chat._encoder.tokenizer.to_str(), name)


def trained(chat: ChatTokenizer, sample: Sample) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    assert set(np.unique(sample.token_weights)) <= {0.0, 1.0}
    edges = np.flatnonzero(np.diff(sample.token_weights, prepend=0, append=0))
    return [
        chat.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def prove(
    chat: ChatTokenizer,
    facts: Facts,
    conversations: Mapping[str, Conversation],
    thinking: bool | None = None,
    *,
    options: MaskOptions | None = None,
    composes: bool = False,
    cross_check: bool = True,
    any_reason: bool = False,
) -> Verdict:
    """Hold every conversation against the oracle.

    Args:
        thinking: ``enable_thinking``, None to leave it to the template.
        composes: the tokenizer writes characters in their composed form (NFC).
        cross_check: the second mechanism has to agree, too.
        any_reason: a row that has to be refused may be so in any words.
    """
    options = options or MaskOptions()
    if thinking is not None:
        kwargs = {"enable_thinking": thinking}
        conversations = {k: replace(c, template_kwargs=kwargs) for k, c in conversations.items()}
    rows = list(conversations.values())
    outcomes = chat.encode_rows(rows, options)
    checks = chat.cross_check(rows, options) if cross_check else [None] * len(rows)
    verdict = Verdict()
    for name, row, outcome, check in zip(conversations, rows, outcomes, checks, strict=True):
        want = _wanted(facts, row, thinking, options)
        if composes:
            want = replace(want, spans=tuple(normalize("NFC", text) for text in want.spans))
        if isinstance(outcome, ConversationError):
            _compare_refusal(verdict, name, want, outcome, any_reason)
        else:
            _compare(chat, facts, verdict, name, want, outcome)
        if check is not None and not isinstance(outcome, ConversationError):
            verdict.faults.append(f"{name}: the mechanisms disagree: {check}")
    return verdict


def _wanted(
    facts: Facts, row: Conversation, thinking: bool | None, options: MaskOptions
) -> Expected:
    if options.history != "per_assistant":
        last_only = options.supervision_mode == "last_assistant"
        keeps = options.history == "preserve"
        return expected(facts, row, thinking, last_only=last_only, keeps_history=keeps)
    ends = [i + 1 for i, m in enumerate(row.messages) if m.role == "assistant"]
    prefixes = [replace(row, messages=row.messages[:end]) for end in ends]
    alone = [expected(facts, prefix, thinking, last_only=True) for prefix in prefixes]
    return Expected(
        tuple(span for want in alone for span in want.spans),
        frozenset(reason for want in alone for reason in want.reasons),
    )


def _compare_refusal(
    verdict: Verdict, name: str, want: Expected, error: ConversationError, any_reason: bool
) -> None:
    text = str(error)
    said = [reason for reason in want.reasons if any_reason or re.search(_SAYS[reason], text)]
    if said:
        verdict.refused[min(said)] += 1
    else:
        reasons = sorted(want.reasons) or "nothing"
        verdict.faults.append(f"{name}: refused for {reasons} expected, but: {error}")


def _compare(
    chat: ChatTokenizer,
    facts: Facts,
    verdict: Verdict,
    name: str,
    want: Expected,
    samples: tuple[Sample, ...],
) -> None:
    texts = [text for sample in samples for text in trained(chat, sample)]
    if want.reasons:
        verdict.faults.append(f"{name}: not refused for {sorted(want.reasons)}: {texts}")
    elif texts != list(want.spans):
        verdict.faults.append(f"{name}: trained {texts}, expected {list(want.spans)}")
    else:
        stops = {chat.control.ids[token] for token in (*facts.stops, facts.eos)}
        for sample in samples:
            ends = np.diff(sample.token_weights, append=0) < 0
            if not set(sample.input_ids[ends].tolist()) <= stops:
                verdict.faults.append(f"{name}: a run ends with something else than a stop token")
        verdict.proven += 1
        verdict.turns += len(texts)
