"""The rows that ``varlen-sft show`` shows: read, tokenised, and packed if wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from varlen_sft.data.conversation import ConversationError, Row
from varlen_sft.data.packing import plan_packs
from varlen_sft.data.sample import Sample
from varlen_sft.data.sources import read_rows
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.tools.show import ShowOptions

__all__ = ["Piece", "chosen", "planned"]


@dataclass(frozen=True)
class Piece:
    """One sample and where it comes from."""

    name: str  # "row 3", or "row 3, 2 of 4" if the row gives several samples
    row: int  # of the file, from 1
    sample: Sample
    counts: Counter[str] = field(default_factory=Counter)
    """``ChatTokenizer.counts`` of its row; of a row's first sample only."""


def chosen(options: ShowOptions, tokenizer: ChatTokenizer, capacity: int | None) -> list[Piece]:
    """The samples of ``options.rows``, in that order.

    Raises:
        InputError: with file and row: there is no such row, it cannot be used, or (without a row)
            all of them do not fit a pack of ``capacity`` tokens.
    """
    found: dict[int, Row | ConversationError] = {}
    last = 0
    for last, row in _rows(options):
        if last in options.rows:
            found[last] = row
        if last >= max(options.rows):
            break
    pieces: list[Piece] = []
    for number in options.rows:
        if number not in found:
            raise _no_row(options, number, last)
        pieces += _pieces(options, tokenizer, number, found[number])
    tokens = sum(len(piece.sample) - 1 for piece in pieces)
    if capacity is not None and tokens > capacity:
        reason = f"{tokens} tokens do not fit a pack of {capacity}"
        raise InputError(reason, file=options.file)
    return pieces


def planned(
    options: ShowOptions, tokenizer: ChatTokenizer, count: int, capacity: int
) -> list[Piece]:
    """The pack of the first sample of a row, when ``count`` rows from it on are packed together.

    Raises:
        InputError: with file and row: no such row, or one that cannot be used or does not fit.
    """
    (first,) = options.rows
    last = rows = 0
    ahead: list[Piece] = []
    for last, row in _rows(options):
        if last >= first:
            ahead += _pieces(options, tokenizer, last, row)
            rows += 1
        if rows == count:
            break
    if not ahead or ahead[0].row != first:
        raise _no_row(options, first, last)
    for piece in ahead:
        if len(piece.sample) - 1 > capacity:
            reason = f"{len(piece.sample) - 1} tokens do not fit a pack of {capacity}"
            raise InputError(reason, file=options.file, row=piece.row)
    packs = plan_packs([len(piece.sample) - 1 for piece in ahead], capacity)
    pack = next(pack for pack in packs if 0 in pack)
    return [ahead[i] for i in pack]


def _rows(options: ShowOptions) -> Iterator[tuple[int, Row | ConversationError]]:
    return read_rows(
        options.file,
        sample_processor=options.sample_processor,
        mask_token_ids=options.mask_token_ids,
    )


def _pieces(
    options: ShowOptions, tokenizer: ChatTokenizer, number: int, row: Row | ConversationError
) -> list[Piece]:
    """The samples of one row."""
    before = tokenizer.counts.copy()
    outcome = row if isinstance(row, ConversationError) else _encode(options, tokenizer, row)
    if isinstance(outcome, ConversationError):
        raise InputError(str(outcome), file=options.file, row=number)
    parts = len(outcome)
    names = [f"row {number}" + f", {k} of {parts}" * (parts > 1) for k in range(1, parts + 1)]
    counts = [tokenizer.counts - before, *(Counter[str]() for _ in outcome)]
    return [
        Piece(name, number, sample, count)
        for name, sample, count in zip(names, outcome, counts, strict=False)
    ]


def _encode(
    options: ShowOptions, tokenizer: ChatTokenizer, row: Row
) -> tuple[Sample, ...] | ConversationError:
    """The samples, at least one, each of tokens that can be read and shown; or why not."""
    (outcome,) = tokenizer.encode_rows([row], options.masks)
    if isinstance(outcome, ConversationError):
        return outcome
    if not outcome:
        return ConversationError("no answer is trained, so history=per_assistant makes no row")
    for sample in outcome:
        if len(sample) < 2:
            return ConversationError(
                f"a row needs a token to read and one to learn, it has {len(sample)} in all"
            )
        try:
            tokenizer.decode(sample.input_ids)
        except ValueError as error:  # ids that were made elsewhere
            return ConversationError(f"not of this tokenizer: {error}")
    return outcome


def _no_row(options: ShowOptions, number: int, last: int) -> InputError:
    """``last``: the last row of a file that ends too early, or one behind a blank line."""
    reason = "there is no such row, the line is blank"
    if last < number:
        reason = f"there is no such row, the last is row {last}" if last else "there are no rows"
    return InputError(reason, file=options.file, row=number)
