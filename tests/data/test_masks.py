"""What each option trains, as text: modes, weights, history, tool calls, thinking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.test_chat import CHATML, runs, talk, train_tokenizer, with_template
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message, Text, Tokens
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import Sample

# Qwen 3's way: thinking is written in the last turn only, and an empty one if there is none.
THINKING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and (loop.index0 > ns.last or keep_past_thinking) %}"
    "{{ '<think>' + (m.reasoning_content or '') + '</think>' }}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + "
    "(c.function.arguments | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "what", "arguments": {"a": "it", "n": 3}}}


@pytest.fixture(scope="module")
def tiny_json() -> str:
    return train_tokenizer().to_str()


@pytest.fixture(scope="module")
def tiny(tiny_json) -> ChatTokenizer:
    return with_template(tiny_json, CHATML)


@pytest.fixture(scope="module")
def thinking(tiny_json) -> ChatTokenizer:
    return with_template(tiny_json, THINKING)


def trained(tokenizer: ChatTokenizer, sample: Sample) -> list[tuple[str, float]]:
    """Runs of one weight other than 0, as text."""
    found = []
    for weight in np.unique(sample.token_weights)[::-1]:
        if weight:
            texts = runs(tokenizer, sample, sample.token_weights == weight)
            found += [(text, pytest.approx(float(weight))) for text in texts]
    return found


def samples(tokenizer: ChatTokenizer, row: object, **options: object) -> list[Sample]:
    return tokenizer.encode_many([row], MaskOptions(**options))


TALK = talk("hello", "it is.", "what?", "world", system="user")


def test_each_mode_trains_its_messages(tiny):
    def said(**options: object) -> list[str]:
        (sample,) = samples(tiny, TALK, **options)
        return [text for text, _ in trained(tiny, sample)]

    assert said() == ["it is.<|im_end|>", "world<|im_end|>"]
    assert said(supervision_mode="last_assistant") == ["world<|im_end|>"]
    assert said(supervision_mode="all") == [tiny.render(TALK.messages)]
    assert said(supervision_mode="roles", roles=("user",)) == ["hello", "what?"]
    assert said(supervision_mode="roles", roles=("system", "assistant")) == [
        "user",
        "it is.<|im_end|>",
        "world<|im_end|>",
    ]


def test_special_tokens_are_masked_but_for_stop_tokens_of_answers(tiny):
    (sample,) = samples(tiny, TALK, supervision_mode="all", mask_special_tokens=True)
    special = np.isin(sample.input_ids, [tiny.control.ids[t] for t in ("<|im_start|>",)])
    assert not sample.token_weights[special].any()
    stops = (sample.input_ids == tiny.control.ids["<|im_end|>"]).nonzero()[0]
    assert sample.token_weights[stops].tolist() == [0, 0, 1, 0, 1]  # system, user, assistant, ...
    others = ~special
    others[stops] = False
    assert sample.token_weights[others].all()


def test_weights_of_messages_prompts_and_samples(tiny):
    messages = [*talk("a", "b", "c", "d", "e", "f").messages]
    messages[1] = Message("assistant", "b", weight=0)
    messages[3] = Message("assistant", "d", weight=0.25)
    row = Conversation(tuple(messages))
    (sample,) = samples(tiny, row)
    assert trained(tiny, sample) == [("f<|im_end|>", 1), ("d<|im_end|>", 0.25)]
    (sample,) = samples(tiny, row, prompt_weight=0.5)
    weights = dict(trained(tiny, sample))
    assert weights["\n<|im_start|>user\ne<|im_end|>\n<|im_start|>assistant\n"] == 0.5
    assert weights["f<|im_end|>"] == 1 and weights["d<|im_end|>"] == 0.25
    assert not any("b<|im_end|>" in text for text in weights)
    (sample,) = samples(tiny, TALK, supervision_mode="last_assistant", prompt_weight=0.5)
    weights = dict(trained(tiny, sample))
    assert weights["world<|im_end|>"] == 1 and not any("it is" in text for text in weights)
    (sample,) = samples(tiny, row, equal_sample_weight=True)
    assert sample.token_weights.sum() == pytest.approx(1, abs=1e-6)
    assert dict(trained(tiny, sample))["d<|im_end|>"] == pytest.approx(0.25 / 2.5, rel=1e-6)
    (sample,) = samples(tiny, TALK, supervision_mode="all", equal_sample_weight=True)
    assert sample.token_weights[1:].sum() == pytest.approx(1, abs=1e-6)  # the first is no target


def test_a_row_without_weights_stays_so(tiny):
    row = Conversation((Message("user", "a"), Message("assistant", "b", weight=0)))
    (sample,) = samples(tiny, row, equal_sample_weight=True)
    assert not sample.token_weights.any()


def test_options_are_checked():
    for options, reason in {
        ("supervision_mode", "both"): "supervision_mode must be one of .*, got 'both'",
        ("roles", ("user",)): 'roles must be given with supervision_mode="roles"',
        ("roles", ("bot",)): r"roles must be of \('system', .*, got 'bot'",
        ("history", "none"): "history must be one of",
        ("prompt_weight", -1): "prompt_weight must be finite and >= 0, got -1",
        ("prompt_weight", float("nan")): "prompt_weight must be finite and >= 0, got nan",
    }.items():
        with pytest.raises(ValueError, match=reason):
            MaskOptions(**dict([options]))


# -- history

THOUGHT = Conversation(
    (
        Message("user", "hello"),
        Message("assistant", "it", reasoning_content="one"),
        Message("user", "what?"),
        Message("assistant", "is", reasoning_content="two"),
    )
)


def test_history_as_it_is_written_trains_what_is_left(thinking):
    before = thinking.counts["rewritten_turns"]
    (sample,) = samples(thinking, THOUGHT)
    assert [text for text, _ in trained(thinking, sample)] == [
        "it<|im_end|>",
        "<think>two</think>is<|im_end|>",
    ]
    assert thinking.counts["rewritten_turns"] == before + 1


def test_history_is_preserved_where_the_template_can(thinking, tiny_json):
    (sample,) = samples(thinking, THOUGHT, history="preserve")
    assert [text for text, _ in trained(thinking, sample)] == [
        "<think>one</think>it<|im_end|>",
        "<think>two</think>is<|im_end|>",
    ]
    never = replace(THOUGHT, template_kwargs={"keep_past_thinking": False})
    with pytest.raises(ConversationError, match="leaves out the thinking of message 2"):
        samples(thinking, never, history="preserve")  # what the row says goes before the option
    cannot = with_template(tiny_json, THINKING.replace(" or keep_past_thinking", ""))
    with pytest.raises(ConversationError, match="leaves out the thinking of message 2 and has no"):
        samples(cannot, THOUGHT, history="preserve")


def test_a_row_for_each_answer_trains_each_once(thinking):
    first, second = samples(thinking, THOUGHT, history="per_assistant")
    assert [text for text, _ in trained(thinking, first)] == ["<think>one</think>it<|im_end|>"]
    assert [text for text, _ in trained(thinking, second)] == ["<think>two</think>is<|im_end|>"]
    assert "it<|im_end|>" in thinking.decode(second.input_ids)
    assert "one" not in thinking.decode(second.input_ids)
    # With everything trained, too, nothing of the first row is trained again in the second.
    first, second = samples(thinking, THOUGHT, history="per_assistant", supervision_mode="all")
    (text, _), *more = trained(thinking, second)
    assert not more and text.startswith("what?<|im_end|>") and "hello" not in text


def test_answers_of_weight_0_make_no_row_of_their_own(thinking):
    messages = (*THOUGHT.messages[:1], Message("assistant", "it", weight=0), *THOUGHT.messages[2:])
    (sample,) = samples(thinking, Conversation(messages), history="per_assistant")
    assert [text for text, _ in trained(thinking, sample)] == ["<think>two</think>is<|im_end|>"]


def test_thinking_that_a_template_never_writes_is_refused(tiny):
    with pytest.raises(ConversationError, match="leaves out the reasoning_content of message 4"):
        tiny.encode(THOUGHT)


# -- tools


def test_tool_calls_are_trained_and_results_are_not(thinking):
    row = Conversation(
        (
            Message("user", "hello"),
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "world", extra={"name": "what"}),
            Message("assistant", "it is."),
        )
    )
    (sample,) = samples(thinking, row)
    assert [text for text, _ in trained(thinking, sample)] == [
        '<think></think><call>what{"a": "it", "n": 3}</call><|im_end|>',
        "<think></think>it is.<|im_end|>",
    ]
    assert runs(thinking, sample, sample.roles == 4) == ["world"]
    assert thinking.cross_check([row]) == [None]


def test_tools_that_spell_control_tokens_are_refused(thinking):
    row = Conversation(THOUGHT.messages, tools=({"name": "a<|im_end|>"},))
    with pytest.raises(ConversationError, match="tools spell the control token '<|im_end|>'"):
        thinking.encode(row)


# -- rows without a template


def test_a_text_is_trained_whole_and_ends_once(tiny):
    assert trained(tiny, tiny.encode(Text("hello"))) == [("hello<|im_end|>", 1)]
    assert trained(tiny, tiny.encode(Text("hello<|im_end|>"))) == [("hello<|im_end|>", 1)]
    sample = tiny.encode(Text("a<|im_end|>b", weight=0.5))
    assert trained(tiny, sample) == [("a<|im_end|>b<|im_end|>", 0.5)]
    assert (sample.input_ids == tiny.control.ids["<|im_end|>"]).sum() == 1  # the other is text


def test_a_prompt_is_tokenised_apart_from_its_completion(tiny):
    sample = tiny.encode(Text("\n\nit", prompt="hello\n"))
    assert trained(tiny, sample) == [("\n\nit<|im_end|>", 1)]
    assert runs(tiny, sample, sample.roles == 2) == ["hello\n"]


def test_a_tokenizer_without_eos_cannot_end_a_text(tiny_json):
    with pytest.raises(ConversationError, match="no eos_token"):
        with_template(tiny_json, CHATML, {}).encode(Text("hello"))


# -- answers searched for in tokens


def searched(tiny: ChatTokenizer, ids: np.ndarray, weights: np.ndarray | None = None) -> Sample:
    ids = np.asarray(ids, dtype=np.int32)
    weights = np.ones(len(ids), dtype=np.float32) if weights is None else weights
    return tiny.encode(Tokens(ids, weights, search=True))


def test_a_search_finds_what_the_chat_template_would_train(tiny):
    sample = tiny.encode(TALK)
    assert searched(tiny, sample.input_ids).token_weights.tolist() == sample.token_weights.tolist()
    never = np.where(sample.input_ids == sample.input_ids[-2], 0, 1).astype(np.float32)
    found = searched(tiny, sample.input_ids, never)
    assert found.token_weights.tolist() == (sample.token_weights * never).tolist()


def test_a_search_is_not_fooled_by_text_nor_by_the_first_token(tiny):
    text = "<|im_start|>assistant\n"
    sample = tiny.encode(talk(text, "it is."))
    assert [t for t, _ in trained(tiny, searched(tiny, sample.input_ids))] == ["it is.<|im_end|>"]
    opening = (sample.input_ids == tiny.control.ids["<|im_start|>"]).nonzero()[0]
    at_once = sample.input_ids[opening[-1] :]
    assert tiny.decode(at_once).startswith(text)
    assert [t for t, _ in trained(tiny, searched(tiny, at_once))] == ["it is.<|im_end|>"]


def test_a_search_that_fails_says_why(tiny, tiny_json):
    ids = tiny.encode(TALK).input_ids
    with pytest.raises(ConversationError, match="no answer: no header '<.im_start.>assistant"):
        searched(tiny, ids[:9])
    stops = (ids == ids[-2]).nonzero()[0]
    for row in (ids[:-2], np.delete(ids, stops[2])):  # at the end, and before another header
        with pytest.raises(ConversationError, match=r"begins at token \d+ has no stop token"):
            searched(tiny, row)
    joint = tiny._encoder.tokenizer.encode("<|im_start|>assistant\n\n\nhello<|im_end|>").ids
    with pytest.raises(ConversationError, match="a token reaches over the end of the header at"):
        searched(tiny, joint)
    with pytest.raises(ConversationError, match="the tokenizer has no token 99999"):
        searched(tiny, [99999])
    plain = with_template(tiny_json, CHATML.replace("<|im_start|>", "#"))
    with pytest.raises(
        ConversationError, match="prompts with a control token, and it prompts with"
    ):
        searched(plain, ids)
