"""What is laid out by joints is laid out as by marks, and where a letter differs not at all."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_chat import CHATML, supervised, talk, train_tokenizer, with_template
from tests.data.test_masks import THINKING, THOUGHT
from varlen_sft.data import joints
from varlen_sft.data import layout as layouts
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message

TRIMMING = CHATML.replace("m['content']", "m['content'] | trim")
NOTES = CHATML.replace("+ '<|im_end|>'", "+ ('!' if 'x' in m.content else '') + '<|im_end|>'")
TEXTS = st.text(st.sampled_from("ax \n!\u00e9\ue000"), max_size=4)


@pytest.fixture(scope="module")
def tiny_json() -> str:
    return train_tokenizer().to_str()


@pytest.fixture
def marked(monkeypatch) -> list[Conversation]:
    """The conversations for which the marks were asked."""
    asked = []
    place = layouts.place

    def noted(template, conversation, *more, **words):
        asked.append(conversation)
        return place(template, conversation, *more, **words)

    monkeypatch.setattr(layouts, "place", noted)
    return asked


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([CHATML, TRIMMING, NOTES, THINKING]),
    st.lists(st.lists(TEXTS, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0), max_size=4),
    st.booleans(),
)
def test_joints_find_what_marks_find(tiny_json, source, rows, system):
    """One tokenizer that remembers, one for each row that cannot."""
    remembering = with_template(tiny_json, source)
    remembering.encode(talk("a", "b", "c", "d", system="s" if system else None))
    for contents in rows:
        row = talk(*contents, system="s" if system else None)
        fresh = with_template(tiny_json, source)
        assert remembering.planner.lay_out(row) == fresh.planner.lay_out(row)


def test_a_known_shape_needs_no_marks_and_another_does(tiny_json, marked):
    tiny = with_template(tiny_json, CHATML)
    tiny.encode(talk("a", "b", "c", "d"))
    marked.clear()
    row = talk("hello ", "\n it is.", "", "what?", "a", "")
    assert supervised(tiny, tiny.encode(row)) == ["\n it is.<|im_end|>", "what?<|im_end|>"] + [
        "<|im_end|>"
    ]
    assert marked == []
    other = talk("a", "b", system="s")
    tiny.encode(other)
    assert marked[0] == other


def test_a_letter_that_differs_asks_the_marks(tiny_json, marked):
    tiny = with_template(tiny_json, NOTES)
    tiny.encode(talk("a", "b", "c", "d"))
    marked.clear()
    assert supervised(tiny, tiny.encode(talk("a", "x"))) == ["x!<|im_end|>"]
    assert marked


@pytest.mark.parametrize(
    "row",
    [
        THOUGHT,
        Conversation((Message("user", "a", extra={"name": "b"}), Message("assistant", "c"))),
        Conversation(talk("a", "b").messages, tools=({"name": "t"},)),
    ],
    ids=["thinking", "other fields", "tools"],
)
def test_only_plain_conversations_go_by_joints(tiny_json, marked, row):
    tiny = with_template(tiny_json, THINKING)
    for _ in range(2):
        marked.clear()
        tiny.encode(row)
        assert row in marked


def test_variables_of_the_template_have_joints_of_their_own(tiny_json, marked):
    tiny = with_template(tiny_json, CHATML.replace("'\n' + m", "(note or '') + '\n' + m"))
    rows = [
        Conversation(talk("a", "b").messages, template_kwargs=kwargs)
        for kwargs in ({}, {"note": "n"}, {}, {"note": "n"})
    ]
    for row in rows:
        try:
            tiny.encode(row)
        except ConversationError as error:
            assert "rewrites history" in str(error) and row.template_kwargs
    assert [json.dumps(dict(row.template_kwargs)) for row in marked[-1:]] == ['{"note": "n"}']


def test_generation_tags_are_read_each_time(tiny_json, marked):
    source = CHATML.replace("m['content'] + '<|im_end|>'", "'' }}{% generation %}{{ m['content'] "
                            "+ '<|im_end|>' }}{% endgeneration %}{{ ''")  # fmt: skip
    tiny: ChatTokenizer = with_template(tiny_json, source)
    for _ in range(2):
        marked.clear()
        assert supervised(tiny, tiny.encode(talk("a", "b"))) == ["b<|im_end|>"]
        assert marked


def test_what_is_learned_does_not_pile_up(tiny_json, monkeypatch):
    """A date in each row's variables makes each row a setting of its own."""
    for module in (layouts, joints):
        monkeypatch.setattr(module, "MOST_REMEMBERED", 8)
    tiny = with_template(tiny_json, CHATML)
    for day in range(30):
        row = Conversation(talk("a", "b", "c", "d").messages, template_kwargs={"day": day})
        assert supervised(tiny, tiny.encode(row)) == ["b<|im_end|>", "d<|im_end|>"]
    planner = tiny.planner
    assert len(planner._prompts) <= 10 and len(planner._endings) <= 9
    assert len(planner._joints._known) <= 8 + 5
