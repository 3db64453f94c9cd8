"""What must be trained, as text, from the facts alone. Nothing here renders a template or looks at
tokens: ``answers`` says by hand what a template writes of an answer from its header on, and what a
model would have sampled of it comes after the generation prompt. An answer that does not begin
with its prompt is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.data.templates.answers import SHAPES
from tests.data.templates.calls import CannotWrite
from tests.data.templates.facts import Facts
from tests.data.templates.turns import (
    LOST,
    NO_STOP,
    ORDER,
    UNPLACED,
    Answer,
    Turn,
    is_tool_result,
    turns_of,
)
from varlen_sft.data.conversation import Conversation, Message, strings_in

RAISES = "the template raises"
PROMPT = "the generation prompt does not stand before an answer"
SPELLED = "an answer spells a control token"
DROPPED = "the template drops a thought of history"
TAGS = "the template's generation tags enclose something else"

REASONS = (RAISES, PROMPT, LOST, ORDER, NO_STOP, SPELLED, TAGS, UNPLACED, DROPPED)


@dataclass(frozen=True)
class Expected:
    """The trained texts, in order; or, where there are reasons, that the row is refused.

    ``tagged`` are the texts in the template's ``{% generation %}`` tags.
    """

    spans: tuple[str, ...]
    reasons: frozenset[str] = frozenset()
    tagged: tuple[str, ...] = ()


def expected(
    facts: Facts,
    conversation: Conversation,
    thinking: bool | None = None,
    *,
    last_only: bool = False,
    keeps_history: bool = False,
) -> Expected:
    """What the masks of a conversation must be.

    Args:
        thinking: ``enable_thinking`` for the template; None where it is not set.
        last_only: only the last answer is trained, and has to be proven.
        keeps_history: the template is asked to keep the thoughts of earlier answers, if it can.
    """
    reasons = set(_of_the_row(facts, conversation, last_only))
    wants_recent = facts.think == "recent" and not (keeps_history and facts.keeps)
    if wants_recent and any(is_tool_result(facts, m) for m in conversation.messages):
        reasons.add(UNPLACED)  # with marks around it, a user message is no tool result
    spans, tagged = [], []
    for turn in turns_of(facts, conversation, keeps_history):
        try:
            answer = SHAPES[facts.style](facts, turn)
        except CannotWrite:
            return Expected((), frozenset(reasons | {RAISES}))
        if keeps_history and _drops_a_thought(turn, answer):
            reasons.add(DROPPED)
        if last_only and not turn.last:
            # An empty result of a tool is in nobody's way, but Gemma 4 v5 closes a turn there.
            results = facts.think == "recent" or any(
                m.role == "tool" and m.content.strip() for m in conversation.messages
            )
            reasons |= answer.reasons & ({LOST, ORDER} if results else {LOST})
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
        tagged.append(answer.text[len(facts.tag or "") :] + facts.tag_end)
    return Expected(tuple(spans), frozenset(reasons), tuple(tagged))


def _of_the_row(facts: Facts, conversation: Conversation, last_only: bool) -> Iterator[str]:
    roles = [message.role for message in conversation.messages]
    if (facts.system == "raises" and roles[0] == "system") or (
        facts.tools == "raises" and "tool" in roles
    ):
        yield RAISES
    control = {*facts.control, *facts.stops}
    for message in conversation.messages:
        texts = list(_names(message))
        if message.role == "assistant":
            if message is conversation.messages[-1] or not last_only:
                texts += [message.content, message.reasoning_content or ""]
                texts += strings_in([call["function"] for call in message.tool_calls])
            if facts.calls == "python" and _lists_words(message):
                yield UNPLACED  # written by Python's repr, which escapes marks
        if any(token in text for token in control for text in texts):
            yield SPELLED


def _names(message: Message) -> Iterator[str]:
    """What templates write of a message besides its words."""
    yield from strings_in(message.extra)
    for call in message.tool_calls:
        yield call["function"]["name"]
        yield from _keys(call["function"]["arguments"])


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _lists_words(message: Message) -> bool:
    arguments = [call["function"]["arguments"] for call in message.tool_calls]
    values = [v for a in arguments if isinstance(a, dict) for v in a.values()]
    return any(isinstance(value, list) and _has_words(value) for value in values)


def _has_words(value: object) -> bool:
    if isinstance(value, (dict, list)):
        return any(map(_has_words, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and bool(value.strip())


def _prompt(facts: Facts, turn: Turn, thinking: bool | None) -> str:
    if turn.after == "tool" and facts.style == "deepseek":
        return "<｜tool▁outputs▁end｜>"
    if turn.after == "tool" and facts.style in ("gemma4", "diffusion_gemma"):
        return "<|channel>thought\n" if thinking and facts.loud else ""
    prompt = {None: facts.prompt, False: facts.quiet, True: facts.loud}[thinking]
    return facts.prompt if prompt is None else prompt


def _drops_a_thought(turn: Turn, answer: Answer) -> bool:
    thought, content = turn.thought, turn.message.content
    if "</think>" in content and not thought.strip():
        thought = content.partition("</think>")[0].rpartition("<think>")[2]
    return thought.strip() not in answer.text


def _tags_agree(facts: Facts, turn: Turn, answer: Answer, prompt: str) -> bool:
    """Tags may enclose more than what is sampled, such as the header, but not less."""
    if facts.tag is None:
        return True
    if facts.style == "diffusion_gemma":  # does not tag where the model stops for a tool
        return not turn.calls and turn.after != "tool"
    return len(facts.tag) <= len(prompt)
