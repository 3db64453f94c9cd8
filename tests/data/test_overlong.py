"""Over-long conversations, cut: every text, every count."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.data.overlong_rows import (
    ANSWERS,
    MODES,
    TALK,
    TEMPLATES,
    calling,
    fit,
    prefix,
    rows_of,
    talk,
    targets,
    tokenizer,
    trained,
    turn,
)
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import Fitted, OverlongCounts, fit_rows


@pytest.mark.parametrize(("turns", "extra"), [(1, 0), (1, 3), (2, 0), (2, 3)])
def test_truncation_keeps_whole_turns(turns, extra):
    limit = rows_of(prefix(TALK, turns)) + extra
    fitted = fit(TALK, limit, "truncate")
    (sample,) = fitted.samples
    assert sample.input_ids.tolist() == tokenizer().encode(prefix(TALK, turns)).input_ids.tolist()
    assert trained(tokenizer(), sample) == ["it is.<|im_end|>", "world<|im_end|>"][:turns]
    lost = ["world<|im_end|>", "x<|im_end|>"][turns - 1 :]
    tokens = sum(len(tokenizer().control.plain_ids(text.split("<")[0])) + 1 for text in lost)
    assert fitted == Fitted(fitted.samples, "truncated", targets_lost=tokens)


def test_nothing_fits_so_the_row_is_dropped():
    limit = rows_of(prefix(TALK, 1)) - 1
    fitted = fit(TALK, limit, "truncate")
    assert (fitted.samples, fitted.outcome) == ((), "dropped")
    assert fitted.left_out == (
        f"{rows_of(TALK)} rows do not fit a pack of {limit} tokens: no messages from the first on "
        "fit and end with an answer that is trained",
    )
    assert fitted.targets_lost == len(targets(tokenizer().encode(TALK)))


def test_a_row_that_fits_is_left_alone():
    limit = rows_of(TALK)
    for overlong in ("error", "drop", "truncate", "split"):
        fitted = fit(TALK, limit, overlong)
        assert (fitted.outcome, len(fitted.samples), fitted.targets_lost) == ("whole", 1, 0)
    assert fit(TALK, None, "error").outcome == "whole"


def test_error_and_drop():
    limit = rows_of(TALK) - 1
    reason = f"{limit + 1} rows do not fit a pack of {limit} tokens"
    short = talk("a", "b")
    refused, fitted = fit_rows(tokenizer(), [TALK, short], ANSWERS, limit, "error")
    assert isinstance(refused, ConversationError) and str(refused) == reason
    assert fitted.outcome == "whole"
    dropped = fit(TALK, limit, "drop")
    assert (dropped.samples, dropped.outcome, dropped.left_out) == ((), "dropped", (reason,))


def test_truncation_ends_with_a_trained_answer():
    messages = list(TALK.messages)
    messages[4] = replace(messages[4], weight=0.0)
    fitted = fit(Conversation(tuple(messages)), rows_of(prefix(TALK, 2)), "truncate")
    assert [trained(tokenizer(), s) for s in fitted.samples] == [["it is.<|im_end|>"]]
    assert len(fitted.samples[0]) == 1 + rows_of(prefix(TALK, 1))


def test_a_split_repeats_the_system_prompt_untrained():
    limit = max(rows_of(turn(TALK, k)) for k in range(3)) + 3
    fitted = fit(TALK, limit, "split", MODES["all"])
    texts = [tokenizer().decode(sample.input_ids) for sample in fitted.samples]
    head = "<|im_start|>system\nworld<|im_end|>\n"
    assert texts == [tokenizer().render(turn(TALK, k).messages) for k in range(3)]
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        [texts[0]], [texts[1].removeprefix(head)], [texts[2].removeprefix(head)]
    ]  # fmt: skip
    assert (fitted.outcome, fitted.left_out, fitted.targets_lost) == ("split", (), 0)


def test_parts_hold_as_many_turns_as_fit():
    conversation = talk(*["hello", "it is."] * 8, system="world " * 20)
    fitted = fit(conversation, rows_of(prefix(conversation, 3)) + 6, "split")
    assert [len(trained(tokenizer(), sample)) for sample in fitted.samples] == [3, 3, 2]


def test_a_turn_that_does_not_fit_is_left_out_with_its_reason():
    conversation = talk("hello", "it is.", "what?", "world " * 30, "is it", "x", system="world")
    fitted = fit(conversation, 50, "split", MODES["roles"])
    rows = rows_of(turn(conversation, 1))
    assert rows > 50
    assert fitted.left_out == (
        f"messages 4 to 5 are left out: one turn of {rows} rows does not fit a pack of 50 tokens",
    )
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        ["world", "hello", "it is.<|im_end|>"], ["is it", "x<|im_end|>"]
    ]  # fmt: skip
    counts = OverlongCounts()
    counts.add(7, fitted)
    said = MaskOptions("roles", roles=("user", "assistant"))
    lost = len(targets(tokenizer().encode(turn(conversation, 1), said)))
    assert (counts.split, counts.parts, counts.parts_dropped) == (1, 2, 1)
    assert (counts.targets_lost, counts.rows["split"]) == (lost, [7])


def test_the_system_prompt_is_trained_once_though_the_first_turn_is_left_out():
    conversation = talk("world " * 30, "it is.", "what?", "it", "is it", "x", system="world")
    fitted = fit(conversation, rows_of(turn(conversation, 1)), "split", MODES["roles"])
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        ["world", "what?", "it<|im_end|>"], ["is it", "x<|im_end|>"]
    ]  # fmt: skip


def test_no_turn_fits_so_a_split_drops_the_row():
    fitted = fit(TALK, 5, "split")
    assert (fitted.samples, fitted.outcome, len(fitted.left_out)) == ((), "dropped", 1)
    reason = fitted.left_out[0]
    assert reason.startswith(f"{rows_of(TALK)} rows do not fit a pack of 5 tokens: messages 2 to 3")
    assert reason.count("are left out: one turn of") == 3


def test_tool_calls_stay_with_their_results():
    messages = [Message("user", "hello"), Message("assistant", "x")]
    messages += [Message("user", "is it"), calling("world")]
    messages += [Message("tool", "it is."), Message("assistant", "what?")]
    conversation = Conversation(tuple(messages))
    fitted = fit(conversation, rows_of(turn(conversation, 1)), "split")
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        ["x<|im_end|>"], ["[f]world<|im_end|>", "what?<|im_end|>"]
    ]  # fmt: skip
    cut = fit(conversation, rows_of(conversation) - 1, "truncate")
    assert [trained(tokenizer(), sample) for sample in cut.samples] == [
        ["x<|im_end|>", "[f]world<|im_end|>"]  # not the result, which no answer follows
    ]


def test_counts_of_the_tokenizer_are_of_whole_rows():
    conversation = talk(*["hello", "\n\nit is."] * 4)
    tiny = tokenizer(TEMPLATES["chatml"] + "{# another #}")
    tiny.encode(conversation)
    once = Counter(tiny.counts)
    fit_rows(tiny, [conversation], ANSWERS, 40, "split")
    assert tiny.counts == Counter({name: 2 * count for name, count in once.items()})


def test_few_encodes(monkeypatch):
    rows = [talk(*["hello", "it is."] * 30, system="world")] * 5
    asked = []
    encode_rows = tokenizer().encode_rows

    def counted(rows, options=None):
        asked.append(len(rows))
        return encode_rows(rows, options)

    monkeypatch.setattr(tokenizer(), "encode_rows", counted)
    fitted = fit_rows(tokenizer(), rows, ANSWERS, 200, "split")
    assert asked == [5, sum(len(one.samples) for one in fitted), 0]
    asked.clear()
    fit_rows(tokenizer(), rows, ANSWERS, 200, "truncate")
    assert asked in ([5, 5, 0], [5, 5, 5, 0])


def test_wrong_policies_are_named():
    with pytest.raises(ValueError, match="overlong must be one of .*'split'.*, got 'cut'"):
        fit_rows(tokenizer(), [], ANSWERS, 5, "cut")
    with pytest.raises(ValueError, match="max_tokens must be 1 or more, got 0"):
        fit_rows(tokenizer(), [], ANSWERS, 0, "split")
