"""Which characters of a rendered conversation the model would have sampled, turn by turn.

An answer begins where its generation prompt ends and ends with its stop token. Both are read from
the template's own text, before and after what the message owns (``marks``), against what the
template writes when it is asked to prompt for just this answer, or to end with it. What it writes
does not depend on the words of a conversation, so it is asked once per kind of turn; a turn that
does not match is asked for by itself, and refused if it still does not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.joints import MOST_REMEMBERED, Joints, is_plain
from varlen_sft.data.marks import Placed, common_prefix, place, render
from varlen_sft.data.placed import Answer, Layout
from varlen_sft.data.sample import ROLES
from varlen_sft.data.template import ChatTemplate
from varlen_sft.data.turn_text import TurnText, setting_of, shape_before

__all__ = ["Answer", "Layout", "Planner", "prefix_of"]


@dataclass
class Planner:
    """Lays conversations out, and remembers what the template writes around answers.

    Args:
        template: the chat template.
        control: matches the tokenizer's control tokens, the longest first.
    """

    template: ChatTemplate
    control: re.Pattern[str]
    _prompts: dict[Any, str] = field(default_factory=dict)
    _endings: dict[Any, tuple[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._joints = Joints()
        self.turns = TurnText(self.template, self.control)

    def lay_out(self, conversation: Conversation, only_last: bool = False) -> Layout:
        """Render a conversation and place its messages.

        Args:
            only_last: the last answer is proven alone; those before it are history, which may be
                written in any way, and belong to ``others``.

        Raises:
            ConversationError: a place cannot be proven; says which and why.
        """
        quick = is_plain(conversation) and not only_last and not self.template.has_generation_tags
        setting = setting_of(conversation)
        text = render(self.template, conversation.messages, conversation)
        if quick and (found := self._joints.lay_out(setting, conversation, text)) is not None:
            return found
        for learned in (self._prompts, self._endings):
            if len(learned) > MOST_REMEMBERED:
                learned.clear()
        layout = self._by_marks(conversation, text, only_last)
        if quick:
            self._joints.learn(setting, conversation, layout)
        return layout

    def _by_marks(self, conversation: Conversation, text: str, only_last: bool) -> Layout:
        placed = place(self.template, conversation, text)
        rewritten = _unwritten(conversation, placed)
        answers, others = [], []
        count = len(conversation.messages)
        for i, message in enumerate(conversation.messages):
            here = placed.places[i]
            if message.role == "assistant" and (not only_last or i + 1 == count):
                answers.append(self._answer(conversation, placed, i))
            elif here.first >= 0:
                others.append((here.first, here.last, ROLES.index(message.role), i + 1))
        _check_disjoint(answers, others)
        if self.template.has_generation_tags:
            _check_tags(placed, answers)
        owned = tuple(
            (start, end, number)
            for number, here in enumerate(placed.places, 1)
            for start, end in here.owned
        )
        return Layout(placed.text, tuple(answers), tuple(others), owned, rewritten)

    def _answer(self, conversation: Conversation, placed: Placed, i: int) -> Answer:
        start = self._start(conversation, placed, i)
        here = placed.places[i]
        if 0 <= here.first < start:
            raise ConversationError(
                f"message {i + 1} begins at character {here.first}, its generation prompt ends at "
                f"{start}"
            )
        lead, stop = self._ending(conversation, placed, i, start)
        stop_start = max(here.last, start) + len(lead)
        self.turns.check_own_text(placed.text, (start, stop_start), here.owned, i + 1)
        return Answer(i + 1, start, stop_start, stop_start + len(stop), stop)

    def _start(self, conversation: Conversation, placed: Placed, i: int) -> int:
        """Where the generation prompt of message i ends."""
        before = placed.places[i - 1]
        if before.last >= 0:
            key = (setting_of(conversation), shape_before(conversation, i), *before.kinds)
            known = self._prompts.get(key)
            if known is not None and placed.text.startswith(known, before.last):
                return before.last + len(known)
        prompt = self._prompt(conversation, i)
        if before.last >= 0 and prompt.places[-1].last >= 0:
            tail = prompt.text[prompt.places[-1].last :]
            if placed.text.startswith(tail, before.last):
                self._prompts[key] = tail
                return before.last + len(tail)
        elif placed.text.startswith(prompt.text):
            return len(prompt.text)
        raise ConversationError(_rewritten_prompt(i, placed.text, prompt.text))

    def _prompt(self, conversation: Conversation, i: int) -> Placed:
        prefix = prefix_of(conversation, i)
        return place(self.template, prefix, add_generation_prompt=True)

    def _ending(
        self, conversation: Conversation, placed: Placed, i: int, start: int
    ) -> tuple[str, str]:
        """What the template writes between answer i and its stop token, and that token."""
        here = placed.places[i]
        at = max(here.last, start)
        key = (setting_of(conversation), *here.kinds[-1:])
        known = self._endings.get(key)
        if here.last >= 0 and known and placed.text.startswith("".join(known), at):
            return known
        if i + 1 == len(conversation.messages):
            tail = placed.text[at:]
        else:
            alone = place(self.template, prefix_of(conversation, i + 1))
            last = alone.places[-1].last
            if last < 0 and alone.text[:start] != placed.text[:start]:
                raise ConversationError(_rewritten_prompt(i, placed.text, alone.text[:start]))
            tail = alone.text[last if last >= 0 else start :]
        found = self.turns.find_stop(tail)
        if here.last < 0 and found is not None:
            # Nothing marks a blank answer; what the last one is given before it (an empty thought)
            # one in history may lack.
            leads = (found[0], conversation.messages[i].content, "")
            fits = (lead for lead in leads if placed.text.startswith(lead + found[1], at))
            found = next(fits, found[0]), found[1]
        if found is None or not placed.text.startswith("".join(found), at):
            raise ConversationError(_no_stop(i, tail, placed.text[at:], found))
        if here.last >= 0:
            self._endings[key] = found
        return found


def prefix_of(conversation: Conversation, count: int) -> Conversation:
    """The first messages, which need not end with an answer."""
    prefix = object.__new__(Conversation)
    for name in ("tools", "template_kwargs"):
        object.__setattr__(prefix, name, getattr(conversation, name))
    object.__setattr__(prefix, "messages", conversation.messages[:count])
    return prefix


def _unwritten(conversation: Conversation, placed: Placed) -> tuple[int, ...]:
    """Numbers of the answers whose reasoning the template left out; raise for anything else."""
    rewritten = []
    last_user = max(i for i, m in enumerate(conversation.messages) if m.role != "assistant")
    for i, message in enumerate(conversation.messages):
        written = placed.places[i].kinds
        if message.content.strip() and "content" not in written:
            raise ConversationError(f"the template leaves out the content of message {i + 1}")
        if written.count("name") < len(message.tool_calls):
            raise ConversationError(f"the template leaves out the tool calls of message {i + 1}")
        thinks = (message.reasoning_content or "").strip() and "reasoning" not in written
        if thinks and i > last_user:
            raise ConversationError(
                f"the template leaves out the reasoning_content of message {i + 1}, the last answer"
            )
        if thinks or (message.role == "assistant" and _lost_thinking(message.content, placed, i)):
            rewritten.append(i + 1)
    return tuple(rewritten)


def _lost_thinking(content: str, placed: Placed, i: int) -> bool:
    """Whether thinking that stands inside a content is not in the render before its end."""
    if "</think>" not in content:
        return False
    thinking = content.partition("</think>")[0].rpartition("<think>")[2].strip()
    before = placed.places[i - 1].last if i else 0
    return thinking not in placed.text[max(before, 0) : placed.places[i].last]


def _check_disjoint(answers: Sequence[Answer], others: Sequence[tuple[int, int, int, int]]) -> None:
    spans = [(answer.start, answer.end, answer.number) for answer in answers]
    spans += [(start, end, number) for start, end, _, number in others]
    spans.sort(key=lambda span: span[2])
    for (_, end, one), (start, _, other) in zip(spans, spans[1:], strict=False):
        if start < end:
            raise ConversationError(
                f"message {other} begins at character {start}, before message {one} ends at {end}"
            )


def _check_tags(placed: Placed, answers: Sequence[Answer]) -> None:
    """The template's own ``{% generation %}`` tags have to enclose every answer.

    Some enclose the header too (GPT-OSS of TRL), or white space after the stop token: what is
    trained is less, then.
    """
    for answer in answers:
        tag = next((tag for tag in placed.tags if tag[0] <= answer.start < tag[1]), None)
        if tag is None or tag[1] < answer.end:
            shown = "nothing" if tag is None else repr(placed.text[slice(*tag)])
            raise ConversationError(
                f"the template's generation tags enclose {shown} for message {answer.number}, a "
                f"model samples {placed.text[answer.start : answer.end]!r}"
            )


def _rewritten_prompt(i: int, text: str, prompt: str) -> str:
    at = common_prefix(text, prompt)
    return (
        f"the template rewrites history: the prompt of message {i + 1} ends in {prompt[-40:]!r}, "
        f"and the whole conversation parts from it at character {at} of {len(prompt)}: "
        f"{text[at : at + 40]!r}; history=per_assistant makes a row of each answer"
    )


def _no_stop(i: int, tail: str, text: str, found: tuple[str, str] | None) -> str:
    if found is None:
        return f"no stop token closes the answer in message {i + 1}: it is followed by {tail!r}"
    return (
        f"the template rewrites history: the answer in message {i + 1} ends with "
        f"{''.join(found)!r} when it is the last, and is followed by {text[:40]!r} here; "
        "history=per_assistant makes a row of each answer"
    )
