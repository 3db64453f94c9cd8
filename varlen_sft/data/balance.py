"""The packs of an epoch to steps, and the packs of a step to ranks and micro-batches.

All ranks wait for the slowest one in every micro-batch, so the packs of one micro-batch should cost
the same. Packs are shuffled, cut into windows, sorted by cost in each, and neighbours make a step:
which packs are a step depends on the seed alone, not on how many ranks there are. Then the step's
packs, sorted again, are dealt, neighbours to one micro-batch, the dearest ones first.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from varlen_sft.data.shuffle import epoch_order, shuffled
from varlen_sft.errors import InputError

__all__ = [
    "Balance",
    "deal",
    "epoch_order",
    "epoch_steps",
    "imbalance",
    "shuffled",
    "step_order",
    "steps_of_window",
    "window_steps",
]

Balance = Literal["window", "step", "none"]
"""``window``: sorted by cost inside each window of steps; ``step``: inside each step only;
``none``: as the packs come."""


def window_steps(packs_per_step: int) -> int:
    """N where nobody chose it: 256 steps, and as many as 8192 packs make.

    Of 2048 packs of 32k tokens the dearest eight may differ by some percent.
    """
    return max(256, -(-8192 // packs_per_step))


def epoch_steps(
    costs: np.ndarray,
    packs_per_step: int,
    *,
    balance: Balance = "window",
    window: int = 256,
    seed: int = 0,
    epoch: int = 0,
) -> list[np.ndarray]:
    """The packs of each step of an epoch that is known as a whole.

    Returns:
        For each step (packs_per_step,) int64 numbers of packs; the last step has what is left.
        Arguments and order are those of ``step_order``.
    """
    order = step_order(
        costs, packs_per_step, balance=balance, window=window, seed=seed, epoch=epoch
    )
    return _cut(order, packs_per_step)


def step_order(
    costs: np.ndarray,
    packs_per_step: int,
    *,
    balance: Balance = "window",
    window: int = 256,
    seed: int = 0,
    epoch: int = 0,
    streamed: bool = False,
) -> np.ndarray:
    """(P,) int64: the packs of an epoch in the order of its steps, packs_per_step for each.

    Args:
        costs: (P,) of its packs.
        packs_per_step: packs of one step.
        window: N, about how many steps are sorted together: all windows of an epoch are even, since
            a small one has no close neighbours, see ``window_steps``.
        streamed: packs come in this order and are known a window at a time: a window is the next N
            steps, and the last one takes what is less than half a window with it. Otherwise all are
            shuffled first, but the cheapest pack, which is in the last step: it may be all but
            empty, and costs least where ranks are idle anyway.

    Raises:
        ValueError: packs_per_step or window below 1, an unknown balance.
    """
    if packs_per_step < 1 or window < 1:
        raise ValueError(
            f"packs_per_step and window must be at least 1, got {packs_per_step} and {window}"
        )
    _known(balance)
    starts = list(range(0, len(costs), window * packs_per_step)) or [0]
    if len(starts) > 1 and 2 * (len(costs) - starts[-1]) < window * packs_per_step:
        starts.pop()
    order = np.arange(len(costs))
    if not streamed:
        starts = _even_windows(len(costs) // packs_per_step, window, packs_per_step)
        order = shuffled(len(costs), seed, epoch)
    if len(costs) and not streamed:
        cheapest = costs.argmin()
        order = np.append(order[order != cheapest], cheapest)
    for number, (first, end) in enumerate(pairwise([*starts, len(costs)])):
        packs = order[first:end]
        key, last = (seed, epoch, number), number == len(starts) - 1
        packs[:] = packs[_window_order(costs[packs], packs_per_step, balance, key, last)]
    return order


def _even_windows(full: int, window: int, packs_per_step: int) -> list[int]:
    """The first pack of each window of about ``window`` steps, of an epoch of ``full`` steps."""
    windows = max(1, round(full / window))
    return [full * k // windows * packs_per_step for k in range(windows)]


def steps_of_window(
    costs: np.ndarray,
    packs_per_step: int,
    balance: Balance,
    key: tuple[int, ...],
    *,
    last: bool = False,
) -> list[np.ndarray]:
    """The packs of each step of one window.

    Args:
        costs: (n,) of the window's packs, which are in random order.
        key: of the order of the steps: seed, epoch and the number of the window.
        last: of its epoch: its last step has the cheapest packs, where they are sorted. There may
            be odd ones, when the samples that could fill them have run out, and they are together.

    Returns:
        For each step (packs_per_step,) int64 places in ``costs``. Where n is no multiple, as at the
        end of an epoch, the last step has what is left.
    """
    _known(balance)
    return _cut(_window_order(costs, packs_per_step, balance, key, last), packs_per_step)


def _window_order(
    costs: np.ndarray, packs_per_step: int, balance: Balance, key: tuple[int, ...], last: bool
) -> np.ndarray:
    """(n,) int64: places in costs, in the order of the window's steps."""
    if balance != "window":
        return np.arange(len(costs))
    order = np.argsort(costs, kind="stable")
    left = len(order) % packs_per_step
    if last and not left:
        left = min(packs_per_step, len(order))
    full = order[left:].reshape(-1, packs_per_step)
    return np.concatenate([full[shuffled(len(full), *key)].ravel(), order[:left]])


def _cut(order: np.ndarray, packs_per_step: int) -> list[np.ndarray]:
    return [order[a : a + packs_per_step] for a in range(0, len(order), packs_per_step)]


def deal(
    costs: np.ndarray,
    ranks: int,
    accumulate: int,
    *,
    packs_per_step: int | None = None,
    balance: Balance = "window",
) -> np.ndarray:
    """Deal the packs of a step, or of many steps at once, to ranks and micro-batches.

    Inside a micro-batch a dearer pack goes to the rank that has done less in it, and in the
    micro-batches before it: ranks that only meet at the end of the step are even there too.

    Args:
        costs: (..., n) of each step's packs.
        ranks, accumulate: R and A; R x A divides packs_per_step.
        packs_per_step: n where None; n may be less in the last step of an epoch.

    Returns:
        (..., A, R, packs_per_step / (R x A)) int64: places in ``costs``, and -1 where a rank has
        nothing left to do.

    Raises:
        InputError: R x A does not divide packs_per_step, or a step has more packs than that.
    """
    _known(balance)
    found = costs.shape[-1]
    packs = found if packs_per_step is None else packs_per_step
    if min(ranks, accumulate) < 1 or packs % (ranks * accumulate):
        raise InputError(
            f"packs_per_step must be a multiple of ranks x accumulation = {ranks} x {accumulate}, "
            f"got {packs}"
        )
    if found > packs:
        raise InputError(f"a step has {found} packs, more than packs_per_step = {packs}")
    order = np.broadcast_to(np.arange(found), costs.shape)
    if balance != "none":
        order = np.argsort(-costs, axis=-1, kind="stable")
    idle = np.full((*costs.shape[:-1], packs - found), -1)
    steps, in_cell = costs.shape[:-1], packs // (ranks * accumulate)
    rounds = np.concatenate([order, idle], axis=-1).reshape(*steps, packs // ranks, ranks)
    if balance != "none":
        rounds = _even(rounds, costs, in_cell)
    return rounds.reshape(*steps, accumulate, in_cell, ranks).swapaxes(-1, -2)


def _even(rounds: np.ndarray, costs: np.ndarray, in_cell: int) -> np.ndarray:
    """In each round, whose packs get cheaper, put them where less was done so far.

    Args:
        rounds: (..., rounds, R) places in costs; -1 costs nothing.
        in_cell: rounds of a micro-batch.
    """
    out = np.empty_like(rounds)
    done = np.zeros((*rounds.shape[:-2], rounds.shape[-1]), dtype=costs.dtype)
    here = done.copy()
    for k in range(rounds.shape[-2]):
        if k % in_cell == 0:
            here = np.zeros_like(done)
        places = rounds[..., k, :]
        least = np.lexsort((done, here), axis=-1)  # of ranks: the first has done least
        np.put_along_axis(out[..., k, :], least, places, axis=-1)
        added = np.zeros_like(done)
        np.put_along_axis(added, least, _cost_of(places, costs), axis=-1)
        done, here = done + added, here + added
    return out


def imbalance(costs: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(..., A) float64: the most that a rank does in a micro-batch, over the mean of all ranks.

    1.0 where nobody has anything to do.

    Args:
        costs: (..., n).
        cells: (..., A, R, k), of ``deal``.
    """
    places = cells.reshape(*cells.shape[:-3], math.prod(cells.shape[-3:]))
    work = _cost_of(places, costs).reshape(cells.shape).sum(axis=-1)
    mean = work.mean(axis=-1)
    return np.divide(work.max(axis=-1), mean, out=np.ones_like(mean), where=mean > 0)


def _cost_of(places: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(..., m): costs at places (..., m), 0 for -1."""
    with_idle = np.concatenate([costs, np.zeros((*costs.shape[:-1], 1), costs.dtype)], axis=-1)
    return np.take_along_axis(with_idle, places % with_idle.shape[-1], axis=-1)


def _known(balance: str) -> None:
    if balance not in get_args(Balance):
        raise ValueError(f"balance must be one of {get_args(Balance)}, got {balance!r}")
