"""One epoch of the global order: its samples to packs, windows and steps. See ``order``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from varlen_sft.data.balance import Balance, epoch_steps, window_steps
from varlen_sft.data.costs import pack_costs
from varlen_sft.data.mixture import WeightUnit
from varlen_sft.data.packing import Method, Packs, pack
from varlen_sft.errors import InputError

__all__ = ["Epoch", "OrderOptions", "OrderedStep", "WholeEpoch"]


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
    balance_steps: int = 0
    """N, steps that are sorted together; 0 is made ``balance.window_steps``."""
    cost_a: int | None = None
    """a of cost = a T + sum l^2, see ``ModelSizes.a``; None: only tokens count."""
    weights: tuple[float, ...] | None = None
    """Of the sources; None takes all samples of all of them."""
    weights_count: WeightUnit = "samples"

    def __post_init__(self) -> None:
        for name, least in {
            "max_tokens": 1,
            "packs_per_step": 1,
            "window": 1,
            "balance_steps": 0,
        }.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, is {getattr(self, name)}")
        kinds = {"method": Method, "balance": Balance, "weights_count": WeightUnit}
        for name, known in kinds.items():
            if getattr(self, name) not in get_args(known):
                raise InputError(
                    f"{name} must be one of {get_args(known)}, is {getattr(self, name)!r}"
                )
        if not self.balance_steps:  # written out: a state says what its order was made with
            object.__setattr__(self, "balance_steps", window_steps(self.packs_per_step))


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

    def ahead(self, step: int) -> bool:
        """Whether the epoch is soon over. What comes after a step is made ready in a thread."""
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

    def ahead(self, step: int) -> bool:
        return len(self._steps) - step <= self.options.balance_steps
