"""What an epoch will be, from lengths alone: packs, steps, fill, balance and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from varlen_sft.data.balance import Balance, deal, epoch_order, epoch_steps, imbalance
from varlen_sft.data.costs import Flops, ModelSizes, pack_costs, training_flops
from varlen_sft.data.overlong import Overlong
from varlen_sft.data.packing import Method, PackingStats, Packs, pack, packing_stats
from varlen_sft.data.packs import checked_lengths
from varlen_sft.data.plan_overlong import OverlongPlan, fit_lengths
from varlen_sft.errors import InputError

__all__ = ["Bin", "OverlongPlan", "Plan", "PlanOptions", "Spread", "histogram", "make_plan"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How samples become packs, and packs become steps."""

    max_tokens: int
    """T, the most tokens in a pack."""
    packs_per_step: int | None = None
    """Packs of one step; one per rank and micro-batch if None."""
    ranks: int = 1
    accumulate: int = 1
    method: Method = "planned"
    window: int = 64
    """W, samples that ``streaming`` holds."""
    balance: Balance = "window"
    balance_steps: int = 256
    """N, steps that are sorted together."""
    overlong: Overlong = "error"
    epochs: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("max_tokens", "packs_per_step", "ranks", "accumulate", "window", "balance_steps")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"epochs must be more than 0, got {self.epochs}")

    @property
    def step_packs(self) -> int:
        if self.packs_per_step is None:
            return self.ranks * self.accumulate
        return self.packs_per_step


@dataclass(frozen=True)
class Spread:
    """Of one number per step or micro-batch. All 0 where there is none."""

    mean: float
    least: float
    most: float
    p99: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        if not values.size:
            return cls(0.0, 0.0, 0.0, 0.0)
        found = values.mean(), values.min(), values.max(), np.quantile(values, 0.99)
        return cls(*map(float, found))


@dataclass(frozen=True)
class Bin:
    """Samples of low <= length < high."""

    low: int
    high: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """One epoch. Tokens are rows of a pack: a sample of L tokens has L - 1 of them."""

    options: PlanOptions
    samples: int
    tokens: int
    supervised: int
    overlong: OverlongPlan
    packing: PackingStats
    steps: int  # per epoch, the last of which may hold fewer packs
    last_step_packs: int
    step_tokens: Spread
    step_supervised: Spread
    imbalance: Spread  # most / mean cost over the ranks, per micro-batch of the full steps
    waiting: float  # share of the ranks' time in which they wait, by cost, of the full steps
    cost_a: int | None  # a of cost = a T + sum l^2; None: without a model only tokens count
    flops: Flops | None  # of the epoch
    steps_wanted: int  # for options.epochs
    histogram: tuple[Bin, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        if self.flops:
            found["flops"] = self.flops.to_dict()
        return found


def make_plan(
    lengths: np.ndarray | Sequence[int],
    supervised: np.ndarray | Sequence[int],
    options: PlanOptions,
    sizes: ModelSizes | None = None,
) -> Plan:
    """Plan the first epoch; the others are packed in another order.

    Args:
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens).
        supervised: (N,) integers, how many of them have a label.
        sizes: of the model, for the costs of packs and for FLOPs; None balances tokens alone.

    Raises:
        OverlongSample: a sample longer than a pack, under the policy ``error``.
        InputError: nothing to pack, fewer packs than ranks, arrays of different lengths, a length
            below 1, or ranks x accumulation that do not divide the packs of a step.
    """
    supervised = np.asarray(supervised)
    lengths = checked_lengths(lengths, max_tokens=max(np.max(lengths, initial=1), 1))
    if lengths.shape != supervised.shape:
        raise InputError(
            f"{lengths.shape} lengths and {supervised.shape} supervised counts, one of each needed"
        )
    bins = histogram(lengths)
    lengths, supervised, overlong = fit_lengths(
        lengths, supervised, options.max_tokens, options.overlong
    )
    order = epoch_order(len(lengths), options.seed, epoch=0)
    packs = pack(lengths[order], options.max_tokens, options.method, window=options.window)
    packs = packs.relabelled(order)
    if not len(packs):
        raise InputError(f"no sample to pack ({overlong.samples} were too long)")
    if len(packs) < options.ranks:
        raise InputError(f"the epoch has {len(packs)} packs, fewer than {options.ranks} ranks")
    costs = packs.sums(lengths) if sizes is None else pack_costs(packs, lengths, sizes.a)
    steps = _steps(costs, options)
    uneven, waiting = _balance(costs, steps, options)
    tokens, labels = int(lengths.sum(dtype=np.int64)), int(supervised.sum(dtype=np.int64))
    return Plan(
        options=replace(options, packs_per_step=options.step_packs),
        samples=len(lengths),
        tokens=tokens,
        supervised=labels,
        overlong=overlong,
        packing=packing_stats(packs, lengths, options.max_tokens),
        steps=len(steps),
        last_step_packs=len(steps[-1]),
        step_tokens=_per_step(packs, lengths, steps),
        step_supervised=_per_step(packs, supervised, steps),
        imbalance=uneven,
        waiting=waiting,
        cost_a=None if sizes is None else sizes.a,
        flops=None if sizes is None else _flops(lengths, labels, sizes),
        steps_wanted=math.ceil(round(options.epochs * len(steps), 6)),
        histogram=bins,
    )


def histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Bins whose edges are 2^k and 1.5 * 2^k, from the shortest sample to the longest."""
    if not len(lengths):
        return ()
    edges = np.unique([int(2**k * part) for k in range(63) for part in (1, 1.5)])
    first = np.searchsorted(edges, lengths.min(), side="right") - 1
    last = np.searchsorted(edges, lengths.max(), side="right")
    edges = edges[max(first, 0) : last + 1]
    of = np.searchsorted(edges, lengths, side="right") - 1
    samples = np.bincount(of, minlength=len(edges) - 1)
    tokens = np.bincount(of, weights=lengths, minlength=len(edges) - 1).astype(np.int64)
    parts = zip(edges[:-1], edges[1:], samples, tokens, strict=True)
    return tuple(Bin(*map(int, part)) for part in parts)


def _steps(costs: np.ndarray, options: PlanOptions) -> list[np.ndarray]:
    return epoch_steps(
        costs,
        options.step_packs,
        balance=options.balance,
        window=options.balance_steps,
        seed=options.seed,
    )


def _balance(
    costs: np.ndarray, steps: list[np.ndarray], options: PlanOptions
) -> tuple[Spread, float]:
    """Most over mean cost per micro-batch, and the share of waiting, of the full steps."""
    full = [step for step in steps if len(step) == options.step_packs]
    drawn = costs[np.array(full, dtype=np.int64).reshape(len(full), options.step_packs)]
    cells = deal(drawn, options.ranks, options.accumulate, balance=options.balance)
    uneven = imbalance(drawn, cells)
    work = np.take_along_axis(drawn, cells.reshape(drawn.shape), axis=-1).reshape(cells.shape)
    busy = work.sum() / options.ranks  # of one rank, were all even
    most = work.sum(axis=-1).max(axis=-1).sum() if len(full) else 0
    return Spread.of(uneven), float(1 - busy / most) if most else 0.0


def _per_step(packs: Packs, values: np.ndarray, steps: list[np.ndarray]) -> Spread:
    """Of the sums of the values in each step; all steps but the last are of one size."""
    sums = packs.sums(values)[np.concatenate(steps)]
    return Spread.of(np.add.reduceat(sums, np.arange(0, len(sums), len(steps[0]))))


def _flops(lengths: np.ndarray, supervised: int, sizes: ModelSizes) -> Flops:
    tokens = int(lengths.sum(dtype=np.int64))
    squares = int(np.square(lengths, dtype=np.int64).sum())
    return training_flops(sizes, tokens, squares, supervised)
