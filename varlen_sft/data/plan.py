"""What an epoch will be, from lengths alone: packs, steps, fill, balance and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from varlen_sft.data.balance import Balance, deal, epoch_order, imbalance, step_order, window_steps
from varlen_sft.data.costs import Flops, ModelSizes, pack_costs, training_flops
from varlen_sft.data.length_bins import Bin, histogram
from varlen_sft.data.overlong import Overlong
from varlen_sft.data.packing import Method, PackingStats, pack
from varlen_sft.data.packs import checked_lengths, counted
from varlen_sft.data.plan_overlong import OverlongPlan, fit_lengths
from varlen_sft.errors import InputError
from varlen_sft.words import count

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
    balance_steps: int | None = None
    """N, steps that are sorted together; ``balance.window_steps`` if None."""
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
    held = _held(lengths, supervised, options, sizes)
    packs = len(held.tokens)
    if not packs:
        raise InputError(f"no sample to pack ({overlong.samples} were too long)")
    if packs < options.ranks:
        raise InputError(
            f"an epoch has {count(packs, 'pack')}, fewer than {count(options.ranks, 'rank')}"
        )
    order = _step_order(held.costs, options)
    uneven, waiting = _balance(held.costs, order, options)
    tokens, labels = int(held.tokens.sum()), int(held.supervised.sum())
    steps = -(-packs // options.step_packs)
    return Plan(
        options=replace(options, packs_per_step=options.step_packs),
        samples=len(lengths),
        tokens=tokens,
        supervised=labels,
        overlong=overlong,
        packing=counted(held.tokens, held.samples, options.max_tokens),
        steps=steps,
        last_step_packs=packs - (steps - 1) * options.step_packs,
        step_tokens=_per_step(held.tokens, order, options),
        step_supervised=_per_step(held.supervised, order, options),
        imbalance=uneven,
        waiting=waiting,
        cost_a=None if sizes is None else sizes.a,
        flops=None if sizes is None else _flops(sizes, held, labels),
        steps_wanted=math.ceil(round(options.epochs * steps, 6)),
        histogram=bins,
    )


@dataclass(frozen=True)
class _Held:
    """What each pack holds, (P,) int64."""

    samples: np.ndarray
    tokens: np.ndarray
    supervised: np.ndarray
    costs: np.ndarray


def _held(
    lengths: np.ndarray, supervised: np.ndarray, options: PlanOptions, sizes: ModelSizes | None
) -> _Held:
    """The packs of the first epoch, as a stream makes them."""
    order = epoch_order(len(lengths), options.seed, epoch=0)
    if len(order) < 2**31:
        order = order.astype(np.int32)
    drawn = lengths[order]
    packs = pack(drawn, options.max_tokens, options.method, window=options.window)
    tokens = packs.sums(drawn)
    costs = tokens if sizes is None else pack_costs(packs, drawn, sizes.a)
    del drawn
    return _Held(np.diff(packs.starts), tokens, packs.sums(supervised[order]), costs)


def _flops(sizes: ModelSizes, held: _Held, supervised: int) -> Flops:
    tokens = int(held.tokens.sum())
    squares = int(held.costs.sum()) - sizes.a * tokens
    return training_flops(sizes, tokens, squares, supervised)


def _step_order(costs: np.ndarray, options: PlanOptions) -> np.ndarray:
    return step_order(
        costs,
        options.step_packs,
        balance=options.balance,
        window=options.balance_steps or window_steps(options.step_packs),
        seed=options.seed,
        streamed=options.method == "streaming",
    )


def _balance(costs: np.ndarray, order: np.ndarray, options: PlanOptions) -> tuple[Spread, float]:
    """Most over mean cost per micro-batch, and the share of waiting, of the full steps."""
    packs = options.step_packs
    full = order[: len(order) // packs * packs].reshape(-1, packs)
    drawn = costs[full]
    if options.ranks == 1:  # nobody to wait for
        deal(drawn[:0], 1, options.accumulate)  # refuses what does not divide
        return Spread.of(np.ones(len(full))), 0.0
    cells = deal(drawn, options.ranks, options.accumulate, balance=options.balance)
    uneven = imbalance(drawn, cells)
    work = np.take_along_axis(drawn, cells.reshape(drawn.shape), axis=-1).reshape(cells.shape)
    busy = work.sum() / options.ranks  # of one rank, were all even
    most = work.sum(axis=-1).max(axis=-1).sum() if len(full) else 0
    return Spread.of(uneven), float(1 - busy / most) if most else 0.0


def _per_step(values: np.ndarray, order: np.ndarray, options: PlanOptions) -> Spread:
    """Of the sums of the packs' values in each step; the last one may have fewer packs."""
    starts = np.arange(0, len(order), options.step_packs)
    return Spread.of(np.add.reduceat(values[order], starts))
