"""Small conversations on which ``varlen-sft doctor`` tries a template, and what became of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.layout import prefix_of
from varlen_sft.data.marks import Placed, place, render
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import Sample
from varlen_sft.data.template import ChatTemplate
from varlen_sft.data.turn_text import TurnText

__all__ = [
    "BASIC",
    "Probe",
    "Subject",
    "Turn",
    "probes",
    "stop_tokens",
    "thought_of",
    "turns",
    "whole",
]

BASIC = ("plain", "multi-turn", "whitespace", "unicode")
"""Probes that every template of a chat model has to write; it may refuse others in good faith."""

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
CALL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 20, "b": 22}},
}


@dataclass(frozen=True)
class Probe:
    """One conversation: its samples, or why there are none, and what a second way to place says."""

    name: str
    conversation: Conversation
    outcome: tuple[Sample, ...] | ConversationError
    disagreement: ConversationError | None
    counts: Mapping[str, int]  # ``ChatTokenizer.counts`` of it alone

    @property
    def samples(self) -> tuple[Sample, ...]:
        return () if isinstance(self.outcome, ConversationError) else self.outcome


@dataclass(frozen=True)
class Subject:
    """What is examined.

    Args:
        tokenizer: with the template as it is.
        untagged: with the template's generation tags ignored, so that tags that are wrong do not
            hide what else is; the same tokenizer where the template has none.
    """

    tokenizer: ChatTokenizer
    untagged: ChatTokenizer
    options: MaskOptions

    @property
    def template(self) -> ChatTemplate:
        return self.tokenizer.template

    @cached_property
    def turns(self) -> TurnText:
        return TurnText(self.template, self.tokenizer.control.pattern)

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        return tuple(self._probed(*named) for named in probes(self.tokenizer).items())

    def conversation(self, name: str) -> Conversation:
        """That of a probe."""
        return next(probe.conversation for probe in self.probes if probe.name == name)

    def _probed(self, name: str, conversation: Conversation) -> Probe:
        before = self.untagged.counts.copy()
        (outcome,) = self.untagged.encode_rows([conversation], self.options)
        (found,) = self.untagged.cross_check([conversation], self.options)
        return Probe(name, conversation, outcome, found, self.untagged.counts - before)


def probes(tokenizer: ChatTokenizer) -> dict[str, Conversation]:
    """The conversations by name."""
    control = sorted(tokenizer.control.special, key=lambda token: tokenizer.control.ids[token])
    stops = [token for token in stop_tokens(tokenizer) if token in tokenizer.control.special]
    spelled = " ".join(dict.fromkeys([*stops, *control[:8]]))
    alternating = {
        "plain": ("What is 6 x 7?", "It is 42."),
        "multi-turn": ("One plus one?", "Two.", "Plus three?", "Five.", "Plus five?", "Ten."),
        "whitespace": ("Write.", "\n\nlines", "Again.", "  spaces", "Again.", "end \n"),
        "empty answer": ("Say nothing.", "", "Say something.", "Something."),
        "unicode": ("\u00bfQu\u00e9?", "\u00c9l 🤖 \u6f22\u5b57 e\u0301", "🦙", "🦙🏽\u200d🔧"),
        "control text": (f"What is {spelled} for?", "It ends a turn."),
    }
    told = {name: _talk(*contents) for name, contents in alternating.items()}
    system = Message("system", "Be brief.")
    told["system"] = Conversation((system, *told["plain"].messages))
    told["thinking"] = _thinking(told["multi-turn"])
    told["thinking in text"] = _talk(
        *(
            f"<think>\n{thought_of(m)}\n</think>\n\n{m.content}" if thought_of(m) else m.content
            for m in told["thinking"].messages
        )
    )
    told["tools"] = _tools()
    return told


def stop_tokens(tokenizer: ChatTokenizer) -> list[str]:
    """Where generation with this model ends: ``eos_token`` and those of its configuration."""
    eos = tokenizer.special_tokens.get("eos_token")
    return list(dict.fromkeys([*([eos] if eos else []), *tokenizer.template.stop_tokens]))


def _talk(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(tuple(Message(roles[k % 2], text) for k, text in enumerate(contents)))


def _thinking(talk: Conversation) -> Conversation:
    """Each answer with a thought of its own."""
    messages = [
        replace(message, reasoning_content=f"I count up to {message.content}")
        if message.role == "assistant"
        else message
        for message in talk.messages
    ]
    return Conversation(tuple(messages))


def thought_of(message: Message) -> str:
    """What the assistant thought, which data hold in a field of its own or in the content."""
    if message.reasoning_content is not None:
        return message.reasoning_content
    before, closing, _ = message.content.partition("</think>")
    return before.removeprefix("<think>").strip() if closing else ""


def _tools() -> Conversation:
    return Conversation(
        (
            Message("user", "How much is 20 and 22?"),
            Message("assistant", tool_calls=(CALL,)),
            Message("tool", "forty-two", extra={"name": "add"}),
            Message("assistant", "It is 42."),
            Message("user", "Thank you."),
            Message("assistant", "You are welcome."),
        ),
        tools=(TOOL,),
    )


# ------------------------------------------------------------- turns as renders


@dataclass(frozen=True)
class Turn:
    """One answer when it is the last: what was there before it, and what the template made of it.

    Attributes:
        number: of its message, from 1.
        prompt: what the model is given, the generation prompt at its end.
        bare: the same without a generation prompt.
        alone: the conversation through this answer.
    """

    number: int
    prompt: str
    bare: str
    alone: Placed

    @property
    def injected(self) -> str | None:
        """The template's text between prompt and answer; None if the prompt is no prefix."""
        if not self.alone.text.startswith(self.prompt):
            return None
        here = self.alone.places[-1]
        return self.alone.text[len(self.prompt) : here.first] if here.owned else ""


def turns(template: ChatTemplate, conversation: Conversation) -> Iterator[Turn]:
    """Each answer in its place; nothing for a conversation that the template does not write."""
    if whole(template, conversation) is None:
        return
    for i, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        before = conversation.messages[:i]
        try:
            prompt = render(template, before, conversation, True)
            bare = render(template, before, conversation)
            yield Turn(i + 1, prompt, bare, place(template, prefix_of(conversation, i + 1)))
        except ConversationError:
            return


def whole(template: ChatTemplate, conversation: Conversation) -> Placed | None:
    """The render of all messages, None where the template refuses."""
    try:
        return place(template, conversation)
    except ConversationError:
        return None
