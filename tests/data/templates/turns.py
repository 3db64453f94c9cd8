"""An answer in its conversation, and reasons why it cannot be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.data.templates.facts import Facts
from varlen_sft.data.conversation import Conversation, Message

LOST = "the template leaves out what the row says"
ORDER = "the template writes an answer after the tool's output"
NO_STOP = "nothing that the model stops at closes an answer"
UNPLACED = "what the row says cannot be marked, so its place cannot be told"


@dataclass(frozen=True)
class Turn:
    """An assistant message in its conversation.

    Attributes:
        last: of the conversation.
        recent: no user message follows.
        kept: the template was asked to keep its thoughts all the same.
        after: the role before it.
        before: the role after it, or "".
        first_call: no assistant message before it calls tools.
        final_later: an assistant message without calls follows.
    """

    message: Message
    last: bool
    recent: bool
    kept: bool
    after: str
    before: str
    first_call: bool
    final_later: bool

    @property
    def calls(self) -> list:
        return [call["function"] for call in self.message.tool_calls]

    @property
    def shown(self) -> bool:
        """Whether its thoughts are written, by templates that leave out those of history."""
        return self.recent or self.kept

    @property
    def thought(self) -> str:
        return self.message.reasoning_content or ""


@dataclass
class Answer:
    """``own`` is the template's text before the first of the row's, ``text`` all of it."""

    own: str
    rest: str
    reasons: set[str] = field(default_factory=set)

    @property
    def text(self) -> str:
        return self.own + self.rest

    def refuse_if(self, condition: object, reason: str = LOST) -> Answer:
        if condition:
            self.reasons.add(reason)
        return self


def is_tool_result(facts: Facts, message: Message) -> bool:
    """Qwen 3 takes a user message that looks like a tool's result for one."""
    if message.role != "user" or not facts.style.startswith("qwen3"):
        return False
    text = message.content.strip() if facts.content == "trimmed" else message.content
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def turns_of(
    facts: Facts, conversation: Conversation, keeps_history: bool = False
) -> Iterator[Turn]:
    messages = conversation.messages
    asked = [k for k, m in enumerate(messages) if m.role == "user" and not is_tool_result(facts, m)]
    called = False
    for k, message in enumerate(messages):
        if message.role != "assistant":
            continue
        later = messages[k + 1 :]
        yield Turn(
            message,
            last=not later,
            recent=k > asked[-1],
            kept=keeps_history and facts.keeps,
            after=messages[k - 1].role,
            before=later[0].role if later else "",
            first_call=not called,
            final_later=any(m.role == "assistant" and not m.tool_calls for m in later),
        )
        called = called or bool(message.tool_calls)
