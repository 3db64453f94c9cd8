"""Every chat template in the `trl` wheel, on real tokenizers: what is trained, as text."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from tests.data.templates import tokenizers
from tests.data.templates.conversations import conversations, own
from tests.data.templates.oracle import SPELLED, expected
from tests.data.templates.prove import Verdict, chat_tokenizer, prove, trained, with_template
from tests.data.templates.templates import FACTS, settings_of, sources
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.masks import MaskOptions

pytestmark = pytest.mark.skipif(
    not sources(), reason="needs the chat templates in trl: pip install trl"
)

SLOW = "a hundred turns"
"""Where the renders of the second mechanism, whose number grows with the turns, take seconds."""

REAL = ("smollm2", "qwen", "deepseek")

Bases = Callable[[str], ChatTokenizer]


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
