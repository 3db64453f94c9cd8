"""Holds what the library trains against what the oracle says, pair by pair."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from unicodedata import normalize

import numpy as np

from tests.data.templates import oracle
from tests.data.templates.oracle import Expected, expected
from tests.data.templates.templates import FACTS, Facts, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.layout import Planner
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import Sample
from varlen_sft.data.template import ChatTemplate

_REWRITES = "the template rewrites history"
_SAYS = {
    oracle.RAISES: "the chat template (refused|failed)",
    oracle.PROMPT: rf"{_REWRITES}: the prompt|generation prompt ends at|does not prompt with",
    oracle.LOST: "the template leaves out|cannot prompt|the template cuts",
    oracle.ORDER: "before the end of an earlier one|no stop token closes|begins at character",
    oracle.NO_STOP: rf"no stop token closes|{_REWRITES}: the answer",
    oracle.SPELLED: "spells? the control token",
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

    def add(self, other: Verdict) -> None:
        self.proven += other.proven
        self.turns += other.turns
        self.refused += other.refused
        self.faults += other.faults


def chat_template(name: str) -> ChatTemplate:
    return ChatTemplate(sources()[name], FACTS[name].variables, FACTS[name].stops)


def chat_tokenizer(tokenizer_json: str, name: str) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json, chat_template(name))


def with_template(chat: ChatTokenizer, name: str) -> ChatTokenizer:
    """The same tokenizer with another template: reading a large one takes seconds."""
    other = copy.copy(chat)
    other.template = chat_template(name)
    other.special_tokens = FACTS[name].variables
    other.planner = Planner(other.template, chat.control.pattern)
    other.counts = Counter()
    return other


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
    composes: bool = False,
    cross_check: bool = True,
) -> Verdict:
    """Hold every conversation against the oracle.

    Args:
        thinking: ``enable_thinking``, None to leave it to the template.
        composes: the tokenizer writes characters in their composed form (NFC).
        cross_check: the second mechanism has to agree, too.
    """
    if thinking is not None:
        kwargs = {"enable_thinking": thinking}
        conversations = {k: replace(c, template_kwargs=kwargs) for k, c in conversations.items()}
    rows = list(conversations.values())
    outcomes = chat.encode_rows(rows)
    checks = chat.cross_check(rows) if cross_check else [None] * len(rows)
    verdict = Verdict()
    for name, row, outcome, check in zip(conversations, rows, outcomes, checks, strict=True):
        want = expected(facts, row, thinking)
        if composes:
            want = replace(want, spans=tuple(normalize("NFC", text) for text in want.spans))
        _compare(chat, verdict, name, want, outcome)
        if check is not None:
            verdict.faults.append(f"{name}: the mechanisms disagree: {check}")
    return verdict


def _compare(
    chat: ChatTokenizer,
    verdict: Verdict,
    name: str,
    want: Expected,
    outcome: tuple[Sample, ...] | ConversationError,
) -> None:
    if isinstance(outcome, ConversationError):
        said = [reason for reason in want.reasons if re.search(_SAYS[reason], str(outcome))]
        if said:
            verdict.refused[min(said)] += 1
        else:
            reasons = sorted(want.reasons) or "nothing"
            verdict.faults.append(f"{name}: refused for {reasons} expected, but: {outcome}")
        return
    texts = [text for sample in outcome for text in trained(chat, sample)]
    if want.reasons:
        verdict.faults.append(f"{name}: not refused for {sorted(want.reasons)}: {texts}")
    elif texts != list(want.spans):
        verdict.faults.append(f"{name}: trained {texts}, expected {list(want.spans)}")
    else:
        verdict.proven += 1
        verdict.turns += len(texts)


def per_assistant(
    chat: ChatTokenizer, facts: Facts, conversations: Mapping[str, Conversation]
) -> Verdict:
    """The same with a row for each answer: each is what it would be as the last of its row."""
    verdict = Verdict()
    options = MaskOptions(history="per_assistant")
    for name, row in conversations.items():
        ends = [i + 1 for i, m in enumerate(row.messages) if m.role == "assistant"]
        alone = [
            expected(facts, replace(row, messages=row.messages[:end]), last_only=True)
            for end in ends
        ]
        spans = tuple(span for want in alone for span in want.spans)
        reasons = frozenset(reason for want in alone for reason in want.reasons)
        (outcome,) = chat.encode_rows([row], options)
        _compare(chat, verdict, name, Expected(spans, reasons), outcome)
    return verdict
