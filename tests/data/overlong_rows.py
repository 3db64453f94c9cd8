"""Small templates that differ in what they write around turns, and conversations to cut."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, Message
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import Fitted, fit_rows
from varlen_sft.data.sample import Sample
from varlen_sft.data.template import ChatTemplate
from varlen_sft.data.turns import Turns

TOKENS = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CALLS = (
    "{% for c in m.tool_calls %}{{ '[' + c.function.name + ']' + c.function.arguments.q }}"
    "{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    + CALLS
    + "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    # Its own system message where there is none.
    "default_system": "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nworld"
    "<|im_end|>\n' }}{% endif %}" + CHATML,
    # A token that closes the whole conversation, and no turn of it.
    "closed": CHATML.replace("{% if add_gen", "{% if not add_generation_prompt %}{{ '<|end|>' }}"
    "{% endif %}{% if add_gen"),
    # The system message stands inside the first user's turn.
    "inside": "{% for m in messages %}{% if m.role in ('user', 'tool') %}{{ '<|im_start|>[' }}"
    "{% if loop.index0 == 1 and messages[0].role == 'system' %}"
    "{{ 'S ' + messages[0].content + ' /S ' }}{% endif %}{{ m.content + ']' }}"
    "{% elif m.role == 'assistant' %}{{ m.content }}" + CALLS + "{{ '<|im_end|>' }}"
    "{% endif %}{% endfor %}",
}  # fmt: skip
# Thinking is written in the last turn only.
THINKING = (
    "{% set ns = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    + CHATML.replace(
        "+ m['content'] }}",
        "}}{% if m.reasoning_content and loop.index0 > ns.user %}{{ '(' + m.reasoning_content "
        "+ ')' }}{% endif %}{{ m['content'] }}",
    )
)


@cache
def tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<|end|>", *TOKENS.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["user assistant system tool hello world what is it? it is.\n\n  é🤖"] * 50
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer.to_str()


@cache
def tokenizer(template: str = "chatml") -> ChatTokenizer:
    source = TEMPLATES.get(template, template)
    return ChatTokenizer(tokenizer_json(), ChatTemplate(source, TOKENS))


def talk(*contents: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    for k, content in enumerate(contents):
        messages.append(Message(("user", "assistant")[k % 2], content))
    return Conversation(tuple(messages))


def calling(argument: str, **fields) -> Message:
    call = {"type": "function", "function": {"name": "f", "arguments": {"q": argument}}}
    return Message("assistant", tool_calls=(call,), **fields)


TALK = talk("hello", "it is.", "what?", "world", "is it", "x", system="world")


WORDS = st.lists(
    st.sampled_from(["hello", " world", "it is.", "\n", "é", " 🤖", "x", " "]), max_size=6
).map("".join)


@st.composite
def conversations(draw: st.DrawFn, weights: bool = False) -> Conversation:
    """Up to six turns, some with tool calls and their results."""
    system = draw(st.sampled_from([None, "hello", "world it is."]))
    messages = [] if system is None else [Message("system", system)]
    for turn in range(draw(st.integers(1, 6))):
        messages.append(Message("user", f"q{turn}" + draw(WORDS)))
        weight = st.sampled_from([0.0, 0.5, 1.0]) if weights else st.just(1.0)
        for step in range(max(0, draw(st.integers(-3, 3)))):
            messages.append(calling(f"c{turn}{step}", weight=draw(weight)))
            for _ in range(draw(st.integers(1, 2))):
                messages.append(Message("tool", f"r{turn}" + draw(WORDS)))
        messages.append(Message("assistant", f"a{turn}" + draw(WORDS), weight=draw(weight)))
    return Conversation(tuple(messages))


def trained(tokenizer: ChatTokenizer, sample: Sample) -> list[str]:
    """The text of every unbroken run of trained tokens."""
    chosen = (sample.token_weights > 0).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], chosen, [0]])))
    return [
        tokenizer.decode(sample.input_ids[a:b])
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def targets(*samples: Sample) -> list[int]:
    """The ids of all targets, in their order."""
    return [
        int(token)
        for sample in samples
        for token in sample.input_ids[1:][sample.token_weights[1:] > 0]
    ]


ANSWERS = MaskOptions()
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


def longest(
    conversation: Conversation, limit: int, template: str = "chatml"
) -> Conversation | None:
    """Its first messages, as many as fit and end with a trained answer."""
    for end in range(len(conversation.messages), 0, -1):
        last = conversation.messages[end - 1]
        if last.role == "assistant" and last.weight:
            part = replace(conversation, messages=conversation.messages[:end])
            if rows_of(part, template) <= limit:
                return part
    return None


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
