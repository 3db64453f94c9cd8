"""The sources of a stream, their samples numbered one source after the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from varlen_sft.data.mixture import Mixture
from varlen_sft.data.order import OrderOptions
from varlen_sft.data.packs import OverlongSample, checked_lengths
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError

__all__ = ["Source", "Sources"]


class Source(Protocol):
    """What a stream reads from; ``Store`` is one."""

    fingerprint: str
    lengths: np.ndarray  # (N,) integers, tokens of each sample

    @property
    def supervised(self) -> np.ndarray:  # (N,) integers, targets of each sample
        ...

    def sample(self, i: int) -> Sample: ...


class Sources:
    """All of them together.

    Attributes:
        parts: the sources.
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens).

    Raises:
        InputError: a sample of less than two tokens, or more than fit a pack.
    """

    def __init__(self, sources: Sequence[Source], max_tokens: int) -> None:
        self.parts = list(sources)
        rows = [_rows(part, max_tokens, k) for k, part in enumerate(sources, 1)]
        rows = rows or [np.zeros(0, np.int32)]
        self._starts = np.cumsum([0, *map(len, rows)])
        self.lengths = rows[0] if len(rows) == 1 else np.concatenate(rows)

    @property
    def fingerprint(self) -> str:
        """Of all sources, in their order."""
        prints = [source.fingerprint for source in self.parts]
        if len(prints) == 1:
            return prints[0]
        return hashlib.sha256(json.dumps(prints).encode()).hexdigest()

    def mixture(self, options: OrderOptions) -> Mixture:
        """The samples of each epoch.

        Raises:
            InputError: weights that do not fit the sources.
        """
        units = np.split(self.lengths, self._starts[1:-1])
        if options.weights is None or options.weights_count == "samples":
            units = [np.ones(len(rows), np.int8) for rows in units]
        elif options.weights_count == "supervised":
            units = [source.supervised for source in self.parts]
        return Mixture(units, options.weights, options.seed)

    def origin(self, sample: int) -> tuple[int, int]:
        """The source of a sample, and its number there, both from 0; IndexError."""
        if not 0 <= sample < len(self.lengths):
            raise IndexError(f"sample must be in [0, {len(self.lengths)}), got {sample}")
        source = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return source, int(sample - self._starts[source])

    def sample(self, sample: int) -> Sample:
        """Read it; IndexError."""
        source, number = self.origin(sample)
        return self.parts[source].sample(number)


def _rows(source: Source, max_tokens: int, number: int) -> np.ndarray:
    """(n,) integers: input tokens per sample, each from 1 to max_tokens."""
    file = getattr(source, "prefix", f"source {number}")
    rows = np.asarray(source.lengths) - 1
    if len(rows) and rows.min() < 1:
        at = int((rows < 1).argmax())
        raise InputError("a sample must have 2 tokens or more, has 1", file=file, row=at + 1)
    try:
        return checked_lengths(rows, max_tokens)
    except OverlongSample as error:
        raise InputError(
            f"the sample takes {error.length} rows of a pack, which has {max_tokens}; "
            f"{error.count} of {len(rows)} samples are too long. Take a larger max_tokens, or "
            "prepare the set with a policy for them",
            file=file,
            row=error.sample + 1,
        ) from None
