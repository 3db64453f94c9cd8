"""What one row of a data set can be: a conversation, a text, or tokens made elsewhere.

Rows are checked when they are made, so that whoever holds one can rely on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from varlen_sft.data.sample import ROLES

__all__ = ["Conversation", "ConversationError", "Message", "Row", "Text", "Tokens"]

MESSAGE_ROLES = ROLES[1:]


class ConversationError(ValueError):
    """A row that cannot be used; the reason only, whoever reads it knows file and row."""


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        role: one of system, user, assistant, tool.
        content: its text; empty where there is none, as in a message of tool calls alone.
        reasoning_content: what the assistant thought before it answered.
        tool_calls: each as OpenAI writes them, ``{"type": "function", "function": {"name": ...,
            "arguments": {...}}}``.
        extra: other fields that templates read, such as ``name`` and ``tool_call_id``.
        weight: how much the tokens of this message count as targets, if its role is trained at all.
    """

    role: str
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    weight: float = 1.0


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then turns, ending with the assistant.

    A turn is one user message and the assistant's answer; an answer may be followed by tool
    messages and another answer.

    Args:
        messages: in their order.
        tools: schemas of the functions that the assistant may call, or None.
        template_kwargs: variables for the chat template, such as ``enable_thinking``.

    Raises:
        ConversationError: another order of roles, an unknown role, content that is not text, a
            weight that is negative or not finite.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = field(default=None, hash=False)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for number, message in enumerate(self.messages, 1):
            _check_message(number, message)
        _check_order([message.role for message in self.messages])


@dataclass(frozen=True)
class Text:
    """A document, or a prompt and its completion, without a chat template.

    Every token of ``completion`` is trained, and the stop token after it; none of ``prompt``.

    Raises:
        ConversationError: both are empty, or not UTF-8.
    """

    completion: str
    prompt: str = ""
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.prompt and not self.completion:
            raise ConversationError("the text is empty")
        for name in ("prompt", "completion"):
            check_text(f"the {name}", getattr(self, name))
        _check_weight("the weight", self.weight)


@dataclass(frozen=True)
class Tokens:
    """Tokens made elsewhere.

    Args:
        input_ids: (L,) int32.
        token_weights: (L,) float32, how much token i counts as a target.
        search: only tokens of answers do, which are yet to be found (``data.search``).

    Raises:
        ConversationError: other shapes, a negative id, a weight that is negative or not finite.
    """

    input_ids: np.ndarray
    token_weights: np.ndarray
    search: bool = False

    def __post_init__(self) -> None:
        ids, weights = self.input_ids, self.token_weights
        if ids.ndim != 1 or ids.shape != weights.shape:
            raise ConversationError(
                f"input_ids have shape {ids.shape}, their weights {weights.shape}"
            )
        if len(ids) and int(ids.min()) < 0:
            raise ConversationError(f"token {int(ids.argmin())} has the negative id {ids.min()}")
        bad = ~np.isfinite(weights) | (weights < 0)
        if bad.any():
            at = int(bad.argmax())
            raise ConversationError(
                f"the weight of token {at} must be finite and not negative, got {weights[at]}"
            )


Row: TypeAlias = Conversation | Text | Tokens


def _check_message(number: int, message: Message) -> None:
    if message.role not in MESSAGE_ROLES:
        raise ConversationError(
            f"message {number} has the unknown role {message.role!r}, known are "
            + ", ".join(MESSAGE_ROLES)
        )
    check_text(f"the content of message {number}", message.content)
    if message.reasoning_content is not None:
        check_text(f"the reasoning_content of message {number}", message.reasoning_content)
    if message.role != "assistant" and (
        message.tool_calls or message.reasoning_content is not None
    ):
        name = "tool_calls" if message.reasoning_content is None else "reasoning_content"
        raise ConversationError(f"message {number} is from {message.role} and has {name!r}")
    for text in strings_in(message.tool_calls) if message.tool_calls else ():
        check_text(f"a string in the tool calls of message {number}", text)
    _check_weight(f"the weight of message {number}", message.weight)


def check_text(name: str, text: object) -> None:
    """Raise ConversationError unless text is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise ConversationError(f"{name} must be a string, got {kind_of(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(f"{name} has a lone surrogate at character {error.start}") from None


def _check_weight(name: str, weight: object) -> None:
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:  # type: ignore[arg-type, operator]
        raise ConversationError(f"{name} must be finite and not negative, got {weight!r}")


def _check_order(roles: list[str]) -> None:
    if not roles:
        raise ConversationError("the conversation is empty")
    if "assistant" not in roles:
        raise ConversationError("no assistant message, so nothing to train: " + ", ".join(roles))
    first = 1 if roles[0] == "system" else 0
    before = "start"
    for number, role in enumerate(roles[first:], 1 + first):
        if role not in _FOLLOWERS[before]:
            raise ConversationError(
                "roles must be an optional system, then user and assistant in turn: message "
                f"{number} must be {' or '.join(_FOLLOWERS[before])}, found {role}"
            )
        before = role
    if roles[-1] != "assistant":
        raise ConversationError(
            f"a conversation must end with assistant: message {len(roles)}, the last, "
            f"is {roles[-1]}"
        )


_FOLLOWERS = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def strings_in(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from strings_in(list(value))
        yield from strings_in(list(value.values()))
    elif isinstance(value, Iterable):
        for item in value:
            yield from strings_in(item)


def kind_of(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
