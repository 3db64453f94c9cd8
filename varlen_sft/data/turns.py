"""A conversation cut between its turns or after an answer, and what of each part is its own.

A part is the system message and turns that follow each other. The system message, and whatever else
the template writes before the first turn, is in every part, but is trained in the first one only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from varlen_sft.data.conversation import Conversation, Message
from varlen_sft.data.sample import ROLES, Sample

_ASSISTANT = ROLES.index("assistant")
_HEAD = (ROLES.index("none"), ROLES.index("system"))


@dataclass(frozen=True)
class Turns:
    """The turns of a conversation: a user's message and all up to the next user's.

    So tool calls stay with their results, and each turn ends with an answer. A turn may hold many
    answers, calls of tools among them: ``by_answer`` takes each of them for a turn, with what came
    before it.

    Args:
        edges: the index of the first message of each turn, and the number of messages.
    """

    conversation: Conversation
    edges: tuple[int, ...]

    @classmethod
    def of(cls, conversation: Conversation) -> Turns:
        messages = conversation.messages
        starts = [i for i, message in enumerate(messages) if message.role == "user"]
        return cls(conversation, (*starts, len(messages)))

    def by_answer(self) -> Turns:
        messages = self.conversation.messages
        ends = [i for i, message in enumerate(messages, 1) if message.role == "assistant"]
        return replace(self, edges=(self.edges[0], *ends))

    def ends_at_user(self, turn: int) -> bool:
        """Whether the user speaks after a turn, or nobody."""
        after = self.conversation.messages[self.edges[turn + 1] :][:1]
        return all(message.role == "user" for message in after)

    def at(self, message: int) -> int:
        """The turn that begins with a message, by its index."""
        return self.edges.index(message)

    def __len__(self) -> int:
        return len(self.edges) - 1

    def part(self, first: int, last: int, *, answers: bool = True) -> Conversation:
        """The system message, if there is one, and turns [first, last).

        Args:
            answers: whether they are trained; their weights are 0 otherwise.
        """
        messages = self.conversation.messages
        chosen = messages[: self.edges[0]] + messages[self.edges[first] : self.edges[last]]
        if not answers:
            chosen = tuple(replace(m, weight=0.0) if m.role == "assistant" else m for m in chosen)
        return replace(self.conversation, messages=chosen)

    def last_answer(self, turn: int) -> Message:
        """The message that ends a turn."""
        return self.conversation.messages[self.edges[turn + 1] - 1]

    def name(self, first: int, last: int) -> str:
        """Turns [first, last) in words, by the numbers that their messages have in the row."""
        return f"messages {self.edges[first] + 1} to {self.edges[last]}"

    def ends(self, whole: Sample) -> list[int] | None:
        """Where in a sample of the conversation each turn's last answer ends, with its stop token.

        None if the sample does not tell one answer from the next.
        """
        spoken = np.append(whole.roles == _ASSISTANT, False).astype(np.int8)
        ends = (np.diff(spoken) < 0).nonzero()[0] + 1
        answers = np.cumsum([m.role == "assistant" for m in self.conversation.messages])
        if len(ends) != answers[-1]:
            return None
        return [int(ends[answers[edge - 1] - 1]) for edge in self.edges[1:]]

    def plan(self, whole: Sample, limit: int) -> list[tuple[int, int]]:
        """A first guess of parts [first, last) of at most ``limit`` tokens, from one encode."""
        costs, head, tail = self._costs(whole)
        parts, first, size = [], 0, tail
        for turn, cost in enumerate(costs):
            if turn > first and size + cost > limit:
                parts.append((first, turn))
                first, size = turn, head
            size += cost
        return [*parts, (first, len(costs))]

    def _costs(self, whole: Sample) -> tuple[list[int], int, int]:
        """Tokens of each turn, the first with what is before it; of the head; of the tail."""
        ends = self.ends(whole)
        if ends is not None:
            head = int((~np.isin(whole.roles, _HEAD)).argmax())
            return np.diff(ends, prepend=0).tolist(), head, len(whole) - ends[-1]
        sizes = [sum(map(_letters, self._messages(turn))) for turn in range(len(self))]
        return [len(whole) * size // sum(sizes) for size in sizes], 0, 0

    def _messages(self, turn: int) -> Iterator[Message]:
        yield from self.conversation.messages[self.edges[turn] : self.edges[turn + 1]]


def _letters(message: Message) -> int:
    """How long a message is, roughly; never 0, since a template writes a header at least."""
    return 8 + len(message.content) + len(message.reasoning_content or "")


class Parts:
    """Takes the weight off what a part shares with an earlier one, or with no place of the whole.

    The tokens of a part are looked for in the whole conversation, right after those that the part
    before it had. Where they are not, since a template may write a turn otherwise when another one
    is the first or last, only the contents of messages keep their weights.

    Args:
        turns: the turns of the whole.
        whole: its one sample, None if it has several or not all answers are proven.
        each_closes: every sample is a row in its own right, with what closes a conversation.
    """

    def __init__(self, turns: Turns, whole: Sample | None, each_closes: bool = False) -> None:
        self._turns = turns
        self._whole = whole
        self._ends = None if whole is None else turns.ends(whole)
        self._each_closes = each_closes
        self._begun = False
        self._tail = 0

    def own(self, samples: Sequence[Sample], first: int, last: int) -> tuple[Sample, ...]:
        """The samples of turns [first, last) that train something, to be asked in their order."""
        own = [self._own(sample, first, last) for sample in samples]
        self._begun = True
        return tuple(sample for sample in own if sample.token_weights[1:].any())

    def _own(self, part: Sample, first: int, last: int) -> Sample:
        weights = part.token_weights.copy()
        end = 1 + int((part.roles == _ASSISTANT).nonzero()[0][-1])
        if self._begun:
            head = self._head(part, end, first, last)
            weights[np.isin(part.roles, _HEAD) if head is None else slice(head)] = 0
        if last < len(self._turns) and not self._each_closes:
            self._tail = self._shared_tail(part.input_ids[end:], last)
            weights[end + self._tail :] = 0  # such as a token that closes a whole conversation
        return replace(part, token_weights=weights)

    def _shared_tail(self, tail: np.ndarray, last: int) -> int:
        """How many tokens after the last answer of a part are after it in the whole, too."""
        if self._whole is None or self._ends is None:
            return 0
        stop = self._ends[last - 1]
        there = self._whole.input_ids[stop : stop + len(tail)]
        return len(os.path.commonprefix([tail.tolist(), there.tolist()]))

    def _head(self, part: Sample, end: int, first: int, last: int) -> int | None:
        """How many tokens of a part are before its first turn; None if that cannot be told."""
        if self._whole is None or self._ends is None:
            return None
        start = self._ends[first - 1] + self._tail
        own = self._whole.input_ids[start : self._ends[last - 1]]
        head = end - len(own)
        same = head >= 0 and np.array_equal(part.input_ids[head:end], own)
        return head if same else None
