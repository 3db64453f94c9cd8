"""Sets of tokens back to JSON lines: tokens with their weights, or the text that they spell."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.conversation import ConversationError, Tokens
from varlen_sft.data.megatron import prefix_of
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.sources import Source, read_rows
from varlen_sft.data.store import MANIFEST, Store, is_prepared
from varlen_sft.errors import InputError


def convert(source: str, out: Path, tokenizer: ChatTokenizer | None = None) -> int:
    """Write one line per sample; the file appears whole or, on an error, not at all.

    A line is ``{"input_ids": [...], "loss_mask": [...]}``, which `prepare` reads as it is: the
    weights are those of the tokens as targets, and come back bit for bit. With a tokenizer it is
    ``{"segments": [{"role", "weight", "text"}, ...]}``, one for each run of tokens of one role and
    weight. That is for people: no reader takes it for data.

    Args:
        source: a prepared set, or what ``sources.read_rows`` reads tokens from, with its mode.

    Returns:
        The number of lines.

    Raises:
        InputError: the source is damaged, a row is no tokens or does not say what is trained; an id
            that the tokenizer does not have; the file cannot be written.
    """
    out = Path(out)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    count = 0
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for number, sample in _samples(source):
                line = _tokens(sample) if tokenizer is None else None
                if tokenizer is not None:
                    line = _decoded(sample, tokenizer, source, number)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        os.replace(part, out)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=out) from None
    finally:
        with suppress(FileNotFoundError):  # it is gone after a replace that worked
            part.unlink()
    return count


def _samples(text: str) -> Iterator[tuple[int, Sample]]:
    source = Source.parse(text)
    path = Path(source.name)
    prefix = prefix_of(path) or Path(source.name.removesuffix(MANIFEST))
    if source.mode is None and is_prepared(prefix):
        store = Store(prefix)
        yield from ((i + 1, store.sample(i)) for i in range(len(store)))
        return
    for number, row in read_rows(source):
        if isinstance(row, ConversationError):
            raise InputError(str(row), file=str(source), row=number)
        if not isinstance(row, Tokens) or source.mode == "search":
            raise InputError(
                "expected tokens and what of them is trained; what needs a tokenizer is prepared "
                "first",
                file=str(source),
                row=number,
            )
        roles = np.where(row.token_weights > 0, ROLES.index("assistant"), 0).astype(np.uint8)
        yield number, Sample(row.input_ids, row.token_weights, roles)


def _tokens(sample: Sample) -> dict[str, Any]:
    weights = sample.token_weights
    whole = weights.astype(np.int64)
    plain = whole if (whole == weights).all() else weights.astype(np.float64)
    return {"input_ids": sample.input_ids.tolist(), "loss_mask": plain.tolist()}


def _decoded(sample: Sample, tokenizer: ChatTokenizer, file: str, row: int) -> dict[str, Any]:
    changes = (np.diff(sample.roles) != 0) | (np.diff(sample.token_weights) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(sample)]
    segments = []
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        try:
            text = tokenizer.decode(sample.input_ids[first:last])
        except ValueError as error:
            raise InputError(f"not of this tokenizer: {error}", file=file, row=row) from None
        role, weight = ROLES[sample.roles[first]], float(sample.token_weights[first])
        segments.append({"role": role, "weight": weight, "text": text})
    return {"segments": segments}
