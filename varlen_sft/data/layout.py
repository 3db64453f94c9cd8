"""Where the answers and the other messages of a rendered conversation lie, in characters.

Every place is found from renders of the template, none by searching the text for markers, and each
is found in two ways that must agree. What does not agree is refused: a span is proven or not used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from varlen_sft.data.formats import ConversationError, Message
from varlen_sft.data.sample import ROLES

if TYPE_CHECKING:
    from varlen_sft.data.template import ChatTemplate

_PRIVATE_USE = range(0xE000, 0xF900)


@dataclass(frozen=True)
class Answer:
    """One assistant turn: text[start:content_end] is its content, then comes ``stop``."""

    number: int  # of the message, from 1, for errors
    start: int  # where the generation prompt ends
    content_end: int
    end: int
    stop: str


@dataclass(frozen=True)
class Layout:
    """``others`` are (start, end, role id) of the messages that are not answers."""

    text: str
    answers: tuple[Answer, ...]
    others: tuple[tuple[int, int, int], ...]


def lay_out(template: ChatTemplate, messages: Sequence[Message], control: re.Pattern) -> Layout:
    """Render messages and place them.

    Args:
        template: the chat template.
        messages: a whole conversation.
        control: matches the tokenizer's control tokens, the longest first.

    Raises:
        ConversationError: a content spells a control token, or a place cannot be proven.
    """
    for number, message in enumerate(messages, 1):
        if found := control.search(message.content):
            raise ConversationError(
                f"the content of message {number} spells the control token {found.group()!r}"
            )
    text = template.render(messages)
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    starts = {i: _answer_start(template, text, messages, i) for i in turns}
    places = _contents(template, text, messages)
    answers, others = [], []
    for i, message in enumerate(messages):
        if i not in starts and i in places:
            others.append((*places[i], ROLES.index(message.role)))
        elif i in starts:
            start = starts[i]
            if i in places and places[i][0] - _leading_space(message.content) != start:
                raise ConversationError(
                    f"message {i + 1} begins at character {places[i][0]}, its generation prompt "
                    f"ends at {start}"
                )
            end = start + len(message.content)
            stop = _stop_token(template, text, messages[: i + 1], end, control)
            answers.append(Answer(i + 1, start, end, end + len(stop), stop))
    return Layout(text, tuple(answers), tuple(others))


def _answer_start(template: ChatTemplate, text: str, messages: Sequence[Message], i: int) -> int:
    """Where the generation prompt of message i ends and its content begins."""
    content = messages[i].content
    prompt = template.render(messages[:i], add_generation_prompt=True)
    if not text.startswith(prompt):
        raise ConversationError(
            "the template rewrites history, or prompts with text that it does not keep: the "
            f"prompt of message {i + 1} ends in "
            f"{prompt[-40:]!r}, and the whole conversation does not begin with it "
            f"(they part at character {_common_prefix(text, prompt)} of {len(prompt)})"
        )
    start = len(prompt)
    if not text.startswith(content, start):
        raise ConversationError(
            f"the template changes the answer in message {i + 1} (it rewrites history, trims, or "
            f"adds text of its own): after the generation prompt comes "
            f"{text[start : start + 40]!r}, expected {content[:40]!r}"
        )
    return start


def _stop_token(
    template: ChatTemplate, text: str, messages: Sequence[Message], at: int, control: re.Pattern
) -> str:
    """The control token at text[at:], which closes the last of messages."""
    eos = template.special_tokens.get("eos_token")  # no question, and spares a render per turn
    if eos and control.fullmatch(eos) and text.startswith(eos, at):
        return eos
    found = control.match(text, at)
    # Another token may as well open the next header; it closes this turn only if it is there
    # without a next turn.
    if found and template.render(messages)[: found.end()] == text[: found.end()]:
        return found.group()
    raise ConversationError(
        f"no stop token closes the answer in message {len(messages)}: it is followed by "
        f"{text[at : at + 40]!r}"
    )


def _contents(
    template: ChatTemplate, text: str, messages: Sequence[Message]
) -> dict[int, tuple[int, int]]:
    """(start, end) of each content, less outer white space, by message index; blank ones have none.

    Found by rendering once more with two characters that occur nowhere else around every content.
    They stand inside its outer white space, so that a template may trim as it does without them.
    """
    opening, closing = _unused(text, messages)
    marked = {i: m for i, m in enumerate(messages) if m.content.strip()}
    rendered = template.render(
        [_mark(m, opening, closing) if i in marked else m for i, m in enumerate(messages)]
    )
    pairs = list(re.finditer(f"{opening}([^{opening}{closing}]*){closing}", rendered))
    contents = [m.content.strip() for m in marked.values()]
    plain = rendered.replace(opening, "").replace(closing, "")
    if plain != text or [pair.group(1) for pair in pairs] != contents:
        raise ConversationError(
            "the template does not write every message once, in order and as it is, so its "
            "text cannot be told from the template's own"
        )
    places = {}
    for k, (i, pair) in enumerate(zip(marked, pairs, strict=True)):
        start = pair.start() - 2 * k
        places[i] = (start, start + len(pair.group(1)))
    return places


def _unused(text: str, messages: Sequence[Message]) -> tuple[str, str]:
    """Two private-use characters that occur neither in the render nor in a message."""
    used = set(text).union(*(message.content for message in messages))
    free = (chr(code) for code in _PRIVATE_USE if chr(code) not in used)
    opening, closing = next(free, None), next(free, None)
    if opening is None or closing is None:
        raise ConversationError("the conversation uses every private-use character")
    return opening, closing


def _mark(message: Message, opening: str, closing: str) -> Message:
    lead, core = _leading_space(message.content), message.content.strip()
    content = message.content
    return Message(
        message.role, content[:lead] + opening + core + closing + content[lead + len(core) :]
    )


def _leading_space(content: str) -> int:
    return len(content) - len(content.lstrip())


def _common_prefix(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
