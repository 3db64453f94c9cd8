"""Where the strings of a conversation land in its render, seen by marking them.

Every string that a message owns gets a private-use character of its own before it and another after
it. A second render with them, less the marks, has to be the plain render letter for letter; then
the marks stand where the strings do. Nothing is searched for, so nothing can be mistaken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from varlen_sft.data.conversation import Conversation, ConversationError, Message, strings_in
from varlen_sft.data.template import ChatTemplate

_PRIVATE = re.compile("([\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd])")
_RANGES = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass
class Place:
    """Where one message is written: characters of the render, -1 where nothing of it is.

    ``kinds`` are what of it is written, in its order: "reasoning", "content", "name", "call".
    """

    first: int = -1
    last: int = -1
    kinds: list[str] = field(default_factory=list)
    owned: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Placed:
    """A render and the places of its messages; ``tags`` are the ``{% generation %}`` blocks."""

    text: str
    places: list[Place]
    tags: list[tuple[int, int]]


@dataclass
class _Mark:
    message: int
    kind: str
    opening: str
    closing: str
    trailing: str  # white space after the mark, which the template may keep


class _Marker:
    """Hands out marks and remembers what they stand for."""

    def __init__(self, used: set[str]) -> None:
        self._free = (chr(code) for codes in _RANGES for code in codes if chr(code) not in used)
        self.marks: list[_Mark] = []

    def pair(self) -> tuple[str, str]:
        opening, closing = next(self._free, None), next(self._free, None)
        if opening is None or closing is None:
            raise ConversationError("the conversation has more strings than there are marks")
        return opening, closing

    def mark(self, text: str, message: int, kind: str) -> str:
        """The text with marks inside its outer white space, which templates may trim."""
        core = text.strip()
        if not core:
            return text
        opening, closing = self.pair()
        lead = len(text) - len(text.lstrip())
        self.marks.append(_Mark(message, kind, opening, closing, text[lead + len(core) :]))
        return text[:lead] + opening + core + closing + text[lead + len(core) :]

    def mark_all(self, value: Any, message: int, kind: str) -> Any:
        """The same for every value of a JSON value; keys stay as they are."""
        if isinstance(value, str):
            return self.mark(value, message, kind)
        if isinstance(value, Mapping):
            return {key: self.mark_all(item, message, kind) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.mark_all(item, message, kind) for item in value]
        return value


def place(
    template: ChatTemplate,
    conversation: Conversation,
    plain: str | None = None,
    *,
    add_generation_prompt: bool = False,
) -> Placed:
    """Find the messages of a conversation in ``plain``, its render, if that is at hand.

    Raises:
        ConversationError: the template refuses it, or writes it differently when it is marked,
            writes a string twice, cuts one, or changes the order of the messages.
    """
    messages = conversation.messages
    if plain is None:
        plain = render(template, messages, conversation, add_generation_prompt)
    used = set() if plain.isascii() else set(_PRIVATE.findall(plain))
    marker = _Marker(used.union(*map(_private_in, messages)))
    generation = marker.pair()
    marked = [_marked(template, marker, i, message) for i, message in enumerate(messages)]
    rendered = render(template, marked, conversation, add_generation_prompt, generation)
    text, found = _take_out(rendered, marker.marks, generation)
    if text != plain:
        raise ConversationError(_not_the_same(plain, text))
    places = _places(plain, messages, marker.marks, found)
    return Placed(plain, places, _tags(found, generation))


def render(
    template: ChatTemplate,
    messages: Sequence[Message | Mapping[str, Any]],
    conversation: Conversation,
    add_generation_prompt: bool = False,
    generation_marks: tuple[str, str] = ("", ""),
) -> str:
    """The text of some messages, with tools and variables of their conversation."""
    return template.render(
        messages,
        tools=conversation.tools,
        template_kwargs=conversation.template_kwargs,
        add_generation_prompt=add_generation_prompt,
        generation_marks=generation_marks,
    )


def _marked(template: ChatTemplate, marker: _Marker, i: int, message: Message) -> dict[str, Any]:
    reasoning = message.reasoning_content
    return template.view(
        message,
        marker.mark(message.content, i, "content"),
        None if reasoning is None else marker.mark(reasoning, i, "reasoning"),
        [_marked_call(marker, i, call) for call in message.tool_calls],
    )


def _marked_call(marker: _Marker, number: int, call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Name and arguments are marked; ids and types, which templates compare, are not."""
    function = call.get("function")
    inner = dict(function if isinstance(function, Mapping) else call)
    for key, kind in (("name", "name"), ("arguments", "call")):
        if key in inner:
            inner[key] = marker.mark_all(inner[key], number, kind)
    return {**call, "function": inner} if isinstance(function, Mapping) else inner


def _private_in(message: Message) -> Iterator[str]:
    for text in (message.content, message.reasoning_content or "", *strings_in(message.tool_calls)):
        if not text.isascii():
            yield from _PRIVATE.findall(text)


def _take_out(
    rendered: str, marks: Sequence[_Mark], generation: tuple[str, str]
) -> tuple[str, dict[str, list[int]]]:
    """The render without marks, and where each of them stood."""
    known = {*generation, *(m.opening for m in marks), *(m.closing for m in marks)}
    pieces = _PRIVATE.split(rendered)
    if not known.issuperset(pieces[1::2]):  # a message holds such characters of its own
        pieces = re.split(f"([{''.join(known)}])", rendered)
    found: dict[str, list[int]] = {}
    for mark, at in zip(pieces[1::2], accumulate(map(len, pieces[::2])), strict=False):
        found.setdefault(mark, []).append(at)
    return "".join(pieces[::2]), found


def _places(
    text: str,
    messages: Sequence[Message],
    marks: Sequence[_Mark],
    found: Mapping[str, list[int]],
) -> list[Place]:
    places = [Place() for _ in messages]
    for mark in marks:
        span = _span(mark, messages[mark.message], found)
        if span is not None:
            start, end = span
            if mark.trailing and text.startswith(mark.trailing, end):
                end += len(mark.trailing)
            places[mark.message].owned.append((start, end, mark.kind))  # type: ignore[arg-type]
    last = 0
    for number, one in enumerate(places, 1):
        if not one.owned:
            continue
        spans: list[Any] = sorted(one.owned)
        one.kinds = [kind for *_, kind in spans]
        one.owned = [(start, end) for start, end, _ in spans]
        one.first, one.last = one.owned[0][0], max(end for _, end in one.owned)
        if one.first < last:
            raise ConversationError(
                f"the template writes message {number} before the end of an earlier one"
            )
        last = one.last
    return places


def _span(mark: _Mark, message: Message, found: Mapping[str, list[int]]) -> tuple[int, int] | None:
    """(start, end) of a marked string, None if the template leaves it out."""
    opening, closing = found.get(mark.opening, []), found.get(mark.closing, [])
    what = f"the {_NAMES[mark.kind]} of message {mark.message + 1}"
    if mark.kind == "name":  # templates write it again with the tool's result
        opening, closing = opening[:1], closing[:1]
    if len(opening) > 1 or len(closing) > 1:
        raise ConversationError(f"the template writes {what} more than once")
    if not opening and not closing:
        return None
    if not opening and message.role == "assistant" and "</think>" in message.content:
        return closing[0], closing[0]  # the thinking before it was cut off or taken apart
    if not opening or not closing or opening > closing:
        raise ConversationError(f"the template cuts {what}")
    return opening[0], closing[0]


_NAMES = {
    "content": "content",
    "reasoning": "reasoning_content",
    "call": "tool call",
    "name": "tool call",
}


def _tags(found: Mapping[str, list[int]], generation: tuple[str, str]) -> list[tuple[int, int]]:
    """The ``{% generation %}`` blocks; those that touch are one."""
    joined: list[tuple[int, int]] = []
    for start, end in zip(*(found.get(mark, []) for mark in generation), strict=True):
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _not_the_same(plain: str, unmarked: str) -> str:
    at = common_prefix(plain, unmarked)
    return (
        "the template does not write every message as it is, so its text cannot be told from the "
        f"template's own: at character {at} it has {plain[at : at + 40]!r}, and with marks around "
        f"the messages {unmarked[at : at + 40]!r}"
    )


def common_prefix(a: str, b: str) -> int:
    """How many characters two texts share at their beginnings."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
