"""The packs of a step of a run, for ``varlen-sft show PREFIX --step N``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.order import OrderedStep
from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.data.stream import PackStream
from varlen_sft.data.stream_state import differences, read_options
from varlen_sft.errors import InputError
from varlen_sft.tools.show_rows import Piece

if TYPE_CHECKING:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.tools.show import ShowOptions

__all__ = ["check_step_options", "step_pieces"]


def check_step_options(options: ShowOptions) -> None:
    """InputError for options that say nothing together."""
    if (options.step is None) != (options.state is None):
        raise InputError("--step and --state go together: a step of the run that the state is of")
    if options.step is None:
        if options.step_pack != 1:
            raise InputError("--step-pack says which pack of --step, but there is no --step")
        return
    if options.rows != (1,) or options.pack or options.max_tokens:
        raise InputError("--step shows a pack of a run, without --row, --pack and --max-tokens")
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
    assert options.step is not None and options.state is not None
    stream = _stream(options.file, options.state)
    ordered = stream.order.step(*stream.order.locate(options.step - 1))
    packs = [[stream.sources.sample(i) for i in pack.tolist()] for pack in ordered.packs]
    if options.step_pack > len(packs):
        raise InputError(f"step {options.step} has {len(packs)} packs, no pack {options.step_pack}")
    chosen = options.step_pack - 1
    rows = (ordered.packs[chosen] + 1).tolist()
    pieces = [Piece(f"row {n}", n, of) for n, of in zip(rows, packs[chosen], strict=True)]
    for piece in pieces:
        try:
            tokenizer.decode(piece.sample.input_ids)
        except ValueError as error:
            reason = f"not of this tokenizer: {error}"
            raise InputError(reason, file=options.file, row=piece.row) from None
    return pieces, _told(options, ordered, packs), stream.options.max_tokens


def _stream(prefix: str, path: Path) -> PackStream:
    try:
        state: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None
    order = read_options(state)
    stream = PackStream([Store(prefix)], order)
    if changed := differences(state, stream.state_dict()):
        raise InputError(f"is of another run: {'; '.join(changed)}", file=path)
    return stream


def _told(
    options: ShowOptions, ordered: OrderedStep, packs: Sequence[Sequence[Sample]]
) -> dict[str, str]:
    """The step, and a line for each of its packs."""
    told = {"step": f"{options.step:,}: step {ordered.step} of epoch {ordered.epoch}, both from 0"}
    for number, (ids, samples) in enumerate(zip(ordered.packs, packs, strict=True), 1):
        tokens = sum(len(sample) - 1 for sample in samples)
        supervised = sum(int((sample.token_weights[1:] > 0).sum()) for sample in samples)
        rows = " ".join(map(str, (np.sort(ids) + 1).tolist()))
        shown = " (shown)" * (number == options.step_pack)
        told[f"pack {number}{shown}"] = f"{tokens:,} tokens, {supervised:,} supervised, rows {rows}"
    return told
