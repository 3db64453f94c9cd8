"""Spans of text as spans of tokens, for many rows in a few array operations.

A row is a few hundred tokens with a dozen places in them: asked one row at a time, numpy would
spend its time being called. Here the tokens of all rows stand in one line, each row's places moved
by the row's offset, with room between rows so that no search crosses from one into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from varlen_sft.data.edges import Encoded
from varlen_sft.data.placed import Answer, Layout


class Places(NamedTuple):
    """Spans of one kind, in the order of rows, each (A,) int64.

    ``row`` counts the batch's rows, ``number`` the row's messages, from 1. ``start`` and ``end``
    are units of the line, ``first`` and ``last`` its tokens [first, last) that have any of them.
    """

    row: np.ndarray
    number: np.ndarray
    start: np.ndarray
    end: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """All of their tokens, span by span, and for each the index of its span."""
        lengths = np.maximum(self.last - self.first, 0)
        moved = self.first - np.cumsum(lengths) + lengths
        which = np.repeat(np.arange(len(lengths)), lengths)
        return np.arange(len(which)) + moved[which], which


class Spans:
    """The tokens of K rows in one line of N tokens, and where their messages lie in it.

    Attributes:
        token_at: K + 1 numbers, row k has the tokens [token_at[k], token_at[k + 1]).
        ids, starts, ends: (N,) int64; places are units of the line.
        answers, others, owned: see ``Layout``; ``said`` are the answers as they came.
        stop_starts: (answers,) int64, where the stop tokens begin.
        roles: (others,) int64, role ids.
    """

    def __init__(self, encoded: Sequence[Encoded], layouts: Sequence[Layout]) -> None:
        self.said: list[Answer] = [answer for layout in layouts for answer in layout.answers]
        lengths = [len(one.ids) for one in encoded]
        self.token_at = [0, *accumulate(lengths)]
        # A character is at most four bytes; the one more keeps rows apart.
        self._offsets = np.cumsum([0, *(4 * len(layout.text) + 1 for layout in layouts)])[:-1]
        self._tables = [(k, one.unit_table()) for k, one in enumerate(encoded)]
        moved = np.repeat(self._offsets, lengths)
        self.ids = np.concatenate([one.ids for one in encoded])
        self.starts = np.concatenate([one.starts for one in encoded]) + moved
        self.ends = np.concatenate([one.ends for one in encoded]) + moved
        row, number, start, self.stop_starts, end = self._columns(
            [[answer[:4] for answer in layout.answers] for layout in layouts], 4, (1, 2, 3)
        )
        self.answers = self._located(row, number, start, end)
        others = [layout.others for layout in layouts]
        row, start, end, self.roles, number = self._columns(others, 4, (0, 1))
        self.others = self._located(row, number, start, end)
        row, start, end, number = self._columns([layout.owned for layout in layouts], 3, (0, 1))
        self.owned = self._located(row, number, start, end)

    def _columns(
        self, rows: Sequence[Sequence[tuple[int, ...]]], width: int, places: Sequence[int]
    ) -> tuple[np.ndarray, ...]:
        """The row of each tuple, then its columns; ``places`` become units of the line."""
        counts = [len(one) for one in rows]
        flat = list(chain.from_iterable(chain.from_iterable(rows)))
        columns = np.array(flat, dtype=np.int64).reshape(-1, width).T.copy()
        at = [0, *accumulate(counts)]
        for k, table in self._tables:
            if table is not None:
                own = columns[places[0] : places[-1] + 1, at[k] : at[k + 1]]
                own[:] = table[own]
        row = np.repeat(np.arange(len(rows)), counts)
        columns[places[0] : places[-1] + 1] += self._offsets[row]
        return row, *columns

    def _located(
        self, row: np.ndarray, number: np.ndarray, start: np.ndarray, end: np.ndarray
    ) -> Places:
        first = np.searchsorted(self.ends, start, "right")
        return Places(row, number, start, end, first, np.searchsorted(self.starts, end))
