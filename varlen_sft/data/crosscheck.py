"""A second opinion on where answers lie, found another way.

The start is where a render of the messages before, with the generation prompt, ends. The end is
found by writing another answer in the place of this one: from where the two renders agree again to
the end, nothing is the answer's; the stop token is the first control token there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from varlen_sft.data.conversation import Conversation, ConversationError, Message
from varlen_sft.data.layout import Answer, Layout, prefix_of
from varlen_sft.data.marks import common_prefix, render
from varlen_sft.data.template import ChatTemplate

_SENTINEL = "Sentinel0"


FindStop = Callable[[str], tuple[str, str] | None]


def disagreement(
    template: ChatTemplate, conversation: Conversation, layout: Layout, find_stop: FindStop
) -> ConversationError | None:
    """Why the layout cannot be right; None where both ways agree.

    Args:
        find_stop: the text before the first stop token of a text, and the token.
    """
    after = 0
    for answer in layout.answers:
        try:
            start = _start(template, conversation, layout.text, answer.number - 1, after)
            end = after = _end(template, conversation, layout.text, answer.number - 1, find_stop)
        except ConversationError as error:
            return ConversationError(f"message {answer.number} cannot be checked again: {error}")
        for name, mine, other in (("begins", answer.start, start), ("ends", answer.end, end)):
            if mine != other:
                return ConversationError(_both(layout.text, answer, name, mine, other))
    return None


def _start(
    template: ChatTemplate, conversation: Conversation, text: str, i: int, after: int
) -> int:
    """The end of the generation prompt; -1 if the text has none such ``after`` the last answer."""
    prompt = render(template, conversation.messages[:i], prefix_of(conversation, i), True)
    if text.startswith(prompt):
        return len(prompt)
    # An earlier answer was rewritten in one of them: they agree from the last message on.
    said = conversation.messages[i - 1].content.strip()
    tail = prompt[prompt.rfind(said) :] if said in prompt else ""
    here = text.find(tail, after) if said and tail else -1
    return here + len(tail) if here >= 0 else -1


def _end(
    template: ChatTemplate, conversation: Conversation, text: str, i: int, find_stop: FindStop
) -> int:
    """The end of the stop token after the last character that is the answer's; -1 if none is."""
    alone = prefix_of(conversation, i + 1)
    found = find_stop(_tail(template, alone, render(template, alone.messages, alone), i))
    after = _tail(template, conversation, text, i)
    if found is None or not after.startswith("".join(found)):
        return -1
    return len(text) - len(after) + len("".join(found))


def _tail(template: ChatTemplate, conversation: Conversation, text: str, i: int) -> str:
    """What of a render is the same with another answer i, from its end on."""
    messages: Sequence[Message] = conversation.messages
    messages = (*messages[:i], _sentinel(messages[i]), *messages[i + 1 :])
    rendered = render(template, messages, conversation)
    tail = rendered[rendered.rfind(_SENTINEL) + len(_SENTINEL) :]
    return text[len(text) - common_prefix(tail[::-1], text[::-1]) :]


def _sentinel(message: Message) -> Message:
    """Another answer of the same kind: a template may want a call before a tool's result."""
    if not message.tool_calls:
        return Message("assistant", _SENTINEL)
    call = dict(message.tool_calls[-1])
    function = call.get("function")
    inner = dict(function if isinstance(function, Mapping) else call)
    given = inner.get("arguments")
    inner["arguments"] = _SENTINEL if isinstance(given, str) else {"sentinel": _SENTINEL}
    call = {**call, "function": inner} if isinstance(function, Mapping) else inner
    return replace(message, tool_calls=(*message.tool_calls[:-1], call))


def _both(text: str, answer: Answer, name: str, mine: int, other: int) -> str:
    """Both findings, one under the other."""
    lines = [f"two ways to find message {answer.number} disagree on where it {name}:"]
    for way, place in (("marks", mine), ("prefixes and sentinels", other)):
        shown = "nowhere" if place < 0 else f"character {place}: {text[place : place + 30]!r}"
        lines.append(f"  {way:<22} {shown}")
    return "\n".join(lines)
