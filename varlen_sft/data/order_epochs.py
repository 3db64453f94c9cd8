"""One epoch of the global order: its samples to packs, windows and steps. See ``order``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from varlen_sft.data.balance import Balance, epoch_steps, steps_of_window
from varlen_sft.data.costs import pack_costs
from varlen_sft.data.mixture import WeightUnit
from varlen_sft.data.packing import Method, Packs, StreamPacker, pack
from varlen_sft.errors import InputError

__all__ = ["Epoch", "OrderOptions", "OrderedStep", "StreamingEpoch", "WholeEpoch"]


@dataclass(frozen=True, kw_only=True)
class OrderOptions:
    """All that decides the global batches, beside the samples themselves."""

    max_tokens: int
    """T, the most tokens in a pack."""
    packs_per_step: int
    """P, packs of one step over all ranks and micro-batches."""
    seed: int = 0
    method: Method = "planned"
    window: int = 64
    """W, samples that ``streaming`` holds."""
    balance: Balance = "window"
    balance_steps: int = 256
    """N, steps that are sorted together."""
    cost_a: int | None = None
    """a of cost = a T + sum l^2, see ``ModelSizes.a``; None: only tokens count."""
    weights: tuple[float, ...] | None = None
    """Of the sources; None takes all samples of all of them."""
    weights_count: WeightUnit = "samples"

    def __post_init__(self) -> None:
        for name in ("max_tokens", "packs_per_step", "window", "balance_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, is {getattr(self, name)}")
        kinds = {"method": Method, "balance": Balance, "weights_count": WeightUnit}
        for name, known in kinds.items():
            if getattr(self, name) not in get_args(known):
                raise InputError(
                    f"{name} must be one of {get_args(known)}, is {getattr(self, name)!r}"
                )


@dataclass(frozen=True, eq=False)
class OrderedStep:
    """One global batch."""

    epoch: int
    step: int  # in the epoch
    packs: tuple[np.ndarray, ...]  # P of them, fewer in the last step: int64 sample ids
    costs: np.ndarray  # (len(packs),) int64
    last: bool  # of its epoch
    start: Mapping[str, Any] | None  # of its window, see Order.walk


class Epoch:
    """The steps of one epoch."""

    def __init__(
        self, lengths: np.ndarray, ids: np.ndarray, options: OrderOptions, number: int
    ) -> None:
        self.lengths, self.options, self.number = lengths, options, number
        self._begin(ids)

    def _begin(self, ids: np.ndarray) -> None:
        """Pack its samples, which come in this order, or the first of them."""
        raise NotImplementedError

    def count(self) -> int:
        """Steps there are."""
        raise NotImplementedError

    def packs(self) -> int:
        """Packs there are; of a streaming epoch, of its first window."""
        raise NotImplementedError

    def find(self, step: int) -> OrderedStep | None:
        """A step, None after the last one."""
        raise NotImplementedError

    def begin(self, start: Mapping[str, Any]) -> None:
        """Take a start of a window for true."""
        raise InputError(f"packs of the method {self.options.method!r} have no window to begin at")

    def costs(self, packs: Packs) -> np.ndarray:
        """(P,) int64."""
        a = self.options.cost_a
        return packs.sums(self.lengths) if a is None else pack_costs(packs, self.lengths, a)


class WholeEpoch(Epoch):
    """All packs at once."""

    def _begin(self, ids: np.ndarray) -> None:
        options = self.options
        self._packs = pack(self.lengths[ids], options.max_tokens, options.method).relabelled(ids)
        self._costs = self.costs(self._packs)
        self._steps = epoch_steps(
            self._costs,
            options.packs_per_step,
            balance=options.balance,
            window=options.balance_steps,
            seed=options.seed,
            epoch=self.number,
        )

    def count(self) -> int:
        return len(self._steps)

    def packs(self) -> int:
        return len(self._packs)

    def find(self, step: int) -> OrderedStep | None:
        if not 0 <= step < len(self._steps):
            return None
        places = self._steps[step]
        packs = tuple(self._packs[k] for k in places.tolist())
        last = step == len(self._steps) - 1
        return OrderedStep(self.number, step, packs, self._costs[places], last, None)


class StreamingEpoch(Epoch):
    """A window at a time; where the windows met so far begin is kept."""

    def _begin(self, ids: np.ndarray) -> None:
        self._ids = ids
        first = {"number": 0, **self._packer().state_dict()}
        self._starts: dict[int, Mapping[str, Any]] = {0: first}
        self._open(0)

    def count(self) -> int:
        while not self._last:
            self._open(self._number + 1)
        return self._number * self.options.balance_steps + len(self._steps)

    def packs(self) -> int:
        self._open(0)
        return len(self._packs)

    def find(self, step: int) -> OrderedStep | None:
        number, place = divmod(step, self.options.balance_steps)
        if number < 0 or not self._reach(number) or place >= len(self._steps):
            return None
        places = self._steps[place]
        packs = tuple(self._packs[k] for k in places.tolist())
        last = self._last and place == len(self._steps) - 1
        start = self._starts[number]
        return OrderedStep(self.number, step, packs, self._costs[places], last, start)

    def begin(self, start: Mapping[str, Any]) -> None:
        number = start.get("number")
        held = start.get("window")
        whole = [number, start.get("cursor"), *(held if isinstance(held, list) else [None])]
        if not all(type(value) is int and value >= 0 for value in whole):
            raise InputError("the start of a window must be its number, a cursor and positions")
        self._packer(start)  # refuses what it cannot be
        if self._starts.setdefault(whole[0], start) != start:
            raise InputError(f"window {whole[0]} of epoch {self.number} does not start there")

    def _reach(self, number: int) -> bool:
        """Open a window, if the epoch has it."""
        if number != self._number:
            self._open(max(known for known in self._starts if known <= number))
        while self._number < number and not self._last:
            self._open(self._number + 1)
        return self._number == number

    def _open(self, number: int) -> None:
        """Pack a window whose start is known; that of the next one is known then."""
        options = self.options
        packer = self._packer(self._starts[number])
        self._packs = packer.take(options.balance_steps * options.packs_per_step)
        after = packer.state_dict()
        self._number, self._last = number, not after["window"]
        if not self._last:
            self._starts[number + 1] = {"number": number + 1, **after}
        self._costs = self.costs(self._packs)
        key = (options.seed, self.number, number)
        self._steps = steps_of_window(self._costs, options.packs_per_step, options.balance, key)

    def _packer(self, state: Mapping[str, Any] | None = None) -> StreamPacker:
        options = self.options
        return StreamPacker(
            self.lengths, options.max_tokens, window=options.window, order=self._ids, state=state
        )
