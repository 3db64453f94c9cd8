"""A list of messages as data sets write it: roles, content, reasoning, tool calls, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from varlen_sft.data.conversation import (
    MESSAGE_ROLES,
    ConversationError,
    Message,
    check_text,
    kind_of,
)
from varlen_sft.data.tool_calls import read_tool_calls

ROLE_NAMES = {role: role for role in MESSAGE_ROLES} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
}
"""What data sets call the four roles; the content of a function_call is JSON: its tool calls."""

METADATA = frozenset(
    "id message_id uuid timestamp created_at date lang language model source score url "
    "num_tokens token_count".split()
)
"""Keys of a message that say something about it; no template reads them, and they are ignored."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
_EXTRA = ("name", "tool_call_id")
_KNOWN = {*METADATA, *_REASONING, *_EXTRA, "tool_calls", "weight", "train"}


def read_messages(items: object, name: str, first: int = 1) -> tuple[Message, ...]:
    """Messages from ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``.

    A template is given whole messages and may read any key of them, so a key that is neither used
    here nor in METADATA is refused, unless it is empty. Used are: ``content``, a string or a list
    of text parts, null where there are tool calls; ``reasoning_content``, also called
    ``reasoning`` or ``thinking``; ``tool_calls`` (see ``tool_calls.read_tool_calls``); ``name`` and
    ``tool_call_id``; ``weight``, a number, and ``train``, false for weight 0.

    Args:
        items: the list.
        name: the list's name, for errors.
        first: the number of its first message, for errors.

    Raises:
        ConversationError: not a list of such messages; says which message and why.
    """
    if not isinstance(items, (list, tuple)):
        raise ConversationError(f"{name!r} must be a list, got {kind_of(items)}")
    return tuple(_message(f"message {number}", item) for number, item in enumerate(items, first))


def prompt_messages(prompt: object, completion: object) -> tuple[Message, ...] | None:
    """Both lists of messages in a row, those of the prompt with weight 0; None for two strings.

    Raises:
        ConversationError: one is a string and the other is not, or not messages.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return None
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ConversationError(
            "prompt and completion must both be strings or both be lists of messages, got "
            f"{kind_of(prompt)} and {kind_of(completion)}"
        )
    asked = [replace(m, weight=0.0) for m in read_messages(prompt, "prompt")]
    return (*asked, *read_messages(completion, "completion", len(asked) + 1))


def alpaca_messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """Instruction and input, with a blank line between, as the user; the output answers them.

    Raises:
        ConversationError: a field is not text, or two names of one field differ.
    """
    given = one_text(fields, "input", "context")
    question = [text for text in (one_text(fields, "instruction"), given) if text.strip()]
    history = fields.get("history", [])
    if not isinstance(history, (list, tuple)):
        raise ConversationError(f"'history' must be a list of pairs, got {kind_of(history)}")
    messages = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ConversationError(f"turn {number} of 'history' must be a pair of texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    answer = one_text(fields, "output", "response")
    return (*messages, Message("user", "\n\n".join(question)), Message("assistant", answer))


def one_text(fields: Mapping[str, Any], *names: str) -> str:
    """The text under one of several names of the same thing, "" if there is none."""
    found = [name for name in names if fields.get(name, "") != ""]
    for name in found:
        check_text(f"the {name}", fields[name])
        if fields[name] != fields[found[0]]:
            raise ConversationError(f"the row has {found[0]!r} and {name!r}, and they differ")
    return fields[found[0]] if found else ""


def as_float(name: str, value: object) -> float:
    """A JSON number as a float, infinite if it is too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConversationError(f"{name} must be a number, got {kind_of(value)}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _message(where: str, item: object) -> Message:
    if not isinstance(item, Mapping):
        raise ConversationError(f"{where} must be an object, got {kind_of(item)}")
    sharegpt = item.get("role") is None and "from" in item
    speaker, said = ("from", "value") if sharegpt else ("role", "content")
    if speaker not in item:
        raise ConversationError(f"{where} has neither 'role' nor 'from'")
    if len(item) == 2 and isinstance(item.get(said), str) and item[speaker] != "function_call":
        return Message(_role(where, item[speaker]), item[said])  # most are so plain
    fields = {key: value for key, value in item.items() if value is not None}
    _check_keys(where, fields, {speaker, said, *_KNOWN})
    role = _role(where, item[speaker])
    if item[speaker] == "function_call":
        fields["tool_calls"] = _function_call(where, fields, said)
    calls = fields.get("tool_calls")
    tool_calls = read_tool_calls(where, calls) if calls else ()
    if said not in item and not tool_calls:
        raise ConversationError(f"{where} has no {said!r}")
    return Message(
        role,
        _content(where, fields.get(said, "" if tool_calls else None)),
        reasoning_content=_reasoning(where, role, fields),
        tool_calls=tool_calls,
        extra=_extra(where, fields),
        weight=_weight(where, fields),
    )


def _check_keys(where: str, fields: Mapping[str, Any], known: set[str]) -> None:
    for key, value in fields.items():
        if key not in known and not is_empty(value):
            raise ConversationError(
                f"{where} has {key!r}, which is not supported, and a template may read it: a "
                "sample_processor can remove or translate it"
            )


def is_empty(value: object) -> bool:
    """Whether a value is what data sets write for nothing."""
    return isinstance(value, (str, list, tuple, Mapping)) and not value


def _role(where: str, role: object) -> str:
    if not isinstance(role, str) or role not in ROLE_NAMES:
        raise ConversationError(
            f"{where} has the unknown role {role!r}, known are {', '.join(ROLE_NAMES)}"
        )
    return ROLE_NAMES[role]


def _function_call(where: str, fields: dict[str, Any], said: str) -> object:
    if fields.get("tool_calls"):
        raise ConversationError(f"{where} has the role function_call and 'tool_calls' as well")
    calls = fields.pop(said, None)
    if not calls:
        raise ConversationError(f"{where} has the role function_call, and its {said!r} is empty")
    return calls


def _content(where: str, content: object) -> str:
    if isinstance(content, (list, tuple)):
        return "".join(_part(where, n, part) for n, part in enumerate(content, 1))
    check_text(f"the content of {where}", content)
    return str(content)


def _part(where: str, place: int, part: object) -> str:
    name = f"part {place} of the content of {where}"
    if not isinstance(part, Mapping):
        raise ConversationError(f"{name} must be an object, got {kind_of(part)}")
    kind = part.get("type")
    if kind != "text":
        raise ConversationError(f"{name} is of the type {kind!r}, only 'text' is supported")
    check_text(name, part.get("text"))
    return str(part["text"])


def _reasoning(where: str, role: str, fields: Mapping[str, Any]) -> str | None:
    found = [name for name in _REASONING if name in fields]
    if role != "assistant":  # columns that are "" where a message has none
        found = [name for name in found if fields[name] != ""]
    for name in found:
        check_text(f"the {name} of {where}", fields[name])
        if fields[name] != fields[found[0]]:
            raise ConversationError(f"{where} has {found[0]!r} and {name!r}, and they differ")
    return fields[found[0]] if found else None


def _extra(where: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = {name: fields[name] for name in _EXTRA if fields.get(name, "") != ""}
    for name, value in extra.items():
        check_text(f"the {name} of {where}", value)
    return extra


def _weight(where: str, fields: Mapping[str, Any]) -> float:
    train = fields.get("train", True)
    if not isinstance(train, bool):
        raise ConversationError(f"the train of {where} must be true or false, got {kind_of(train)}")
    if "weight" not in fields:
        return float(train)
    weight = as_float(f"the weight of {where}", fields["weight"])
    if "train" in fields and train != (weight != 0):
        raise ConversationError(
            f"{where} has 'train' {str(train).lower()} and 'weight' {fields['weight']}"
        )
    return weight
