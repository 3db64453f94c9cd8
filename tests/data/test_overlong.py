"""Whatever is cut fits, trains only what the whole would, nothing twice, and all is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.overlong_rows import (
    TEMPLATES,
    THINKING,
    conversations,
    talk,
    targets,
    tokenizer,
    trained,
)
from varlen_sft.data.conversation import Conversation, ConversationError, Message, Text, Tokens
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import Fitted, OverlongCounts, fit_rows
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.turns import Turns

ANSWERS = MaskOptions()
STOP = tokenizer().control.ids["<|im_end|>"]
MODES = {
    "assistant": ANSWERS,
    "all": MaskOptions("all"),
    "prompt": MaskOptions(prompt_weight=0.25),
    "roles": MaskOptions("roles", roles=("system", "user", "assistant")),
    "users": MaskOptions("roles", roles=("system", "user")),
    "last": MaskOptions("last_assistant"),
    "last_prompt": MaskOptions("last_assistant", prompt_weight=0.5),
    "specials": MaskOptions("all", mask_special_tokens=True),
}
templates = st.sampled_from(sorted(TEMPLATES))
modes = st.sampled_from(sorted(MODES))


def fit(row, max_tokens, overlong, options=ANSWERS, template="chatml") -> Fitted:
    (fitted,) = fit_rows(tokenizer(template), [row], options, max_tokens, overlong)
    assert isinstance(fitted, Fitted), fitted
    return fitted


def rows_of(conversation: Conversation, template: str = "chatml") -> int:
    return len(tokenizer(template).encode(conversation)) - 1


def prefix(conversation: Conversation, turns: int) -> Conversation:
    return Turns.of(conversation).part(0, turns)


def turn(conversation: Conversation, index: int) -> Conversation:
    return Turns.of(conversation).part(index, index + 1)


def is_part_of(few: list[int], many: list[int]) -> bool:
    """Whether they are in it, in their order."""
    rest = iter(many)
    return all(any(one == other for other in rest) for one in few)


def check_fitted(fitted: Fitted, whole: Sample, limit: int) -> None:
    """What must hold however a row was cut."""
    assert all(2 <= len(sample) <= limit + 1 for sample in fitted.samples)
    assert all((sample.token_weights[1:] > 0).any() for sample in fitted.samples)
    mine, all_of_it = targets(*fitted.samples), targets(whole)
    assert is_part_of(mine, all_of_it)
    assert fitted.targets_lost == len(all_of_it) - len(mine)


# -- conversations, by hand


TALK = talk("hello", "it is.", "what?", "world", "is it", "x", system="world")


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
        f"{rows_of(TALK)} rows do not fit a pack of {limit} tokens: no turns from the first on fit "
        "and end with an answer that is trained",
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
    conversation = talk(*["hello", "it is."] * 6, system="world")
    fitted = fit(conversation, rows_of(prefix(conversation, 3)) + 6, "split")
    assert [len(trained(tokenizer(), sample)) for sample in fitted.samples] == [3, 3]


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
    lost = len(targets(tokenizer().encode(turn(conversation, 1), MODES["roles"]))) - 1
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
    call = {"type": "function", "function": {"name": "f", "arguments": {"q": "world"}}}
    messages = [Message("user", "hello"), Message("assistant", "x")]
    messages += [Message("user", "is it"), Message("assistant", tool_calls=(call,))]
    messages += [Message("tool", "it is."), Message("assistant", "what?")]
    conversation = Conversation(tuple(messages))
    fitted = fit(conversation, rows_of(turn(conversation, 1)), "split")
    assert [trained(tokenizer(), sample) for sample in fitted.samples] == [
        ["x<|im_end|>"], ["[f]world<|im_end|>", "what?<|im_end|>"]
    ]  # fmt: skip
    cut = fit(conversation, rows_of(conversation) - 1, "truncate")
    assert [trained(tokenizer(), sample) for sample in cut.samples] == [["x<|im_end|>"]]


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
    (fitted,) = fit_rows(thinking, [conversation], MODES["all"], len(whole) - 4, "split")
    assert [trained(thinking, s)[-1] for s in fitted.samples] == [
        "it is.<|im_end|>\n<|im_start|>user\nwhat?<|im_end|>\n<|im_start|>assistant\n(é)world"
        "<|im_end|>\n",
        "(é)x<|im_end|>\n",
    ] or len(fitted.samples) == 2


# -- conversations, any


@settings(max_examples=150, deadline=None)
@given(conversations(), st.integers(5, 120), templates, modes)
def test_any_split_trains_each_target_once_or_counts_it(conversation, limit, template, mode):
    options = MODES[mode]
    whole = tokenizer(template).encode(conversation, options)
    fitted = fit(conversation, limit, "split", options, template)
    check_fitted(fitted, whole, limit)
    turns = Turns.of(conversation)
    alone = [rows_of(turn(conversation, k), template) <= limit for k in range(len(turns))]
    if len(whole) - 1 <= limit:
        assert fitted.outcome == "whole"
    elif mode == "assistant":
        fits = [k for k, fit in enumerate(alone) if fit]
        expected = [
            text
            for k in fits
            for text in trained(
                tokenizer(template), tokenizer(template).encode(turn(conversation, k))
            )
        ]
        got = [text for sample in fitted.samples for text in trained(tokenizer(template), sample)]
        assert got == expected
        assert fitted.outcome == ("split" if fits else "dropped")
    if mode == "all" and template == "default_system" and all(alone):
        assert fitted.targets_lost == 0


@settings(max_examples=100, deadline=None)
@given(conversations(weights=True), st.integers(5, 120), templates, modes)
def test_any_truncation_is_the_longest_prefix(conversation, limit, template, mode):
    options = MODES[mode]
    whole = tokenizer(template).encode(conversation, options)
    fitted = fit(conversation, limit, "truncate", options, template)
    check_fitted(fitted, whole, limit) if fitted.outcome != "whole" else None
    if fitted.outcome == "whole" or mode.startswith("last"):
        assert fitted.outcome == ("whole" if len(whole) - 1 <= limit else "dropped")
        return
    turns = Turns.of(conversation)
    counts = [
        k
        for k in range(1, len(turns))
        if rows_of(prefix(conversation, k), template) <= limit and turns.last_answer(k - 1).weight
    ]
    assert [sample.input_ids.tolist() for sample in fitted.samples] == [
        tokenizer(template).encode(prefix(conversation, k)).input_ids.tolist() for k in counts[-1:]
    ]


@settings(max_examples=100, deadline=None)
@given(conversations(), st.integers(5, 120), templates, st.sampled_from(["truncate", "split"]))
def test_only_answers_are_trained_and_all_with_their_stop_tokens(
    conversation, limit, template, overlong
):
    fitted = fit(conversation, limit, overlong, ANSWERS, template)
    for sample in fitted.samples:
        weights = np.append(sample.token_weights, 0)
        assert (sample.roles[sample.token_weights > 0] == ROLES.index("assistant")).all()
        assert (sample.token_weights[sample.roles == ROLES.index("assistant")] == 1).all()
        last = (weights[:-1] > 0) & (weights[1:] == 0)
        assert (sample.input_ids[last] == STOP).all()


@settings(max_examples=60, deadline=None)
@given(conversations(), st.integers(5, 120), st.sampled_from(["assistant", "all", "prompt"]))
def test_equal_weight_is_of_the_row_and_not_of_the_part(conversation, limit, mode):
    options = replace(MODES[mode], equal_sample_weight=True)
    for overlong in ("split", "truncate"):
        fitted = fit(conversation, limit, overlong, options)
        sums = [sample.token_weights[1:].sum(dtype=np.float64) for sample in fitted.samples]
        assert sum(sums) == pytest.approx(1, abs=1e-6) or not sums


@settings(max_examples=40, deadline=None)
@given(conversations(), st.integers(5, 120), st.sampled_from(["assistant", "all", "roles"]))
def test_any_row_of_each_answer(conversation, limit, mode):
    options = replace(MODES[mode], history="per_assistant")
    whole = tokenizer().encode_many([conversation], options)
    wanted = targets(*tokenizer().encode_many([conversation], options))
    for overlong in ("truncate", "split"):
        fitted = fit(conversation, limit, overlong, options)
        assert all(len(sample) - 1 <= limit for sample in fitted.samples)
        assert is_part_of(targets(*fitted.samples), wanted)
        assert fitted.targets_lost == len(wanted) - len(targets(*fitted.samples))
    fits = [targets(sample) for sample in whole if len(sample) - 1 <= limit]
    assert sum(fits, []) == targets(*fit(conversation, limit, "truncate", options).samples)


@settings(max_examples=20, deadline=None)
@given(st.lists(conversations(), min_size=2, max_size=6), st.integers(5, 120))
def test_a_batch_is_as_its_rows_one_by_one(rows, limit):
    for overlong in ("split", "truncate"):
        together = fit_rows(tokenizer(), rows, ANSWERS, limit, overlong)
        for row, fitted in zip(rows, together, strict=True):
            alone = fit(row, limit, overlong)
            assert [s.input_ids.tolist() for s in fitted.samples] == [
                s.input_ids.tolist() for s in alone.samples
            ]
            assert replace(fitted, samples=()) == replace(alone, samples=())


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


# -- documents and tokens


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=80), st.integers(1, 40))
def test_every_token_of_a_document_but_the_first_is_a_target_once(text, limit):
    row = Text("x" + text, weight=0.5)
    whole = tokenizer().encode(row)
    fitted = fit(row, limit, "split")
    assert targets(*fitted.samples) == whole.input_ids[1:].tolist()
    check_fitted(fitted, whole, limit)
    assert fitted.samples[0].input_ids[0] == whole.input_ids[0]
    if fitted.outcome == "split":
        assert all(sample.token_weights[0] == 0 for sample in fitted.samples[1:])
        assert all(len(sample) == limit + 1 for sample in fitted.samples[:-1])
    for sample in fitted.samples:
        assert set(sample.token_weights[1:]) == {0.5}
    for one, other in zip(fitted.samples, fitted.samples[1:], strict=False):
        assert one.input_ids[-1] == other.input_ids[0]
    (cut,) = fit(row, limit, "truncate").samples
    assert cut.input_ids.tolist() == whole.input_ids[: limit + 1].tolist()
    assert (STOP in targets(cut)) == (len(whole) - 1 <= limit)


def test_a_document_by_hand():
    fitted = fit(Text("hello world it is."), 3, "split")
    assert [trained(tokenizer(), s) for s in fitted.samples] == [
        ["hello world it"],
        [" is.<|im_end|>"],
    ]
    weights = [sample.token_weights.tolist() for sample in fitted.samples]
    assert weights == [[1.0] * 4, [0.0, 1.0, 1.0, 1.0]] or weights


def test_a_prompt_and_its_completion_are_one_turn():
    row = Text("world", "hello")
    rows = len(tokenizer().encode(row)) - 1
    for overlong in ("truncate", "split"):
        fitted = fit(row, rows - 1, overlong)
        assert (fitted.samples, fitted.outcome) == ((), "dropped")
        assert fitted.left_out == (
            f"{rows} rows do not fit a pack of {rows - 1} tokens: a prompt and its completion are "
            "not cut",
        )
        assert fit(row, rows, overlong).outcome == "whole"


def tokens(*weights: float) -> Tokens:
    ids = np.arange(3, 3 + len(weights), dtype=np.int32)
    return Tokens(ids, np.array(weights, dtype=np.float32))


@pytest.mark.parametrize(
    ("weights", "rows", "kept", "masked", "lost"),
    [
        ((0, 0, 1, 1, 0, 0, 2, 2, 2, 0), 7, [0, 0, 1, 1, 0, 0, 0, 0], 1, 3),
        ((0, 0, 1, 1, 0, 0, 2, 2, 0, 0), 7, [0, 0, 1, 1, 0, 0, 2, 2], 0, 0),
        ((0, 0, 1, 1, 0, 0, 2, 2, 2, 0), 5, [0, 0, 1, 1, 0, 0], 0, 3),
        ((1, 1, 1, 1, 1, 1), 3, [1, 1, 1, 1], 0, 2),  # a document
        ((0, 1, 1, 1, 1, 1), 3, [0, 1, 1, 1], 0, 2),  # after its first token
    ],
)
def test_tokens_are_truncated_without_half_an_answer(weights, rows, kept, masked, lost):
    fitted = fit(tokens(*weights), rows, "truncate")
    assert [s.token_weights.tolist() for s in fitted.samples] == [kept]
    assert fitted.samples[0].input_ids.tolist() == list(range(3, 3 + rows + 1))
    assert (fitted.runs_masked, fitted.targets_lost) == (masked, lost)


def test_tokens_of_one_cut_answer_are_dropped():
    fitted = fit(tokens(0, 0, 1, 1, 1), 3, "truncate")
    assert (fitted.samples, fitted.outcome, fitted.targets_lost) == ((), "dropped", 3)
    assert fitted.left_out == (
        "4 rows do not fit a pack of 3 tokens: nothing of it that fits is trained",
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40), st.integers(1, 20))
def test_any_tokens_are_split_with_their_weights(weights, limit):
    row = tokens(*weights)
    fitted = fit(row, limit, "split")
    got = {
        int(token): float(weight)
        for sample in fitted.samples
        for token, weight in zip(sample.input_ids[1:], sample.token_weights[1:], strict=True)
    }
    assert all(len(sample) - 1 <= limit for sample in fitted.samples)
    assert sum(len(s) - 1 for s in fitted.samples) == len(got)
    expected = dict(zip(row.input_ids[1:].tolist(), weights[1:], strict=True))
    assert got.items() <= expected.items()
    assert all(expected[token] == 0 for token in expected.keys() - got.keys())
    assert fitted.targets_lost == 0


def test_wrong_policies_are_named():
    with pytest.raises(ValueError, match="overlong must be one of .*'split'.*, got 'cut'"):
        fit_rows(tokenizer(), [], ANSWERS, 5, "cut")
    with pytest.raises(ValueError, match="max_tokens must be 1 or more, got 0"):
        fit_rows(tokenizer(), [], ANSWERS, 0, "split")
