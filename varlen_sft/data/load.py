"""From a file of conversations to samples, with file and row on every error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from varlen_sft.data.formats import Conversation, ConversationError, read_conversations
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer

BATCH = 256
"""Rows tokenised at a time: enough for the tokenizer's threads, little enough to hold in memory."""


def tokenize_file(
    path: str | os.PathLike[str],
    tokenizer: ChatTokenizer,
    *,
    vocab_size: int | None = None,
    max_tokens: int | None = None,
) -> Iterator[Sample]:
    """Stream one sample per conversation of a JSON lines file, in its order.

    Args:
        path: the file, see ``formats.read_conversations``.
        tokenizer: turns conversations to samples.
        vocab_size: V of the model that will be trained; ids must be below it.
        max_tokens: rows that a pack can hold; a sample of L tokens makes L - 1.

    Raises:
        InputError: with file and row, at the first conversation that cannot be used.
    """

    def check(sample: Sample) -> None:
        if vocab_size is not None:
            check_vocabulary(sample, vocab_size)
        if max_tokens is not None and len(sample) - 1 > max_tokens:
            raise InputError(f"{len(sample) - 1} rows do not fit a pack of {max_tokens} tokens")

    return _samples(path, read_conversations(path), tokenizer, check)


def check_vocabulary(sample: Sample, vocab_size: int) -> None:
    """Raise InputError for a token id outside [0, vocab_size)."""
    ids = sample.input_ids
    bad = (ids < 0) | (ids >= vocab_size)
    if bad.any():
        at = int(bad.argmax())
        raise InputError(
            f"token {at} has the id {ids[at]}, the model's vocabulary is [0, {vocab_size})"
        )


def _samples(
    path: str | os.PathLike[str],
    rows: Iterator[tuple[int, Conversation]],
    tokenizer: ChatTokenizer,
    check: Callable[[Sample], None],
) -> Iterator[Sample]:
    while batch := list(islice(rows, BATCH)):
        outcomes = tokenizer.encode_rows(conversation for _, conversation in batch)
        for (row, _), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, ConversationError):
                raise InputError(str(outcome), file=path, row=row)
            for sample in outcome:
                try:
                    check(sample)
                except InputError as error:
                    raise InputError(error.reason, file=path, row=row) from None
                yield sample
