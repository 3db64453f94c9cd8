"""One row of a data set, as people publish them, becomes a conversation, a text, or tokens.

What a row is, its keys say. The first of these that it has decides, and the others are taken for
copies of it, as data sets often keep both:

1. ``input_ids`` with ``labels``, ``loss_mask`` or ``assistant_masks``: see ``tokens.read_tokens``.
2. ``messages`` or ``conversations``: OpenAI's and ShareGPT's messages, see
   ``messages.read_messages``. SlimOrca and Magpie are such.
3. ``prompt`` and ``completion``: two texts, or two lists of messages, of which only the second is
   trained.
4. ``instruction``, ``input`` (or ``context``) and ``output`` (or ``response``), with ``history``:
   Alpaca. The question is instruction and input with a blank line between them.
5. ``text``: a document, trained from its first token through the stop token after it.

A conversation may come with ``tools``, ``chat_template_kwargs``, ``system`` (or ``system_prompt``,
for its first message) and ``weight``, which multiplies the weights of its messages.

Any other column is metadata (id, source, score, ...) and ignored, since no template sees it. Not so
REFUSED, which hold something the model would see or be trained on, and what belongs to another kind
of row (tools beside a text, labels beside messages): those are refused unless they are empty. What
cannot be trained as it stands is refused with a reason; nothing is mended or dropped on the way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from varlen_sft.data.conversation import (
    MESSAGE_ROLES,
    Conversation,
    ConversationError,
    Message,
    Row,
    Text,
    Tokens,
    check_text,
    kind_of,
)
from varlen_sft.data.messages import (
    alpaca_messages,
    as_float,
    is_empty,
    one_text,
    prompt_messages,
    read_messages,
)
from varlen_sft.data.readers import read_dicts
from varlen_sft.data.tokens import MASKS, read_tokens
from varlen_sft.data.tool_calls import read_template_kwargs, read_tools
from varlen_sft.errors import InputError

__all__ = [
    "MESSAGE_ROLES",
    "Conversation",
    "ConversationError",
    "Message",
    "Row",
    "Text",
    "Tokens",
    "parse_row",
    "read_conversations",
    "write_conversations",
]

MODES = ("sft", "pretrain", "search")
_MEDIA = frozenset("image images pixel_values video videos audio audios train".split())
REFUSED = _MEDIA.union("documents functions enable_thinking chat_template".split())
"""Columns that change what the model sees or is trained on, and are not supported."""

_OF_CONVERSATIONS = ("tools", "chat_template_kwargs", "system", "system_prompt")
_OF_TOKENS = (*MASKS, "mask_token_ids", "mask_spans")


def parse_row(row: object, *, mode: str | None = None, mask_token_ids: Sequence[int] = ()) -> Row:
    """The Row that a row of a data set stands for; see the top of this module.

    Args:
        row: what a reader gives, a JSON object.
        mode: ``"sft"`` refuses rows that do not say which part of them is trained, ``"pretrain"``
            trains every token and refuses rows that say otherwise; None leaves it to the row.
        mask_token_ids: ids never trained, for rows of ``input_ids``.

    Raises:
        ConversationError: the row cannot be used, and why.
        ValueError: an unknown mode.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"mode must be one of {MODES} or None, got {mode!r}")
    if not isinstance(row, Mapping):
        raise ConversationError(f"expected a JSON object, got {kind_of(row)}")
    fields = {key: value for key, value in row.items() if value is not None}
    try:
        if "input_ids" in fields:
            _refuse(fields, _MEDIA)  # the rest was rendered when the ids were made
            return _scaled(read_tokens(fields, mode, mask_token_ids), fields)
        if len(mask_token_ids):
            raise ConversationError("mask_token_ids is for rows of 'input_ids', this has none")
        return _scaled(_untokenised(fields, mode), fields)
    except RecursionError:
        raise ConversationError("the row is nested too deeply") from None


def read_conversations(path: str | os.PathLike[str]) -> Iterator[tuple[int, Conversation]]:
    """Stream ``(row, conversation)`` from a file or folder, a few rows in memory at a time.

    What is read and how rows are numbered says ``readers.read_dicts``; it is opened at once, before
    the first row. Other rows than conversations, and other sources, are read by
    ``sources.read_rows``.

    Raises:
        InputError: with file and row, at the first row that is not a conversation (parse_row).
    """
    return _conversations(path, read_dicts(path))


def write_conversations(
    path: str | os.PathLike[str], conversations: Iterable[Conversation]
) -> None:
    """Write ``{"messages": ...}`` rows; the file appears whole or, on an error, not at all."""
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for conversation in conversations:
                file.write(json.dumps(_as_row(conversation), ensure_ascii=False) + "\n")
        os.replace(part, path)
    finally:
        with suppress(FileNotFoundError):  # it is gone after a replace that worked
            part.unlink()


def _conversations(
    path: str | os.PathLike[str], rows: Iterable[tuple[int, Any]]
) -> Iterator[tuple[int, Conversation]]:
    for number, row in rows:
        try:
            if isinstance(row, ConversationError):
                raise row
            conversation = parse_row(row)
            if not isinstance(conversation, Conversation):
                kind = type(conversation).__name__.lower()
                raise ConversationError(f"expected a conversation, the row is {kind}")
        except ConversationError as error:
            raise InputError(str(error), file=path, row=number) from None
        yield number, conversation


def _as_row(conversation: Conversation) -> dict[str, Any]:
    row: dict[str, Any] = {"messages": [_as_item(m) for m in conversation.messages]}
    if conversation.tools:
        row["tools"] = conversation.tools
    if conversation.template_kwargs:
        row["chat_template_kwargs"] = conversation.template_kwargs
    return row


def _as_item(message: Message) -> dict[str, Any]:
    item: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
    if message.reasoning_content is not None:
        item["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        item["tool_calls"] = message.tool_calls
    if message.weight != 1:
        item["weight"] = message.weight
    return item


def _untokenised(fields: Mapping[str, Any], mode: str | None) -> Conversation | Text:
    if mode == "search":
        raise ConversationError("'search:' is for rows of 'input_ids', this has none")
    _refuse(fields, REFUSED.union(_OF_TOKENS))
    messages = _messages(fields)
    if messages is not None:
        if mode == "pretrain":
            raise ConversationError(
                "the row is a conversation, and the source is 'pretrain:', which is for texts and "
                "tokens (supervision_mode='all' trains whole conversations)"
            )
        return _conversation(messages, fields)
    _refuse(fields, _OF_CONVERSATIONS)
    if "prompt" in fields and "completion" in fields:
        for name in ("prompt", "completion"):
            check_text(f"the {name}", fields[name])
        if mode == "pretrain":
            return Text(fields["prompt"] + fields["completion"])
        return Text(fields["completion"], fields["prompt"])
    if "text" not in fields:
        raise ConversationError(
            "expected 'input_ids', 'messages', 'conversations', 'prompt' and 'completion', "
            "'instruction' and 'output', or 'text', found "
            + (", ".join(map(repr, fields)) or "none")
        )
    if mode == "sft":
        raise ConversationError(
            "the row is plain text, of which every token would be trained, and the source is 'sft:'"
        )
    check_text("the text", fields["text"])
    return Text(fields["text"])


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...] | None:
    """The messages of a row that is a conversation, None of one that is not."""
    keys = [key for key in ("messages", "conversations") if key in fields]
    if len(keys) == 2:
        raise ConversationError("the row has 'messages' and 'conversations', which of them counts?")
    if keys:
        return read_messages(fields[keys[0]], keys[0])
    if "prompt" in fields and "completion" in fields:
        return prompt_messages(fields["prompt"], fields["completion"])
    if "instruction" in fields and ("output" in fields or "response" in fields):
        return alpaca_messages(fields)
    return None


def _conversation(messages: tuple[Message, ...], fields: Mapping[str, Any]) -> Conversation:
    system = one_text(fields, "system", "system_prompt")
    if system and (not messages or messages[0].role != "system"):
        weight = messages[0].weight if messages and "completion" in fields else 1.0
        messages = (Message("system", system, weight=weight), *messages)
    elif system and messages[0].content != system:
        raise ConversationError("the row has 'system', and its first message is another one")
    tools = read_tools(fields["tools"]) if fields.get("tools") else None
    kwargs = read_template_kwargs(fields.get("chat_template_kwargs") or {})
    return Conversation(messages, tools, kwargs)


def _scaled(row: Any, fields: Mapping[str, Any]) -> Any:
    """The row with its weights times the row's own weight."""
    if "weight" not in fields:
        return row
    weight = as_float("the weight of the row", fields["weight"])
    if isinstance(row, Text):
        return replace(row, weight=weight)
    if isinstance(row, Tokens):
        return replace(row, token_weights=(row.token_weights * weight).astype("float32"))
    return replace(row, messages=tuple(replace(m, weight=m.weight * weight) for m in row.messages))


def _refuse(fields: Mapping[str, Any], names: Collection[str]) -> None:
    for name, value in fields.items():
        if name in names and not is_empty(value):
            raise ConversationError(f"the field {name!r} is not supported in such a row")
