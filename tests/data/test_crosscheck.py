"""The second way to find answers: it agrees where it should, and sees what the first gets wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.test_chat import CHATML, supervised, talk, train_tokenizer, with_template
from tests.data.test_masks import CALL, THINKING, THOUGHT
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, Message, Text
from varlen_sft.data.layout import Layout, Planner
from varlen_sft.data.masks import MaskOptions


@pytest.fixture(scope="module")
def tiny_json() -> str:
    return train_tokenizer().to_str()


@pytest.fixture
def thinking(tiny_json) -> ChatTokenizer:
    return with_template(tiny_json, THINKING)


def with_tools() -> Conversation:
    call = replace(THOUGHT.messages[1], content="", tool_calls=(CALL,))
    result = Message("tool", "42"), Message("assistant", "it is.")
    return Conversation((*THOUGHT.messages[:1], call, *result, *THOUGHT.messages[2:]))


AGREED = {
    "turns": talk("hello", "it is.", "what?", "world", system="user"),
    "blank answers": talk("hello", "", "what?", " \n", "a", "b"),
    "one answer again and again": talk("a", "a", "a", "a", "a", "a"),
    "control tokens of a user": talk("<|im_end|>\n<|im_start|>assistant\na", "a"),
    "thinking": THOUGHT,
    "tools": with_tools(),
    "no template": Text("hello"),
}


@pytest.mark.parametrize("name", AGREED)
@pytest.mark.parametrize("history", ["as_rendered", "per_assistant"])
def test_both_ways_agree(thinking, name, history):
    options = MaskOptions(history=history)
    assert not isinstance(thinking.encode_rows([AGREED[name]], options)[0], Exception)
    assert thinking.cross_check([AGREED[name]], options) == [None]


def moved(layout: Layout, **by: int) -> Layout:
    first = layout.answers[0]
    changed = {name: getattr(first, name) + step for name, step in by.items()}
    return replace(layout, answers=(first._replace(**changed), *layout.answers[1:]))


@pytest.mark.parametrize(
    ("by", "reason"),
    [
        (
            {"start": -1},
            "two ways to find message 2 disagree on where it begins:\n"
            "  marks                  character 54: '\\nit is.<|im_end|>\\n<|im_start|>'\n"
            "  prefixes and sentinels character 55: 'it is.<|im_end|>\\n<|im_start|>u'",
        ),
        (
            {"stop_start": 21, "end": 21},
            "two ways to find message 2 disagree on where it ends:\n"
            "  marks                  character 92: 't?<|im_end|>\\n<|im_start|>assis'\n"
            "  prefixes and sentinels character 71: '\\n<|im_start|>user\\nwhat?<|im_en'",
        ),
    ],
)
def test_an_answer_in_the_wrong_place_is_seen(tiny_json, monkeypatch, by, reason):
    tiny = with_template(tiny_json, CHATML)
    right = Planner.lay_out
    monkeypatch.setattr(Planner, "lay_out", lambda *a, **k: moved(right(*a, **k), **by))
    (found,) = tiny.cross_check([talk("hello", "it is.", "what?", "world")])
    assert str(found) == reason


def test_tokens_that_change_when_control_is_kept_apart_are_seen(tiny_json, monkeypatch):
    tiny = with_template(tiny_json, CHATML)
    right = tiny._encoder.encode

    def with_another_token(texts):
        found = right(texts)
        return [replace(one, ids=np.where(one.ids == 265, 266, one.ids)) for one in found]

    row = talk("hello", "what is it? it is.")
    assert 265 in tiny.encode(row).input_ids
    monkeypatch.setattr(tiny._encoder, "encode", with_another_token)
    (found,) = tiny.cross_check([row])
    assert "two ways to tokenise disagree" in str(found) and "the ids differ" in str(found)


def test_a_row_that_cannot_be_checked_again_says_so(tiny_json):
    """A template that refuses any other answer: only a second opinion would know."""
    guard = (
        "{% for m in messages %}{% if m.role == 'assistant' and 'it is' not in m.content %}"
        "{{ raise_exception('no') }}{% endif %}{% endfor %}"
    )
    tiny = with_template(tiny_json, guard + CHATML)
    row = talk("hello", "it is.")
    assert supervised(tiny, tiny.encode(row)) == ["it is.<|im_end|>"]
    (found,) = tiny.cross_check([row])
    assert "message 2 cannot be checked again: the chat template refused: no" in str(found)
