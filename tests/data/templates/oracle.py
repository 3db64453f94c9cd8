"""What must be trained, as text, from the facts alone. Nothing here renders a template or looks at
tokens: ``answers`` says by hand what a template writes of an answer from its header on, and what a
model would have sampled of it comes after the generation prompt. An answer that does not begin
with its prompt is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.data.templates.answers import (
    LOST,
    NO_STOP,
    ORDER,
    SHAPES,
    UNPLACED,
    Answer,
    Turn,
    is_tool_result,
)
from tests.data.templates.calls import CannotWrite
from tests.data.templates.templates import Facts
from varlen_sft.data.conversation import Conversation, Message, strings_in

RAISES = "the template raises"
PROMPT = "the generation prompt does not stand before an answer"
SPELLED = "an answer spells a control token"
TAGS = "the template's generation tags enclose something else"

REASONS = (RAISES, PROMPT, LOST, ORDER, NO_STOP, SPELLED, TAGS, UNPLACED)


@dataclass(frozen=True)
class Expected:
    """The trained texts, in order; or, where there are reasons, that the row is refused."""

    spans: tuple[str, ...]
    reasons: frozenset[str] = frozenset()


def expected(
    facts: Facts,
    conversation: Conversation,
    thinking: bool | None = None,
    *,
    last_only: bool = False,
) -> Expected:
    """What the masks of a conversation must be.

    Args:
        thinking: ``enable_thinking`` for the template; None where it is not set.
        last_only: only the last answer is trained, and has to be proven.
    """
    reasons = set(_of_the_row(facts, conversation, last_only))
    spans = []
    for turn in _turns(facts, conversation):
        try:
            answer = SHAPES[facts.style](facts, turn)
        except CannotWrite:
            return Expected((), frozenset({RAISES}))
        if last_only and not turn.last:
            reasons |= answer.reasons & {LOST, ORDER}
            continue
        prompt = _prompt(facts, turn, thinking)
        reasons |= answer.reasons
        # DiffusionGemma goes on without a header after a tool, but writes one into its history.
        header = turn.after == "tool" and facts.style == "diffusion_gemma"
        if header or not answer.own.startswith(prompt):
            reasons.add(PROMPT)
        if not _tags_agree(facts, turn, answer, prompt):
            reasons.add(TAGS)
        spans.append(answer.text[len(prompt) :])
    return Expected(tuple(spans), frozenset(reasons))


def _of_the_row(facts: Facts, conversation: Conversation, last_only: bool) -> Iterator[str]:
    roles = [message.role for message in conversation.messages]
    if (facts.system == "raises" and roles[0] == "system") or (
        facts.tools == "raises" and "tool" in roles
    ):
        yield RAISES
    control = {*facts.control, *facts.stops}
    for message in conversation.messages:
        if message.role == "assistant":
            trained = message is conversation.messages[-1] or not last_only
            texts = [message.content, message.reasoning_content or ""]
            texts += strings_in([call["function"] for call in message.tool_calls])
            if trained and any(token in text for token in control for text in texts):
                yield SPELLED
            if facts.calls == "python" and _lists_strings(message):
                yield UNPLACED  # written by Python's repr, which escapes marks
        elif facts.think == "recent" and is_tool_result(facts, message):
            yield UNPLACED  # a user message with marks around it is none


def _lists_strings(message: Message) -> bool:
    arguments = [call["function"]["arguments"] for call in message.tool_calls]
    values = [v for a in arguments if isinstance(a, dict) for v in a.values()]
    return any(isinstance(value, list) and any(strings_in(value)) for value in values)


def _turns(facts: Facts, conversation: Conversation) -> Iterator[Turn]:
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
            after=messages[k - 1].role,
            before=later[0].role if later else "",
            first_call=not called,
            final_later=any(m.role == "assistant" and not m.tool_calls for m in later),
        )
        called = called or bool(message.tool_calls)


def _prompt(facts: Facts, turn: Turn, thinking: bool | None) -> str:
    if turn.after == "tool" and facts.style == "deepseek":
        return "<｜tool▁outputs▁end｜>"
    if turn.after == "tool" and facts.style in ("gemma4", "diffusion_gemma"):
        return "<|channel>thought\n" if thinking and facts.loud else ""
    prompt = {None: facts.prompt, False: facts.quiet, True: facts.loud}[thinking]
    return facts.prompt if prompt is None else prompt


def _tags_agree(facts: Facts, turn: Turn, answer: Answer, prompt: str) -> bool:
    """Tags may enclose more than what is sampled, such as the header, but not less."""
    if facts.tag is None:
        return True
    if facts.style == "diffusion_gemma":  # does not tag where the model stops for a tool
        return not turn.calls and turn.after != "tool"
    return len(facts.tag) <= len(prompt)
