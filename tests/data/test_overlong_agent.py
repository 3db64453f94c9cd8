"""One turn of many answers, calls of tools among them, that is longer than a pack."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.data.overlong_rows import (
    ANSWERS,
    CHATML,
    MODES,
    TALK,
    calling,
    fit,
    rows_of,
    targets,
    tokenizer,
    trained,
)
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import OverlongCounts, fit_rows

AGENT = Conversation(
    (
        Message("system", "world"),
        Message("user", "hello"),
        *(m for k in range(4) for m in (calling(f"c{k}"), Message("tool", f"it is {k}"))),
        Message("assistant", "what?"),
    )
)


@pytest.mark.parametrize("template", ["chatml", "inside"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_a_turn_of_many_steps_is_truncated_after_a_call(steps, template):
    """Exactly the messages up to a call: no result without its answer, no header alone."""
    kept = Conversation(AGENT.messages[: 1 + 2 * steps])
    assert kept.messages[-1].tool_calls
    after = Conversation(AGENT.messages[: 3 + 2 * steps]) if steps < 4 else AGENT
    chat = tokenizer(template)
    for limit in (rows_of(kept, template), rows_of(after, template) - 1):
        fitted = fit(AGENT, limit, "truncate", template=template)
        (sample,) = fitted.samples
        whole = chat.encode(kept)
        assert sample.input_ids.tolist() == whole.input_ids.tolist()
        assert sample.token_weights.tolist() == whole.token_weights.tolist()
        calls = [f"[f]c{k}<|im_end|>" for k in range(steps)]
        assert trained(chat, sample) == calls
        assert chat.decode(sample.input_ids).removesuffix("\n").endswith(calls[-1])
        assert fitted.outcome == "truncated"
        lost = targets(chat.encode(AGENT))[len(targets(sample)) :]
        assert fitted.targets_lost == len(lost) > 0


def test_a_split_keeps_the_first_answers_of_a_turn_that_does_not_fit():
    end = (Message("user", "is it"), Message("assistant", "x"))
    start = (Message("user", "hello"), Message("assistant", "it is."))
    middle = AGENT.messages[1:]
    conversation = Conversation((AGENT.messages[0], *start, *middle, *end))
    limit = rows_of(Conversation(AGENT.messages[:5])) + 2  # up to its second call
    fitted = fit(conversation, limit, "split")
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        ["it is.<|im_end|>"],
        ["[f]c0<|im_end|>", "[f]c1<|im_end|>"],
        ["x<|im_end|>"],
    ]
    assert fitted.left_out == (
        f"messages 8 to 13 are left out: one turn of {rows_of(AGENT)} rows does not fit a pack of "
        f"{limit} tokens",
    )
    counts = OverlongCounts()
    counts.add(1, fitted)
    assert (counts.split, counts.parts, counts.parts_dropped) == (1, 3, 1)
    assert fitted.targets_lost == len(targets(tokenizer().encode(AGENT))) - len(
        targets(fitted.samples[1])
    )


def test_where_all_is_trained_the_begun_turn_is_too_but_for_the_head():
    start = (Message("user", "hello"), Message("assistant", "it is."))
    conversation = Conversation((AGENT.messages[0], *start, *AGENT.messages[1:]))
    begun = Conversation(AGENT.messages[:5])
    fitted = fit(conversation, rows_of(begun), "split", MODES["all"])
    head = "<|im_start|>system\nworld<|im_end|>\n"
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        [tokenizer().render(conversation.messages[:3])],
        [tokenizer().render(begun.messages).removeprefix(head)],
    ]


def test_a_call_that_trains_nothing_ends_no_part():
    messages = list(AGENT.messages)
    messages[4] = replace(messages[4], weight=0.0)
    limit = rows_of(Conversation(AGENT.messages[:5]))
    for overlong in ("truncate", "split"):
        (sample,) = fit(Conversation(tuple(messages)), limit, overlong).samples
        assert trained(tokenizer(), sample) == ["[f]c0<|im_end|>"]


def test_a_last_answer_alone_is_in_no_part_of_a_turn_that_does_not_fit():
    for overlong in ("truncate", "split"):
        fitted = fit(AGENT, rows_of(AGENT) - 1, overlong, MODES["last"])
        assert (fitted.outcome, fitted.samples) == ("dropped", ())


def test_rows_of_each_answer_are_kept_while_they_fit():
    options = MaskOptions(history="per_assistant")
    limit = rows_of(Conversation(AGENT.messages[:7]))
    for overlong in ("truncate", "split"):
        fitted = fit(AGENT, limit, overlong, options)
        assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
            [f"[f]c{k}<|im_end|>"] for k in range(3)
        ]
        of = {"truncate": "", "split": "of messages 2 to 11 "}[overlong]
        assert fitted.left_out == (f"2 of 5 answers {of}do not fit with their history",)


def test_a_template_that_cannot_end_with_a_call_is_cut_before_it():
    """Qwen 2.5 and others leave out a call's reasoning, which only matters in the last answer."""
    silent = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if loop.last and m.tool_calls and 'c1' in m.tool_calls|string %}"
        "{{ raise_exception('no call at the end') }}{% endif %}",
        1,
    )
    chat = tokenizer(silent)
    for steps, kept in ((2, 1), (3, 3)):
        limit = rows_of(Conversation(AGENT.messages[: 1 + 2 * steps]))
        (fitted,) = fit_rows(chat, [AGENT], ANSWERS, limit, "truncate")
        assert [trained(chat, sample) for sample in fitted.samples] == [
            [f"[f]c{k}<|im_end|>" for k in range(kept)]
        ]


def test_a_template_that_refuses_a_whole_turn_is_an_error():
    refuses = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if loop.last and m.content == 'world' %}"
        "{{ raise_exception('not at the end') }}{% endif %}",
        1,
    )
    for overlong, limit in (("truncate", rows_of(TALK) - 1), ("split", rows_of(TALK) // 2 + 5)):
        (error,) = fit_rows(tokenizer(refuses), [TALK], ANSWERS, limit, overlong)
        assert isinstance(error, ConversationError)
        assert re.search(
            "^the row is over-long, and messages . to 5 cannot be a part: .*not at the end",
            str(error),
        )
