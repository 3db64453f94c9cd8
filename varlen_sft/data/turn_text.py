"""How a template opens and closes turns: its stop tokens and the header it prompts with."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from varlen_sft.data.conversation import Conversation, ConversationError
from varlen_sft.data.marks import common_prefix
from varlen_sft.data.template import ChatTemplate

_PROBE = "varlen"


class TurnText:
    """What a template writes around answers, learned from small conversations when it is asked for.

    Args:
        template: the chat template.
        control: matches the tokenizer's control tokens, the longest first.
    """

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self.template, self.control = template, control

    def header_in(self, injected: str) -> str:
        """A header that stands between a generation prompt and its answer; "" if there is none."""
        if self.header:
            return self.header if self.header in injected else ""
        found = self.control.search(injected)
        return found.group() if found else ""

    def check_own_text(
        self,
        text: str,
        span: tuple[int, int],
        owned: Sequence[tuple[int, int]],
        number: int,
    ) -> None:
        """Raise ConversationError if the template writes into an answer what a model would not.

        Args:
            text: the render.
            span: characters of the answer, without its stop token.
            owned: characters of what the message itself says there, in their order.
            number: of the message, from 1.
        """
        at, own = span[0], []
        for start, end in (*owned, (span[1], span[1])):
            own.append(text[at:start])
            at = max(at, end)
        if header := self.header_in(own[0]):
            raise ConversationError(
                f"the template writes {header!r} before the answer in message {number} and does "
                "not prompt with it, so it would be trained"
            )
        if stop := next((stop for stop in self.stops for piece in own if stop in piece), None):
            raise ConversationError(
                f"the template writes the stop token {stop!r} into the answer in message {number}, "
                "where a model would have stopped"
            )

    @cached_property
    def header(self) -> str:
        """What a generation prompt adds after a user; "" if the template has none."""
        probe = [{"role": "user", "content": _PROBE}]
        try:
            prompt = self.template.render(probe, add_generation_prompt=True)
            return prompt[common_prefix(prompt, self.template.render(probe)) :]
        except ConversationError:
            return ""

    def find_stop(self, tail: str) -> tuple[str, str] | None:
        """The text before the first stop token of the template's tail, and the token."""
        found = self._stop.search(tail)
        if found is None:  # such as the token after a tool call: it ends what is only this turn
            *_, found = None, *self.control.finditer(tail)
        return None if found is None else (tail[: found.start()], found.group())

    @cached_property
    def _stop(self) -> re.Pattern[str]:
        longest_first = sorted(self.stops, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def stops(self) -> frozenset[str]:
        """The model's stop tokens, and what ends a turn in the middle if none of them does.

        Phi 3 writes its eos_token after a whole conversation only, and a turn ends with another.
        """
        stops = {*self.template.stop_tokens, self.template.special_tokens.get("eos_token", "")}
        known = set(filter(self.control.fullmatch, stops))
        try:
            roles = ("user", "assistant") * 2
            probe = self.template.render([{"role": r, "content": _PROBE} for r in roles])
        except ConversationError:  # a template that wants more of a conversation
            return frozenset(known)
        pieces = probe.split(_PROBE)
        between, end = (pieces[2], pieces[4]) if len(pieces) == 5 else ("", "")
        found, last = self.control.search(between), self.control.search(end)
        # GPT-OSS writes another token in history, but the last answer ends as the model does.
        stops_last = last is not None and last.group() in known
        if found and not stops_last and not any(stop in between for stop in known):
            known.add(found.group())
        return frozenset(known)


def setting_of(conversation: Conversation) -> tuple[Any, ...]:
    """All but its words that may change what a template writes around an answer."""
    kwargs = conversation.template_kwargs
    named = json.dumps(kwargs, sort_keys=True, default=repr) if kwargs else ""
    return named, conversation.tools is None, conversation.messages[0].role


def shape_before(conversation: Conversation, i: int) -> tuple[Any, ...]:
    """Which messages stand between the last user and message i, and what they are without."""
    shape: list[Any] = []
    for message in reversed(conversation.messages[:i]):
        shape.append((message.role, bool(message.content), len(message.tool_calls)))
        if message.role == "user":
            break
    return tuple(shape)
