"""The packs of a step of a run, for ``varlen-sft show PREFIX --step N``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.order import OrderedStep
from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.data.stream import PackStream
from varlen_sft.data.stream_state import differences, load_state, read_options
from varlen_sft.data.stream_step import counted
from varlen_sft.errors import InputError
from varlen_sft.tools.show_rows import Piece
from varlen_sft.words import count

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.tools.show import ShowOptions

__all__ = ["check_step_options", "step_pieces"]


def check_step_options(options: ShowOptions) -> None:
    """InputError for options that say nothing together."""
    known = (options.state is not None) + (options.order is not None)
    if options.step is None:
        if known or options.sources:
            raise InputError("there is a run, but no --step of it")
        if options.step_pack != 1:
            raise InputError("--step-pack says which pack of --step, but there is no --step")
        return
    if known != 1:
        raise InputError(
            "--step needs the run: its --state, or else its --max-tokens and --packs-per-step"
        )
    if options.rows != (1,) or options.pack or options.max_tokens:
        raise InputError(
            "--step shows a pack of a run, without --row and --pack, and with --state without "
            "--max-tokens"
        )
    if options.masks != MaskOptions() or options.mask_token_ids or options.sample_processor:
        raise InputError("--step shows a prepared set, in which it is said what is trained")


def step_pieces(
    options: ShowOptions, tokenizer: ChatTokenizer
) -> tuple[list[Piece], dict[str, str], int]:
    """A pack of a step: its samples, what is to be told of the step, and T.

    Raises:
        InputError: no prepared set, no state or one of another set, no such pack of the step,
            tokens that are not the tokenizer's.
    """
    assert options.step is not None
    stream = _stream(options)
    ordered = stream.order.step(*stream.order.locate(options.step - 1))
    packs = [[stream.sources.sample(i) for i in pack.tolist()] for pack in ordered.packs]
    if options.step_pack > len(packs):
        raise InputError(
            f"step {options.step} has {count(len(packs), 'pack')}, no pack {options.step_pack}"
        )
    chosen = options.step_pack - 1
    pieces = []
    for i, sample in zip(ordered.packs[chosen].tolist(), packs[chosen], strict=True):
        source, number = stream.sources.origin(i)
        name = f"source {source + 1}, row" if options.sources else "row"
        pieces.append(Piece(f"{name} {number + 1}", number + 1, sample))
        try:
            tokenizer.decode(sample.input_ids)
        except ValueError as error:
            file = (options.file, *options.sources)[source]
            reason = f"not of this tokenizer: {error}"
            raise InputError(reason, file=file, row=number + 1) from None
    return pieces, _told(options, stream, ordered, packs), stream.options.max_tokens


def _stream(options: ShowOptions) -> PackStream:
    """The run's, of as many ranks as may be."""
    state = None if options.state is None else load_state(options.state)
    order = options.order if state is None else read_options(state)
    assert order is not None
    stream = PackStream([Store(prefix) for prefix in (options.file, *options.sources)], order)
    if state is not None and (changed := differences(state, stream.state_dict())):
        raise InputError(f"is of another run: {'; '.join(changed)}", file=options.state)
    return stream


def _told(
    options: ShowOptions,
    stream: PackStream,
    ordered: OrderedStep,
    packs: Sequence[Sequence[Sample]],
) -> dict[str, str]:
    """The step, and a line for each of its packs."""
    told = {"step": f"{options.step:,}: step {ordered.step} of epoch {ordered.epoch}, both from 0"}
    if options.sources:
        prefixes = enumerate((options.file, *options.sources), 1)
        told |= {f"source {number}": str(prefix) for number, prefix in prefixes}
    for number, (ids, samples) in enumerate(zip(ordered.packs, packs, strict=True), 1):
        counts = counted(samples)
        rows = " ".join(_row(stream, options, i) for i in np.sort(ids).tolist())
        shown = " (shown)" * (number == options.step_pack)
        told[f"pack {number}{shown}"] = (
            f"{counts.tokens:,} tokens, {counts.supervised:,} supervised, rows {rows}"
        )
    return told


def _row(stream: PackStream, options: ShowOptions, sample: int) -> str:
    """From 1; of several sources, after the source's number."""
    source, number = stream.sources.origin(sample)
    return f"{source + 1}:{number + 1}" if options.sources else str(number + 1)
