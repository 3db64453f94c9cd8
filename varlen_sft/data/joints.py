"""Plain conversations laid out from what earlier ones have proven, without a second render.

Between two contents a template writes the same text every time: a joint. Joints are cut out of
conversations that were placed by their marks. A later conversation whose render is its contents
with the known joints between them, letter for letter, has them in the same places. Where one joint
is not known, or a single letter differs, this knows nothing, and the marks are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from varlen_sft.data.conversation import Conversation
from varlen_sft.data.placed import Answer, Layout
from varlen_sft.data.sample import ROLES

MOST_REMEMBERED = 4096
"""Template variables may be others in every row, and what is learned of each must not pile up."""

_ROLE_IDS = {role: number for number, role in enumerate(ROLES)}


class Joint(NamedTuple):
    """What a template writes between two contents.

    ``stop`` begins at ``stop_start`` if an answer is before it, and the generation prompt ends at
    ``start`` if one is after it; -1 otherwise.
    """

    text: str
    stop_start: int
    stop: str
    start: int


def is_plain(conversation: Conversation) -> bool:
    """Whether contents are all that its messages have."""
    return conversation.tools is None and not any(
        m.reasoning_content is not None or m.tool_calls or m.extra for m in conversation.messages
    )


class Joints:
    """The joints of one template, by the roles beside them and the setting."""

    def __init__(self) -> None:
        self._known: dict[Any, Joint] = {}

    def learn(self, setting: Any, conversation: Conversation, layout: Layout) -> None:
        """Cut the joints out of a plain conversation, if every content stands in it as it is."""
        messages, text = conversation.messages, layout.text
        contents = [text[start:end] for start, end, _ in layout.owned]
        if contents != [m.content for m in messages] or any(
            m.content != m.content.strip() for m in messages
        ):
            return
        if len(self._known) > MOST_REMEMBERED:
            self._known.clear()
        answers = {answer.number: answer for answer in layout.answers}
        edges = [(0, 0), *((start, end) for start, end, _ in layout.owned), (len(text), 0)]
        for i, ((_, first), (last, _)) in enumerate(zip(edges, edges[1:], strict=False)):
            before, after = answers.get(i), answers.get(i + 1)
            self._known[setting, *_neighbours(messages, i)] = Joint(
                text[first:last],
                before.stop_start - first if before else -1,
                before.stop if before else "",
                after.start - first if after else -1,
            )

    def lay_out(self, setting: Any, conversation: Conversation, text: str) -> Layout | None:
        """Place a plain conversation in its render; None if the joints do not tell."""
        messages = conversation.messages
        pieces: list[str] = []
        answers: list[Answer] = []
        others: list[tuple[int, int, int, int]] = []
        owned: list[tuple[int, int, int]] = []
        at = start = 0
        for i in range(len(messages) + 1):
            joint = self._known.get((setting, *_neighbours(messages, i)))
            if joint is None:
                return None
            if joint.stop:
                stop_start = at + joint.stop_start
                answers.append(
                    Answer(i, start, stop_start, stop_start + len(joint.stop), joint.stop)
                )
            pieces.append(joint.text)
            at, start = at + len(joint.text), at + joint.start
            if i == len(messages):
                break
            content, role = messages[i].content, messages[i].role
            pieces.append(content)
            first, at = at + len(content) - len(content.lstrip()), at + len(content)
            if first < at:
                owned.append((first, at, i + 1))
                if role != "assistant":
                    others.append((first, at, _ROLE_IDS[role], i + 1))
        if "".join(pieces) != text:
            return None
        return Layout(text, tuple(answers), tuple(others), tuple(owned))


def _neighbours(messages: Sequence[Any], i: int) -> tuple[str, str, bool]:
    """The roles before and after joint i, and whether the message after it is the last."""
    before = messages[i - 1].role if i else ""
    after = messages[i].role if i < len(messages) else ""
    return before, after, i + 1 == len(messages)
