"""Conversations on disk: JSON lines in, JSON lines out, one row at a time.

Two shapes are read: ``{"messages": [{"role", "content"}, ...]}`` and ShareGPT's
``{"conversations": [{"from", "value"}, ...]}``. What cannot be trained as it stands is refused by
file, row and reason; nothing is mended or dropped on the way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.sample import ROLES
from varlen_sft.errors import InputError

MESSAGE_ROLES = ROLES[1:]
_MESSAGES = {role: role for role in MESSAGE_ROLES}
_SHAREGPT = {**_MESSAGES, "human": "user", "gpt": "assistant"}

# Row fields that change what a template renders. Ignoring one would train another text than the
# author meant, so a row that carries one is refused until it is supported.
_RENDERED_FIELDS = ("system", "tools", "documents", "chat_template_kwargs")


class ConversationError(ValueError):
    """A conversation that cannot be used; the reason only, whoever reads it knows file and row."""


@dataclass(frozen=True)
class Message:
    """One message. ``role`` is one of system, user, assistant, tool."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then user and assistant in turn, ending with the assistant.

    Raises:
        ConversationError: another order of roles, an unknown role, content that is not text.
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        for number, message in enumerate(self.messages, 1):
            _check_message(number, message)
        _check_order([message.role for message in self.messages])


def _check_message(number: int, message: Message) -> None:
    if message.role not in MESSAGE_ROLES:
        raise _unknown_role(number, message.role, MESSAGE_ROLES)
    if not isinstance(message.content, str):
        raise ConversationError(
            f"the content of message {number} must be a string, got {_kind(message.content)}"
        )
    try:
        message.content.encode()
    except UnicodeEncodeError as error:
        raise ConversationError(
            f"the content of message {number} has a lone surrogate at character {error.start}"
        ) from None


def _check_order(roles: list[str]) -> None:
    if not roles:
        raise ConversationError("the conversation is empty")
    if "assistant" not in roles:
        raise ConversationError("no assistant message, so nothing to train: " + ", ".join(roles))
    turns = roles[1:] if roles[0] == "system" else roles
    for position, role in enumerate(turns):
        wanted = ("user", "assistant")[position % 2]
        if role != wanted:
            number = position + 1 + len(roles) - len(turns)
            raise ConversationError(
                "roles must be an optional system, then user and assistant in turn: "
                f"message {number} must be {wanted}, found {role}"
            )
    if turns[-1] != "assistant":
        raise ConversationError(
            f"a conversation must end with assistant: message {len(roles)}, the last, "
            f"is {turns[-1]}"
        )


def read_conversations(path: str | os.PathLike[str]) -> Iterator[tuple[int, Conversation]]:
    """Stream ``(row, conversation)`` from a JSON lines file, one row in memory at a time.

    ``row`` is the 1-based physical line. The file is UTF-8, a byte order mark is tolerated, blank
    lines are skipped. Whether the file can be opened is checked at once, before the first row.

    Raises:
        InputError: with file and row: not a file, not JSON, not a conversation (see Conversation).
    """
    path = Path(path)
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(_cannot_open(path, error), file=path) from None
    return _rows(path)


def write_conversations(
    path: str | os.PathLike[str], conversations: Iterable[Conversation]
) -> None:
    """Write ``{"messages": ...}`` rows; the file appears whole or, on an error, not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for conversation in conversations:
                messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):  # it is gone after a replace that worked
            part.unlink()


def _cannot_open(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, IsADirectoryError):
        return "is a folder, expected a JSON lines file"
    return f"cannot be read: {error.strerror}"


def _rows(path: Path) -> Iterator[tuple[int, Conversation]]:
    # Binary lines end at \n only; text mode would also count a lone \r as the end of a row.
    with path.open("rb") as file:
        for row, line in enumerate(file, 1):
            if row == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                conversation = _conversation(_parse(line))
            except ConversationError as error:
                raise InputError(str(error), file=path, row=row) from None
            yield row, conversation


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ConversationError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise ConversationError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (RecursionError, ValueError) as error:  # nested too deep; a number of 5000 digits
        raise ConversationError(f"not JSON that can be read: {error}") from None


def _conversation(row: object) -> Conversation:
    if not isinstance(row, dict):
        raise ConversationError(f"expected a JSON object, got {_kind(row)}")
    keys = [key for key in ("messages", "conversations") if key in row]
    if len(keys) != 1:
        found = ", ".join(map(repr, row)) or "none"
        raise ConversationError(
            f"expected either the key 'messages' or the key 'conversations', found {found}"
        )
    for field in _RENDERED_FIELDS:
        if row.get(field):
            raise ConversationError(f"the field {field!r} is not supported yet")
    messages = row[keys[0]]
    if not isinstance(messages, list):
        raise ConversationError(f"{keys[0]!r} must be a list, got {_kind(messages)}")
    read = _sharegpt_message if keys[0] == "conversations" else _message
    return Conversation(tuple(read(number, item) for number, item in enumerate(messages, 1)))


def _message(number: int, item: object) -> Message:
    role, content = _fields(number, item, "role", "content")
    return Message(_role(number, role, _MESSAGES), content)


def _sharegpt_message(number: int, item: object) -> Message:
    speaker, value = _fields(number, item, "from", "value")
    return Message(_role(number, speaker, _SHAREGPT), value)


def _fields(number: int, item: object, role: str, content: str) -> tuple[Any, Any]:
    if not isinstance(item, dict):
        raise ConversationError(f"message {number} must be an object, got {_kind(item)}")
    for key in (role, content):
        if key not in item:
            raise ConversationError(f"message {number} has no {key!r}")
    # tool_calls, reasoning_content, weight, ... all change what should be trained.
    extra = [key for key in item if key not in (role, content) and item[key] is not None]
    if extra:
        raise ConversationError(
            f"message {number} has {extra[0]!r}, which is not supported yet "
            f"(only {role!r} and {content!r} are)"
        )
    return item[role], item[content]


def _role(number: int, role: object, known: dict[str, str]) -> str:
    if not isinstance(role, str) or role not in known:
        raise _unknown_role(number, role, known)
    return known[role]


def _unknown_role(number: int, role: object, known: Iterable[str]) -> ConversationError:
    return ConversationError(
        f"message {number} has the unknown role {role!r}, known are {', '.join(known)}"
    )


def _kind(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")
