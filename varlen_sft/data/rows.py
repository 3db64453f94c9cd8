"""Rows on their way: what to tokenise, and what their tokens weigh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from varlen_sft.data.control import ControlTokens
from varlen_sft.data.conversation import Conversation, ConversationError, Row, Text, Tokens
from varlen_sft.data.crosscheck import disagreement
from varlen_sft.data.edges import Encoded, TextEncoder
from varlen_sft.data.layout import Planner
from varlen_sft.data.masks import MaskOptions, Unclean, unclean, weigh
from varlen_sft.data.normalise import normalised
from varlen_sft.data.placed import Job, Layout
from varlen_sft.data.plain import PlainEncoder, tokens_sample
from varlen_sft.data.sample import Sample
from varlen_sft.data.search import AnswerSearch
from varlen_sft.data.spans import Spans

_T = TypeVar("_T")
_KEEP_HISTORY = {
    "preserve_thinking": True,
    "keep_past_thinking": True,
    "clear_thinking": False,
    "truncate_history_thinking": False,
}
"""Variables by which templates are asked to leave earlier thinking in; each knows at most one."""


class _Pieces(NamedTuple):
    """The tokens of a text that was cut, where, and whether it spells control tokens."""

    encoded: Encoded
    cuts: Sequence[int]
    spelled: bool


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
        rows: Sequence[Row],
        jobs: Sequence[list[Job] | ConversationError],
        encoded: Sequence[Encoded | ConversationError],
        options: MaskOptions,
    ) -> Iterator[tuple[Sample, ...] | ConversationError]:
        """For each row its samples, or why its masks cannot be proven.

        Args:
            jobs: what ``jobs`` made of each row.
            encoded: the tokens of all jobs, one after the other.
        """
        flat = [job for made in jobs if isinstance(made, list) for job in made]
        weighed = iter(self._weighed(flat, encoded, options))
        for row, made in zip(rows, jobs, strict=True):
            if isinstance(made, ConversationError):
                yield made
            elif isinstance(row, Conversation):
                yield _together([next(weighed) for _ in made], options)
            else:
                yield outcome(self._without_template, row, options)

    def _without_template(self, row: Text | Tokens, options: MaskOptions) -> tuple[Sample, ...]:
        if isinstance(row, Text):
            return (self._plain.encode(row, options),)
        return (tokens_sample(row, options, self._search),)

    def _weighed(
        self,
        jobs: Sequence[Job],
        encoded: Sequence[Encoded | ConversationError],
        options: MaskOptions,
    ) -> list[Sample | ConversationError]:
        made = self._weigh(jobs, encoded, options)
        found = {k: one for k, one in enumerate(made) if isinstance(one, Unclean)}
        pieces = {
            k: outcome(self._in_pieces, jobs[k].layout, one, options) for k, one in found.items()
        }
        tokens = [one.encoded if isinstance(one, _Pieces) else one for one in pieces.values()]
        again = self._weigh([jobs[k] for k in pieces], tokens, options)
        for k, one in zip(pieces, again, strict=True):
            if isinstance(one, Unclean):  # tokens end where their text was cut
                one = ConversationError("the tokenizer does not keep to the places of a cut")
            made[k] = one
        for job, one in zip(jobs, made, strict=True):
            if isinstance(one, Sample):
                self.counts["rewritten_turns"] += len(job.layout.rewritten)
        for k, cut in pieces.items():
            if isinstance(cut, _Pieces) and isinstance(made[k], Sample):
                self.counts["straddles_cut"] += len(cut.cuts)
                self.counts["spelled_control"] += cut.spelled
        return made

    def _weigh(
        self,
        jobs: Sequence[Job],
        encoded: Sequence[Encoded | ConversationError],
        options: MaskOptions,
    ) -> list[Any]:
        """As ``masks.weigh``, where some texts have no tokens."""
        made: list[Any] = list(encoded)
        good = [k for k, one in enumerate(encoded) if isinstance(one, Encoded)]
        tokens: list[Any] = [encoded[k] for k in good]
        weighed = weigh([jobs[k] for k in good], tokens, options, self._control)
        for k, one in zip(good, weighed, strict=True):
            made[k] = one
        return made

    def _in_pieces(self, layout: Layout, found: Unclean, options: MaskOptions) -> _Pieces:
        for one in found.spelled:
            if one.in_answer and options.on_control == "error":
                raise one.error()
        cuts = found.cuts
        if found.spelled:
            encoded = self._control.encode_as_text(layout)
            again = unclean(Spans([encoded], [layout]), self._control).get(0)
            cuts = again.cuts if again else ()
        if cuts or not found.spelled:
            encoded = self._control.encode_as_text(layout, cuts)
        return _Pieces(encoded, cuts, bool(found.spelled))

    def check(self, row: Row, options: MaskOptions) -> ConversationError | None:
        """Why the second way disagrees, None where it does not or has nothing to say."""
        made = outcome(self.jobs, row, options)
        for job in made if isinstance(made, list) else ():
            found = disagreement(
                self._planner.template, job.conversation, job.layout, self._planner.turns.find_stop
            )
            if found is not None:
                return found
            (encoded,) = self._encoder.encode([job.layout.text])
            if isinstance(encoded, ConversationError) or not encoded.in_bytes:
                continue
            apart = outcome(self._control.encode_as_text, job.layout)
            spelled = any(self._control.spelled(Spans([encoded], [job.layout])))
            same = isinstance(apart, Encoded) and np.array_equal(apart.ids, encoded.ids)
            if not spelled and not same:
                return ConversationError(
                    "two ways to tokenise disagree: with the control tokens kept apart "
                    + (str(apart) if isinstance(apart, ConversationError) else "the ids differ")
                )
        return None


def _together(
    made: Sequence[Sample | ConversationError], options: MaskOptions
) -> tuple[Sample, ...] | ConversationError:
    """The samples of one row; the first reason if any of them cannot be."""
    for one in made:
        if isinstance(one, ConversationError):
            return one
    samples = tuple(one for one in made if isinstance(one, Sample))
    if options.history != "per_assistant":
        return samples
    return tuple(sample for sample in samples if sample.token_weights[1:].any())


def outcome(step: Callable[..., _T], *arguments: Any) -> _T | ConversationError:
    """What the step gives, or the ConversationError that it raises."""
    try:
        return step(*arguments)
    except ConversationError as error:
        return error
