"""Contents as the tokenizer's normalizer writes them, which it would do to them anyway."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from varlen_sft.data.conversation import Conversation, Message


def normalised(conversation: Conversation, normalizer: Any) -> Conversation:
    """The conversation with every string normalised (NFC, say); None changes nothing.

    Done before the render, so that places in the text are places in what is tokenised.
    """
    if normalizer is None:
        return conversation
    change = normalizer.normalize_str
    return replace(conversation, messages=tuple(_mapped(m, change) for m in conversation.messages))


def _mapped(message: Message, change: Callable[[str], str]) -> Message:
    reasoning = message.reasoning_content
    texts = (message.content, reasoning or "", json.dumps(message.tool_calls, ensure_ascii=False))
    if all(text.isascii() for text in texts):
        return message
    return replace(
        message,
        content=change(message.content),
        reasoning_content=None if reasoning is None else change(reasoning),
        tool_calls=tuple(map_strings(call, change) for call in message.tool_calls),
    )


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string value changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return value
