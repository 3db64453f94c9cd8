"""Any conversation, with text that spells control tokens and markers, in every chat template of the
`trl` wheel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.templates.conversations import call, result
from tests.data.templates.prove import prove, trained, with_template
from tests.data.templates.templates import FACTS, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message

pytestmark = pytest.mark.skipif(
    not sources(), reason="needs the chat templates in trl: pip install trl"
)

Bases = Callable[[str], ChatTokenizer]

_COMMON = [
    "\n",
    "\n\n",
    " ",
    "assistant",
    "user",
    "hello",
    "It is.",
    "{{",
    "\ue000",
    "é🦙",
    "\u0301",
]
_THINKING = ["<think>", "</think>", "<think>\n", "<|channel>", "<channel|>", "<tool_response>"]


@st.composite
def talks(draw: st.DrawFn, marks_in_answers: bool) -> tuple[str, Conversation]:
    """A template and any conversation, whose texts spell that template's tokens."""
    name = draw(st.sampled_from(sorted(FACTS)))
    facts = FACTS[name]
    tokens = [*facts.control, *facts.markers, facts.prompt, *_THINKING]
    spelled = st.sampled_from(tokens + _COMMON)
    plain = st.one_of(st.sampled_from(_COMMON), st.text(max_size=6))
    anything = st.lists(st.one_of(spelled, plain), max_size=5).map("".join)
    said = anything if marks_in_answers else st.lists(plain, max_size=5).map("".join)
    messages = [Message("system", draw(anything))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        reasoning = draw(st.one_of(st.none(), said))
        messages.append(Message("user", draw(anything)))
        messages.append(Message("assistant", draw(said), reasoning_content=reasoning))
    return name, Conversation(tuple(messages))


@settings(deadline=None, max_examples=400)
@given(case=talks(marks_in_answers=False))
def test_any_conversation_trains_what_the_oracle_says(base, case):
    name, row = case
    verdict = prove(_cached(base, name), FACTS[name], {"row": row}, any_reason=True)
    assert verdict.faults == []


_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just("a\n'b\" ")),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def errands(draw: st.DrawFn) -> tuple[str, Conversation]:
    """A template that writes tool calls, and a conversation with any."""
    name = draw(st.sampled_from([name for name, facts in FACTS.items() if facts.calls]))
    arguments = st.dictionaries(st.text(max_size=4), _JSON, max_size=3)
    words = st.lists(st.sampled_from(_COMMON), max_size=3).map("".join)
    messages = [Message("user", draw(words))]
    for _ in range(draw(st.integers(1, 2))):
        given = draw(st.lists(arguments, min_size=1, max_size=2))
        calls = tuple(
            call(draw(st.sampled_from(["f", "get"])), one, k) for k, one in enumerate(given)
        )
        content = draw(words.filter(lambda text: not text or text.strip()))
        messages.append(Message("assistant", content, tool_calls=calls))
        messages += [result(draw(words), "f", k) for k in range(len(calls))]
    return name, Conversation((*messages, Message("assistant", draw(words))))


@settings(deadline=None, max_examples=200)
@given(case=errands())
def test_any_tool_calls_train_what_the_oracle_says(base, case):
    name, row = case
    verdict = prove(_cached(base, name), FACTS[name], {"row": row}, any_reason=True)
    assert verdict.faults == []


@settings(deadline=None, max_examples=300)
@given(case=talks(marks_in_answers=True))
def test_nothing_but_answers_is_ever_trained(base, case):
    """Answers may spell anything. What is trained does not change with what others say, there is
    one run for each answer, and each ends with a stop token."""
    name, row = case
    facts, chat = FACTS[name], _cached(base, name)
    others = [m if m.role == "assistant" else replace(m, content="hi") for m in row.messages]
    one, other = chat.encode_rows([row, replace(row, messages=tuple(others))])
    if isinstance(one, ConversationError):
        return
    (sample,) = one
    runs = trained(chat, sample)
    assert len(runs) == sum(message.role == "assistant" for message in row.messages)
    assert all(run.endswith((*facts.stops, facts.eos)) for run in runs)
    if not isinstance(other, ConversationError):
        assert runs == trained(chat, other[0])


_CHATS: dict[str, ChatTokenizer] = {}


def _cached(base: Bases, name: str) -> ChatTokenizer:
    if name not in _CHATS:
        _CHATS[name] = with_template(base("bytes"), name)
    return _CHATS[name]
