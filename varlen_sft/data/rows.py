"""One row on its way: what to tokenise, and what its tokens weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from varlen_sft.data.control import ControlTokens, Spelled
from varlen_sft.data.conversation import Conversation, ConversationError, Row, Text, Tokens
from varlen_sft.data.crosscheck import disagreement
from varlen_sft.data.edges import Encoded, TextEncoder
from varlen_sft.data.layout import Layout, Planner
from varlen_sft.data.masks import MaskOptions, straddled, weigh
from varlen_sft.data.normalise import normalised
from varlen_sft.data.plain import PlainEncoder, tokens_sample
from varlen_sft.data.sample import Sample
from varlen_sft.data.search import AnswerSearch

_T = TypeVar("_T")
_KEEP_HISTORY = {
    "preserve_thinking": True,
    "keep_past_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
}
"""Variables by which templates are asked to leave earlier thinking in; each knows at most one."""


@dataclass(frozen=True)
class Job:
    """One row to tokenise: of a conversation, its last answer alone if ``only_last``."""

    conversation: Conversation
    layout: Layout
    only_last: bool


class RowEncoder:
    """Lays rows out before the tokenizer has them, and weighs their tokens after it.

    Attributes:
        counts: see ``ChatTokenizer``.
    """

    def __init__(
        self, encoder: TextEncoder, control: ControlTokens, planner: Planner, adds_bos: bool
    ) -> None:
        self._encoder, self._control, self._planner = encoder, control, planner
        self._search = AnswerSearch(planner.turns, control, encoder.token_bytes)
        self._plain = PlainEncoder(control, planner.template.special_tokens, adds_bos)
        self.counts: Counter[str] = Counter()

    def jobs(self, row: Row, options: MaskOptions) -> list[Job]:
        """What to tokenise for a row; nothing for rows that need no template."""
        if not isinstance(row, Conversation):
            return []
        self._control.check_settings(row)
        if self._encoder.byte_level:
            row = normalised(row, self._encoder.tokenizer.normalizer)
        if options.history == "preserve":
            row = self.keep_history(row)
        if options.history != "per_assistant":
            layout = self._planner.lay_out(row, options.supervision_mode == "last_assistant")
            if options.history == "preserve" and layout.rewritten:
                raise ConversationError(
                    f"history=preserve: the template leaves out the thinking of message "
                    f"{layout.rewritten[0]} and has no variable that keeps it"
                )
            return [Job(row, layout, False)]
        ends = [i + 1 for i, m in enumerate(row.messages) if m.role == "assistant"]
        prefixes = [replace(row, messages=row.messages[:end]) for end in ends]
        return [
            Job(prefix, self._planner.lay_out(prefix, only_last=True), True) for prefix in prefixes
        ]

    def keep_history(self, row: Conversation) -> Conversation:
        """The row with the variables by which the template leaves earlier thinking in, if any."""
        kwargs = {
            name: value
            for name, value in _KEEP_HISTORY.items()
            if name in self._planner.template.variables
        }
        return replace(row, template_kwargs={**kwargs, **row.template_kwargs})

    def samples(
        self,
        row: Row,
        jobs: Sequence[Job],
        encoded: Sequence[Encoded | ConversationError],
        options: MaskOptions,
    ) -> tuple[Sample, ...]:
        """The samples of a row; raises ConversationError where its masks cannot be proven."""
        if isinstance(row, Text):
            return (self._plain.encode(row, options),)
        if isinstance(row, Tokens):
            return (tokens_sample(row, options, self._search),)
        pairs = zip(jobs, encoded, strict=True)
        samples = tuple(self._sample(job, tokens, options) for job, tokens in pairs)
        trained = options.history != "per_assistant"
        return samples if trained else tuple(s for s in samples if s.token_weights[1:].any())

    def _sample(
        self, job: Job, encoded: Encoded | ConversationError, options: MaskOptions
    ) -> Sample:
        if isinstance(encoded, ConversationError):
            raise encoded
        spelled = list(self._control.spelled(encoded, job.layout))
        self._refuse(spelled, options)
        if spelled:
            encoded = self._control.encode_as_text(job.layout)
        cuts = straddled(job.layout, encoded)
        if cuts:
            encoded = self._control.encode_as_text(job.layout, cuts)
        sample = weigh(job.conversation, job.layout, encoded, options, self._control, job.only_last)
        self.counts["straddles_cut"] += len(cuts)
        self.counts["spelled_control"] += bool(spelled)
        self.counts["rewritten_turns"] += len(job.layout.rewritten)
        return sample

    def _refuse(self, spelled: Sequence[Spelled], options: MaskOptions) -> None:
        for one in spelled:
            if one.in_answer and options.on_control == "error":
                raise one.error()

    def check(self, row: Row, options: MaskOptions) -> ConversationError | None:
        """Why the second way disagrees, None where it does not or has nothing to say."""
        made = outcome(self.jobs, row, options)
        for job in made if isinstance(made, list) else ():
            arguments = (
                self._planner.template,
                job.conversation,
                job.layout,
                self._planner.turns.find_stop,
            )
            if (found := disagreement(*arguments)) is not None:
                return found
            (encoded,) = self._encoder.encode([job.layout.text])
            if isinstance(encoded, ConversationError) or not encoded.in_bytes:
                continue
            apart = outcome(self._control.encode_as_text, job.layout)
            spelled = any(self._control.spelled(encoded, job.layout))
            same = isinstance(apart, Encoded) and np.array_equal(apart.ids, encoded.ids)
            if not spelled and not same:
                return ConversationError(
                    "two ways to tokenise disagree: with the control tokens kept apart "
                    + (str(apart) if isinstance(apart, ConversationError) else "the ids differ")
                )
        return None


def outcome(step: Callable[..., _T], *arguments: Any) -> _T | ConversationError:
    """What the step gives, or the ConversationError that it raises."""
    try:
        return step(*arguments)
    except ConversationError as error:
        return error
