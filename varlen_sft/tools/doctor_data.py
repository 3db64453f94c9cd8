"""What ``varlen-sft doctor --data`` counts while it reads every row once."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeAlias

import numpy as np

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import Conversation, ConversationError, Row, Tokens
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.sources import read_rows
from varlen_sft.errors import InputError
from varlen_sft.tools.doctor_finding import shape
from varlen_sft.tools.doctor_probes import stop_tokens
from varlen_sft.tools.doctor_strange import Traits, odd_characters

__all__ = ["Census", "DataOptions", "Refused", "take_census", "targets"]

_Read: TypeAlias = tuple[int, Row | ConversationError]
_Outcome: TypeAlias = tuple[Sample, ...] | ConversationError

BATCH = 16  # of which all are encoded again, one by one, where one of them is counted
EXAMPLES = 5  # rows named for each reason


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is read, and how many of its rows are cross-checked."""

    source: str
    sample_processor: str | None = None
    mask_token_ids: tuple[int, ...] = ()
    cross_check: int = 100


@dataclass
class Refused:
    """Rows that are refused alike: the reason of the first, how many, and the first few."""

    reason: str
    count: int = 0
    rows: list[int] = field(default_factory=list)


@dataclass
class Census:
    """Everything counted of a data file. Tokens and roles are those of its usable rows."""

    rows: int = 0
    role_tokens: np.ndarray = field(default_factory=lambda: np.zeros(len(ROLES), np.int64))
    role_trained: np.ndarray = field(default_factory=lambda: np.zeros(len(ROLES), np.int64))
    traits: list[Traits] = field(default_factory=list)
    refused: dict[str, Refused] = field(default_factory=dict)
    checked: int = 0
    disagreements: list[tuple[int, str]] = field(default_factory=list)

    def refuse(self, row: int, reason: str) -> None:
        one = self.refused.setdefault(shape(reason), Refused(reason))
        one.count += 1
        if len(one.rows) < EXAMPLES:
            one.rows.append(row)

    def compare(self, row: int, found: ConversationError | None) -> None:
        if found is not None:
            self.disagreements.append((row, str(found)))

    @property
    def tokens(self) -> int:
        return int(self.role_tokens.sum())

    @property
    def trained(self) -> int:
        return int(self.role_trained.sum())


def take_census(
    tokenizer: ChatTokenizer,
    masks: MaskOptions,
    options: DataOptions,
    progress: Callable[[str], None] = lambda text: None,
) -> Census:
    """Read every row of a source, tokenise it, and cross-check some, drawn at random (seed 0).

    Rows are read a few at a time; what is remembered of each takes some 300 bytes.

    Args:
        progress: told what is being done, in words.

    Raises:
        InputError: the source cannot be read, or has no rows.
    """
    census, counter = Census(), _Counter(tokenizer, masks)
    sample = _Reservoir(options.cross_check)
    rows = read_rows(
        options.source,
        sample_processor=options.sample_processor,
        mask_token_ids=options.mask_token_ids,
    )
    while batch := list(islice(rows, BATCH)):
        census.rows += len(batch)
        progress(f"{census.rows:,} rows read")
        sample.draw_from(batch)
        counter.count(census, batch)
    if not census.rows:
        raise InputError("there are no rows", file=options.source)
    for number, row in sample.held:
        census.checked += 1
        progress(f"{census.checked:,} of {len(sample.held):,} rows checked a second way")
        census.compare(number, *tokenizer.cross_check([row], masks))
    return census


class _Reservoir:
    """So many conversations of a stream, each as likely as any other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: list[tuple[int, Conversation]] = []
        self._seen = 0
        self._random = random.Random(0)

    def draw_from(self, batch: Sequence[_Read]) -> None:
        for number, row in batch:
            if not isinstance(row, Conversation):  # nothing else has a template to check
                continue
            self._seen += 1
            if len(self.held) < self.size:
                self.held.append((number, row))
            elif (place := self._random.randrange(self._seen)) < self.size:
                self.held[place] = number, row


class _Counter:
    """Tokenises batches of rows and adds them to a census."""

    def __init__(self, tokenizer: ChatTokenizer, masks: MaskOptions) -> None:
        self._tokenizer, self._masks = tokenizer, masks
        self._stops = {
            tokenizer.control.ids[token]
            for token in stop_tokens(tokenizer)
            if token in tokenizer.control.ids
        }
        self._first: dict[bytes, int] = {}  # row of each fingerprint

    def count(self, census: Census, batch: Sequence[_Read]) -> None:
        for number, row, outcome, counts in self._encoded(batch):
            if not isinstance(outcome, ConversationError) and isinstance(row, Tokens):
                outcome = self._known(outcome)
            if isinstance(outcome, ConversationError):
                census.refuse(number, str(outcome))
                continue
            census.traits.append(self._traits(number, row, outcome, counts))
            for sample in outcome:
                trained = sample.roles[targets(sample)]
                census.role_tokens += np.bincount(sample.roles, minlength=len(ROLES))
                census.role_trained += np.bincount(trained, minlength=len(ROLES))

    def _encoded(self, batch: Sequence[_Read]) -> Iterator[tuple[int, Any, _Outcome, Counter[str]]]:
        """Rows with their samples and what the tokenizer counted of each."""
        usable = [row for _, row in batch if not isinstance(row, ConversationError)]
        before = self._tokenizer.counts.copy()
        made = self._tokenizer.encode_rows(usable, self._masks)
        # The tokenizer counts over all rows: which one it was is asked only if there was any.
        each = self._tokenizer.counts != before
        outcomes = iter(made)
        for number, row in batch:
            if isinstance(row, ConversationError):
                yield number, row, row, Counter()
                continue
            before = self._tokenizer.counts.copy()
            outcome = next(outcomes)
            if each:
                (outcome,) = self._tokenizer.encode_rows([row], self._masks)
            yield number, row, outcome, self._tokenizer.counts - before

    def _known(self, outcome: tuple[Sample, ...]) -> _Outcome:
        """The samples, if all ids are the tokenizer's."""
        try:
            for sample in outcome:
                self._tokenizer.decode(sample.input_ids)
        except ValueError as error:
            return ConversationError(f"not of this tokenizer: {error}")
        return outcome

    def _traits(
        self, number: int, row: Row, samples: Sequence[Sample], counts: Counter[str]
    ) -> Traits:
        ids = b"|".join(sample.input_ids.tobytes() for sample in samples)
        first = self._first.setdefault(hashlib.blake2b(ids, digest_size=16).digest(), number)
        return Traits(
            row=number,
            tokens=sum(map(len, samples)),
            trained=sum(int(targets(sample).sum()) for sample in samples),
            straddles=counts["straddles_cut"],
            odd=odd_characters(row),
            empty=_empty_answers(row),
            rewritten=counts["rewritten_turns"],
            spelled=bool(counts["spelled_control"]),
            unstopped=isinstance(row, Tokens) and any(map(self._unstopped, samples)),
            repeats=0 if first == number else first,
        )

    def _unstopped(self, sample: Sample) -> bool:
        """Whether the last trained token is no stop token; in conversations that is proven."""
        trained = sample.input_ids[targets(sample)]
        return len(trained) > 0 and int(trained[-1]) not in self._stops


def targets(sample: Sample) -> np.ndarray:
    """(L,) bool, which tokens are trained: nothing comes before the first, so it is no target."""
    trained = sample.token_weights > 0
    trained[:1] = False
    return trained


def _empty_answers(row: Row) -> int:
    if not isinstance(row, Conversation):
        return 0
    said = (m for m in row.messages if m.role == "assistant" and not m.tool_calls)
    return sum(not m.content.strip() for m in said)
