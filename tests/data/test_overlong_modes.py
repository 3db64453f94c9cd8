"""Over-long conversations where not every answer is trained, or written, as in the whole."""

from __future__ import annotations

from dataclasses import replace

from tests.data.overlong_rows import (
    ANSWERS,
    MODES,
    TALK,
    THINKING,
    fit,
    prefix,
    rows_of,
    talk,
    tokenizer,
    trained,
    turn,
)
from varlen_sft.data.conversation import Conversation
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import fit_rows


def test_parts_of_untrained_answers_are_left_out_and_counted():
    messages = [replace(m, weight=float(i == 4)) for i, m in enumerate(TALK.messages)]
    fitted = fit(Conversation(tuple(messages)), rows_of(turn(TALK, 1)) + 2, "split")
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [["world<|im_end|>"]]
    assert (fitted.parts_untrained, fitted.targets_lost) == (2, 0)


def test_a_last_answer_has_nothing_to_truncate_to():
    limit = rows_of(turn(TALK, 1)) + 3
    reason = f"{rows_of(TALK)} rows do not fit a pack of {limit} tokens: only its last answer is "
    dropped = fit(TALK, limit, "truncate", MODES["last"])
    assert (dropped.outcome, dropped.left_out) == ("dropped", (reason + "trained",))
    fitted = fit(TALK, limit, "split", MODES["last"])
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [["x<|im_end|>"]]
    assert (fitted.parts_untrained, fitted.targets_lost) == (2, 0)


def test_what_closes_a_conversation_is_trained_at_its_end_alone():
    closed, options = tokenizer("closed"), MODES["all"]
    texts = [closed.render(turn(TALK, k).messages) for k in range(3)]
    assert all(text.endswith("\n<|end|>") for text in texts)
    limit = max(rows_of(turn(TALK, k), "closed") for k in range(3)) + 3
    split = fit(TALK, limit, "split", options, "closed")
    assert [trained(closed, sample)[-1][-9:] for sample in split.samples] == [
        "<|im_end|>\n"[-9:], "<|im_end|>\n"[-9:], "d|>\n<|end|>"[-9:]
    ]  # fmt: skip
    (cut,) = fit(TALK, limit, "truncate", options, "closed").samples
    assert trained(closed, cut) == [texts[0].removesuffix("<|end|>")]


def test_prompts_are_weighed_once_where_the_last_answer_alone_is_trained():
    limit = max(rows_of(turn(TALK, k)) for k in range(3)) + 3
    fitted = fit(TALK, limit, "split", MODES["last_prompt"])
    head = "<|im_start|>system\nworld<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        [head + "<|im_start|>assistant\n"], ["what?"], ["is it", "x<|im_end|>"]
    ]  # fmt: skip


def test_a_row_of_each_answer():
    """With ``history=per_assistant`` answers that fit stay, and parts give them less history."""
    options = MaskOptions(history="per_assistant")
    limit = rows_of(prefix(TALK, 2))
    cut = fit(TALK, limit, "truncate", options)
    assert [trained(tokenizer(), s) for s in cut.samples] == [
        ["it is.<|im_end|>"],
        ["world<|im_end|>"],
    ]
    assert cut.left_out == ("1 of 3 answers do not fit with their history",)
    split = fit(TALK, limit, "split", MaskOptions("all", history="per_assistant"))
    texts = [tokenizer().decode(sample.input_ids) for sample in split.samples]
    assert texts[:2] == [tokenizer().render(prefix(TALK, k).messages) for k in (1, 2)]
    assert texts[2] == tokenizer().render(turn(TALK, 2).messages)
    assert trained(tokenizer(), split.samples[0]) == [texts[0]]
    assert trained(tokenizer(), split.samples[2]) == ["is it", "x<|im_end|>"]


def test_a_template_that_drops_thinking_keeps_it_at_the_end_of_a_part():
    thinking = tokenizer(THINKING)
    messages = [
        replace(m, reasoning_content="é") if m.role == "assistant" else m for m in TALK.messages
    ]
    conversation = Conversation(tuple(messages))
    whole = thinking.encode(conversation)
    assert trained(thinking, whole) == ["it is.<|im_end|>", "world<|im_end|>", "(é)x<|im_end|>"]
    fitted, short = (
        fit_rows(thinking, [conversation], MODES["all"], rows, "split")[0] for rows in (57, 40)
    )
    assert [trained(thinking, sample) for sample in fitted.samples] == [
        [thinking.render(prefix(conversation, 2).messages)],
        ["<|im_start|>user\nis it<|im_end|>\n<|im_start|>assistant\n(é)x<|im_end|>\n"],
    ]
    assert fitted.targets_lost == 0
    # The second part is no piece of the whole, so only what its messages own is trained.
    assert [trained(thinking, sample) for sample in short.samples] == [
        [thinking.render(prefix(conversation, 1).messages)],
        ["what?", "(é)world<|im_end|>"],
        ["<|im_start|>user\nis it<|im_end|>\n<|im_start|>assistant\n(é)x<|im_end|>\n"],
    ]


def test_a_first_guess_that_is_too_long_is_halved():
    """The whole does not show how long the last turn of a part is: there it thinks."""
    thinking = tokenizer(THINKING)
    messages = talk(*["hello", "it is."] * 8).messages
    messages = [
        replace(m, reasoning_content="world" * 12) if m.role == "assistant" else m for m in messages
    ]
    conversation = Conversation(tuple(messages))
    limit = len(thinking.encode(prefix(conversation, 2)))
    (fitted,) = fit_rows(thinking, [conversation], ANSWERS, limit, "split")
    texts = [trained(thinking, sample) for sample in fitted.samples]
    assert sum(map(len, texts)) == 8 and fitted.left_out == ()
    assert all(len(sample) - 1 <= limit for sample in fitted.samples)
    assert {text for few in texts for text in few[:-1]} <= {"it is.<|im_end|>"}
    assert {few[-1] for few in texts} == {"(" + "world" * 12 + ")it is.<|im_end|>"}
