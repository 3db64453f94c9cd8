"""How a row that is longer than a pack is cut.

Every way is a search: it asks for the samples of parts, as often as it needs to, and returns what
became of the row. So the parts of many rows are tokenised together. Conversations are cut in
``cuts_turns``.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from varlen_sft.data.conversation import Conversation, ConversationError, Row
from varlen_sft.data.sample import Sample

if TYPE_CHECKING:
    from varlen_sft.data.masks import MaskOptions

Outcome = Literal["whole", "dropped", "truncated", "split"]
Samples: TypeAlias = tuple[Sample, ...]


@dataclass(frozen=True)
class Fitted:
    """What became of a row.

    Args:
        samples: of at most max_tokens + 1 tokens each.
        outcome: "whole" if it was not over-long.
        left_out: why the row, or a part of it, is in no sample; one reason for each.
        parts_untrained: parts left out because nothing in them is trained.
        runs_masked: trained runs of tokens made elsewhere whose end was cut off.
        targets_lost: how many tokens fewer are trained than in the whole row.
    """

    samples: Samples
    outcome: Outcome = "whole"
    left_out: tuple[str, ...] = ()
    parts_untrained: int = 0
    runs_masked: int = 0
    targets_lost: int = 0


Asked: TypeAlias = list[Conversation]
Told: TypeAlias = list[Samples | ConversationError]
Found: TypeAlias = Fitted | ConversationError
Search: TypeAlias = Generator[Asked, Told, Found]


@dataclass(frozen=True)
class Case:
    """An over-long row: its samples, and what can be made of them."""

    row: Row
    whole: Samples
    options: MaskOptions
    max_tokens: int

    def fits(self, samples: Samples) -> bool:
        return all(len(sample) - 1 <= self.max_tokens for sample in samples)

    @property
    def too_long(self) -> str:
        longest = max(map(len, self.whole))
        return f"{longest - 1} rows do not fit a pack of {self.max_tokens} tokens"

    @property
    def per_assistant(self) -> bool:
        return isinstance(self.row, Conversation) and self.options.history == "per_assistant"

    @property
    def proven(self) -> bool:
        """Whether all its answers are in one sample, each with its stop token."""
        return not self.per_assistant and self.options.supervision_mode != "last_assistant"

    def dropped(self, reason: str, untrained: int = 0) -> Fitted:
        lost = _targets(self.whole)
        return Fitted((), "dropped", (reason,), parts_untrained=untrained, targets_lost=lost)

    def cut(
        self,
        outcome: Outcome,
        samples: Samples,
        left_out: Sequence[str] = (),
        untrained: int = 0,
        runs_masked: int = 0,
    ) -> Fitted:
        """What is left of the row; only what trains something is kept."""
        kept = tuple(sample for sample in samples if sample.token_weights[1:].any())
        untrained += len(samples) - len(kept)
        if not kept:
            reason = "; ".join(left_out) or "nothing of it that fits is trained"
            return self.dropped(f"{self.too_long}: {reason}", untrained)
        lost = max(0, _targets(self.whole) - _targets(kept))
        kept = self._balanced(kept)
        return Fitted(kept, outcome, tuple(left_out), untrained, runs_masked, lost)

    def _balanced(self, samples: Samples) -> Samples:
        """Weights that sum to 1, of all parts together, or of each row of an answer."""
        if not self.options.equal_sample_weight:
            return samples
        sums = [sample.token_weights[1:].sum(dtype=np.float64) for sample in samples]
        totals = sums if self.per_assistant else [sum(sums)] * len(sums)
        return tuple(
            replace(sample, token_weights=(sample.token_weights / total).astype(np.float32))
            for sample, total in zip(samples, totals, strict=True)
        )


def _targets(samples: Samples) -> int:
    return sum(int((sample.token_weights[1:] > 0).sum()) for sample in samples)


def first_tokens(case: Case) -> Fitted:
    """Of a document, or tokens made elsewhere."""
    (whole,) = case.whole
    cut = _cut(whole, 0, case.max_tokens)
    weights = cut.token_weights
    trained = np.append(weights > 0, whole.token_weights[len(cut)] > 0)
    if not trained[-2:].all():
        return case.cut("truncated", (cut,))
    start = int((~trained).nonzero()[0][-1]) + 1 if not trained.all() else 0
    if start < 2:
        return case.cut("truncated", (cut,))
    weights[start:] = 0
    return case.cut("truncated", (cut,), runs_masked=1)


def chunks(case: Case) -> Fitted:
    """Of a document, or tokens made elsewhere: parts that share one token."""
    (whole,) = case.whole
    starts = range(0, len(whole) - 1, case.max_tokens)
    return case.cut("split", tuple(_cut(whole, start, case.max_tokens) for start in starts))


def _cut(whole: Sample, start: int, rows: int) -> Sample:
    """``rows`` rows from token ``start`` on, which is no target here."""
    place = slice(start, start + rows + 1)
    weights = whole.token_weights[place].copy()
    weights[: start > 0] = 0
    return Sample(whole.input_ids[place], weights, whole.roles[place])
