"""From a source of rows to samples that fit, with file and row on every error.

A row that cannot be used is an error, or counted and listed in a rejects file. Which rows are
cross-checked says their content, so it is the same rows in whatever order or file they come.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal, get_args

from varlen_sft.data.conversation import Conversation, ConversationError, Row
from varlen_sft.data.formats import read_conversations
from varlen_sft.data.overlong import Fitted, Overlong, fit_rows
from varlen_sft.data.sample import Sample
from varlen_sft.data.sources import SampleProcessor, Source, read_rows
from varlen_sft.data.tally import LoadCounts, rejects_file
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.data.masks import MaskOptions

OnError = Literal["error", "skip"]

BATCH = 256
"""Rows tokenised at a time: enough for the tokenizer's threads, little enough to hold in memory."""


class Disagreement(ConversationError):
    """The two mechanisms do not find the same answers in a row."""


class TokenizedRows(Iterator[tuple[int, tuple[Sample, ...]]]):
    """Iterates over ``(row number, samples)``; ``counts`` says what became of all rows so far."""

    def __init__(
        self, stream: Iterator[tuple[int, tuple[Sample, ...]]], counts: LoadCounts
    ) -> None:
        self._stream = stream
        self.counts = counts

    def __next__(self) -> tuple[int, tuple[Sample, ...]]:
        return next(self._stream)


@dataclass(frozen=True)
class Policy:
    """How rows become samples: the arguments of tokenize_source, checked (ValueError)."""

    options: MaskOptions
    max_tokens: int | None = None
    overlong: Overlong = "error"
    on_error: OnError = "error"
    cross_check: int | str = "none"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error must be one of {get_args(OnError)}, got {self.on_error!r}")
        every = self.cross_check
        if every not in ("all", "none") and (type(every) is not int or every < 1):
            raise ValueError(f"cross_check must be 'all', 'none' or 1 or more, got {every!r}")
        if self.overlong != "error" and self.max_tokens is None:
            raise ValueError(f"overlong={self.overlong!r} needs max_tokens")

    def checks(self, row: Row) -> bool:
        """Whether a row is cross-checked: rows that have no template need not be."""
        if not isinstance(row, Conversation) or self.cross_check == "none":
            return False
        return self.cross_check == "all" or content_hash(row) % int(self.cross_check) == 0


def tokenize_source(
    source: str | os.PathLike[str] | Source,
    tokenizer: ChatTokenizer,
    options: MaskOptions | None = None,
    *,
    max_tokens: int | None = None,
    overlong: Overlong = "error",
    on_error: OnError = "error",
    rejects: str | os.PathLike[str] | None = None,
    cross_check: int | Literal["all", "none"] = 100,
    vocab_size: int | None = None,
    sample_processor: SampleProcessor | str | None = None,
    mask_token_ids: Sequence[int] = (),
) -> TokenizedRows:
    """Stream the samples of each row that gives any, in the order of the rows.

    Args:
        source, sample_processor, mask_token_ids: see ``sources.read_rows``.
        options: what is trained; answers by default.
        max_tokens: rows that a pack can hold; a sample of L tokens makes L - 1.
        overlong: what becomes of longer ones, see ``overlong.fit_rows``.
        on_error: a row that cannot be used is an ``error``, or is left out (``skip``) and counted.
        rejects: a file of JSON lines with file, row and reason, for all that is left out: rows that
            cannot be used or do not fit, and turns that do not fit. It appears when the stream has
            ended, whole, and not at all if it did not get there.
        cross_check: of the conversations that are checked by the second mechanism, ``all``,
            ``none``, or one in this many, chosen by a hash of their messages.
        vocab_size: V of the model that will be trained; ids must be below it.

    Raises:
        InputError: with file and row: a row cannot be used and ``on_error`` is ``error``; the
            source is damaged, whatever ``on_error`` is; the rejects file cannot be written.
        ValueError: an argument is wrong.
    """
    from varlen_sft.data.masks import MaskOptions

    options = options or MaskOptions()
    policy = Policy(options, max_tokens, overlong, on_error, cross_check, vocab_size)
    source = Source.parse(source) if isinstance(source, str) else source
    source = source if isinstance(source, Source) else Source(os.fspath(source))
    if rejects is not None and os.path.realpath(rejects) == os.path.realpath(source.name):
        raise InputError("the rejects file is the source itself", file=rejects)
    rows = read_rows(source, sample_processor=sample_processor, mask_token_ids=mask_token_ids)
    counts = LoadCounts()
    return TokenizedRows(_tokenized(str(source), rows, tokenizer, policy, counts, rejects), counts)


def tokenize_file(
    path: str | os.PathLike[str],
    tokenizer: ChatTokenizer,
    *,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Sample]:
    """Stream one sample per conversation of a file, in its order.

    Args:
        path: the file, see ``formats.read_conversations``.
        tokenizer: turns conversations to samples.
        vocab_size: V of the model that will be trained; ids must be below it.
        max_tokens: rows that a pack can hold; a sample of L tokens makes L - 1.

    Raises:
        InputError: with file and row, at the first conversation that cannot be used.
    """
    from varlen_sft.data.masks import MaskOptions

    policy = Policy(MaskOptions(), max_tokens=max_tokens, vocab_size=vocab_size)
    rows = read_conversations(path)
    stream = _tokenized(os.fspath(path), rows, tokenizer, policy, LoadCounts(), None)
    return (sample for _, samples in stream for sample in samples)


def tokenize_rows(
    file: str,
    rows: Iterator[tuple[int, Row | ConversationError]],
    tokenizer: ChatTokenizer,
    policy: Policy,
    counts: LoadCounts,
    left_out: Callable[[int, str], None],
) -> Iterator[tuple[int, tuple[Sample, ...]]]:
    """As tokenize_source, of rows that were read already.

    Args:
        file: what errors name.
        counts: what became of the rows is added to it.
        left_out: told the row and the reason of all that is in no sample.
    """
    while batch := list(islice(rows, BATCH)):
        outcomes = _outcomes([row for _, row in batch], tokenizer, policy, counts)
        for (number, _), outcome in zip(batch, outcomes, strict=True):
            counts.rows += 1
            if isinstance(outcome, ConversationError):
                if policy.on_error == "error":
                    raise InputError(str(outcome), file=file, row=number)
                counts.rejected += 1
                counts.disagreements += isinstance(outcome, Disagreement)
                left_out(number, str(outcome))
                continue
            _count(counts, number, outcome)
            for reason in outcome.left_out:
                left_out(number, reason)
            if outcome.samples:
                yield number, outcome.samples


def check_vocabulary(sample: Sample, vocab_size: int) -> None:
    """Raise InputError for a token id outside [0, vocab_size)."""
    ids = sample.input_ids
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(bad.argmax())
        raise InputError(
            f"token {at} has the id {ids[at]}, the model's vocabulary is [0, {vocab_size})"
        )


def content_hash(conversation: Conversation) -> int:
    """64 bits of what is said in a conversation, the same on every machine."""
    said = [[m.role, m.content, m.reasoning_content, m.tool_calls] for m in conversation.messages]
    text = json.dumps(said, sort_keys=True, default=repr)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _tokenized(
    file: str,
    rows: Iterator[tuple[int, Row | ConversationError]],
    tokenizer: ChatTokenizer,
    policy: Policy,
    counts: LoadCounts,
    rejects: str | os.PathLike[str] | None,
) -> Iterator[tuple[int, tuple[Sample, ...]]]:
    with rejects_file(file, rejects) as left_out:
        yield from tokenize_rows(file, rows, tokenizer, policy, counts, left_out)


def _outcomes(
    rows: Sequence[Row | ConversationError],
    tokenizer: ChatTokenizer,
    policy: Policy,
    counts: LoadCounts,
) -> Iterator[Fitted | ConversationError]:
    """For each row, in its place, its samples or why it cannot be used."""
    usable = [row for row in rows if not isinstance(row, ConversationError)]
    chosen = [row for row in usable if policy.checks(row)]
    found = dict(zip(map(id, chosen), tokenizer.cross_check(chosen, policy.options), strict=True))
    fitted = iter(fit_rows(tokenizer, usable, policy.options, policy.max_tokens, policy.overlong))
    for row in rows:
        if isinstance(row, ConversationError):
            yield row
            continue
        counts.checked += id(row) in found
        outcome = next(fitted)
        if isinstance(outcome, Fitted):
            outcome = _refused(outcome, found.get(id(row)), policy.vocab_size) or outcome
        yield outcome


def _refused(
    fitted: Fitted, found: ConversationError | None, vocab_size: int | None
) -> ConversationError | None:
    """Why the samples of a row cannot be used."""
    if found is not None:
        return Disagreement(f"cross-check: {found}")
    for sample in fitted.samples:
        if len(sample) < 2:
            return ConversationError("one token alone has no target, two or more are needed")
        try:
            if vocab_size is not None:
                check_vocabulary(sample, vocab_size)
        except InputError as error:
            return ConversationError(error.reason)
    return None


def _count(counts: LoadCounts, number: int, fitted: Fitted) -> None:
    counts.overlong.add(number, fitted)
    counts.untrained += fitted.outcome == "whole" and not fitted.samples
    counts.samples += len(fitted.samples)
    counts.tokens += sum(map(len, fitted.samples))
    counts.targets += sum(int((s.token_weights[1:] > 0).sum()) for s in fitted.samples)
