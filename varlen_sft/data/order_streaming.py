"""A streaming epoch of the global order: packs are known a window of steps at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from varlen_sft.data.balance import steps_of_window
from varlen_sft.data.order_epochs import Epoch, OrderedStep
from varlen_sft.data.order_kept import Kept
from varlen_sft.data.packing import Packs, StreamPacker
from varlen_sft.errors import InputError

__all__ = ["StreamingEpoch"]


@dataclass(frozen=True, eq=False)
class _Window:
    number: int
    packs: Packs
    costs: np.ndarray
    steps: list[np.ndarray]
    start: Mapping[str, Any]
    last: bool  # of its epoch


class StreamingEpoch(Epoch):
    """A window at a time; where the windows met so far begin is kept."""

    def _begin(self, ids: np.ndarray) -> None:
        self._ids = ids
        self._starts: dict[int, Mapping[str, Any]] = {
            0: {"number": 0, **self._packer().state_dict()}
        }
        self._left = {0: int(self.lengths[ids].sum(dtype=np.int64))}  # tokens, from there on
        self._last: int | None = None  # number of the last window, once it was met
        self._windows = Kept(self._window, "pack a window")

    def count(self) -> int:
        number = max(self._starts)
        while self._last is None:
            self._windows.get(number)
            number += 1
        window = self._windows.get(self._last)
        return window.number * self.options.balance_steps + len(window.steps)

    def packs(self) -> int:
        return len(self._windows.get(0).packs)

    def find(self, step: int) -> OrderedStep | None:
        if step < 0:
            return None
        window = self._of(step)
        place = step - window.number * self.options.balance_steps
        if place >= len(window.steps):
            return None
        places = window.steps[place]
        packs = tuple(window.packs[k] for k in places.tolist())
        last = window.last and place == len(window.steps) - 1
        return OrderedStep(self.number, step, packs, window.costs[places], last, window.start)

    def ahead(self, step: int) -> bool:
        window = self._of(step)
        if not window.last:
            self._windows.begin(window.number + 1)
        return window.last

    def begin(self, start: Mapping[str, Any]) -> None:
        number = start.get("number")
        held = start.get("window")
        whole = [number, start.get("cursor"), *(held if isinstance(held, list) else [None])]
        if not all(type(value) is int and value >= 0 for value in whole):
            raise InputError("the start of a window must be its number, a cursor and positions")
        self._packer(start)  # refuses what it cannot be
        # The tokens first: a thread may pack from any start that is known.
        to_come = self._ids[start["cursor"] :], self._ids[start["window"]]
        left = sum(int(self.lengths[i].sum(dtype=np.int64)) for i in to_come)
        self._left.setdefault(whole[0], left)
        if self._starts.setdefault(whole[0], start) != start:
            raise InputError(f"window {whole[0]} of epoch {self.number} does not start there")

    def _of(self, step: int) -> _Window:
        """The window of a step; of one after the end, the last window."""
        number = step // self.options.balance_steps
        return self._windows.get(number if self._last is None else min(number, self._last))

    def _window(self, number: int) -> _Window:
        """Pack up to a window, from the nearest one whose start is known."""
        window = self._packed(max(known for known in list(self._starts) if known <= number))
        while window.number < number and not window.last:
            window = self._packed(window.number + 1)
        return window

    def _packed(self, number: int) -> _Window:
        """Pack a window whose start is known; that of the next one is known then."""
        options, start = self.options, self._starts[number]
        packer = self._packer(start)
        packs = packer.take(options.balance_steps * options.packs_per_step)
        after = packer.state_dict()
        left = self._left[number] - int(packs.sums(self.lengths).sum())
        rest = self._short_rest(packer, left)
        last = rest is not None
        if rest is not None:
            packs, self._last = packs.followed_by(rest), number
        else:
            self._left[number + 1] = left
            self._starts[number + 1] = {"number": number + 1, **after}
        costs = self.costs(packs)
        steps = steps_of_window(
            costs,
            options.packs_per_step,
            options.balance,
            (options.seed, self.number, number),
            last=last,
        )
        return _Window(number, packs, costs, steps, start, last)

    def _short_rest(self, packer: StreamPacker, left: int) -> Packs | None:
        """All packs of ``left`` tokens, if they are less than half a window: their costs would have
        no close neighbours in a window of their own."""
        options = self.options
        least = -(-left // options.max_tokens)
        half = -(-options.balance_steps * options.packs_per_step // 2)
        if least >= half:
            return None
        rest = packer.take(half)
        return rest if len(rest) < half else None

    def _packer(self, state: Mapping[str, Any] | None = None) -> StreamPacker:
        options = self.options
        return StreamPacker(
            self.lengths, options.max_tokens, window=options.window, order=self._ids, state=state
        )
