"""Packs to steps, and the packs of a step to ranks and micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft.data.balance import (
    deal,
    epoch_order,
    epoch_steps,
    imbalance,
    shuffled,
    steps_of_window,
)
from varlen_sft.data.costs import pack_costs
from varlen_sft.data.packing import pack
from varlen_sft.errors import InputError

SHUFFLED_0_0 = [4, 0, 3, 7, 1, 9, 2, 8, 6, 5]
SHUFFLED_7_3_1 = [2, 6, 9, 1, 4, 7, 0, 5, 8, 3]
COSTS = st.lists(st.integers(1, 1000), max_size=120).map(lambda drawn: np.array(drawn, dtype=int))


def test_a_shuffle_depends_on_its_key_alone():
    assert shuffled(10, 0, 0).tolist() == SHUFFLED_0_0
    assert shuffled(10, 7, 3, 1).tolist() == SHUFFLED_7_3_1
    keys = [(0,), (0, 0), (0, 0, 0), (1, 0), (0, 1), (2**32, 0), (11, 1), (1, 11), (-1, 0)]
    assert len({tuple(shuffled(50, *key)) for key in keys}) == len(keys)
    assert sorted(shuffled(1000, 5, 6).tolist()) == list(range(1000))
    assert shuffled(10, np.int64(7), np.int32(3), 1).tolist() == SHUFFLED_7_3_1


def test_every_epoch_has_an_order_of_its_own():
    orders = [epoch_order(100, *key).tolist() for key in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert (
        len({*map(tuple, orders), tuple(shuffled(100, 0, 0)), tuple(shuffled(100, 0, 0, 0))}) == 5
    )


# ------------------------------------------------------------------ to steps


def test_the_steps_of_a_window_by_hand():
    costs = np.array([5, 1, 9, 3, 7, 2, 8])
    steps = [step.tolist() for step in steps_of_window(costs, 2, "window", (0,))]
    # Sorted: 1 | 2 3 | 5 7 | 8 9, the single one last and the others in some order.
    assert sorted(steps[:-1]) == [[0, 4], [5, 3], [6, 2]] and steps[-1] == [1]
    assert sorted(map(sorted, steps_of_window(costs, 7, "window", (0,)))) == [list(range(7))]
    for balance in ("step", "none"):
        steps = [step.tolist() for step in steps_of_window(costs, 2, balance, (0,))]
        assert steps == [[0, 1], [2, 3], [4, 5], [6]]


def test_the_last_step_of_an_epoch_has_the_cheapest_packs():
    for count in (6, 7, 8):
        costs = np.random.default_rng(count).permutation(count)
        steps = [costs[s].tolist() for s in steps_of_window(costs, 2, "window", (0,), last=True)]
        assert steps[-1] == [0, 1][: 2 - count % 2]
    assert [len(s) for s in steps_of_window(np.arange(2), 4, "window", (0,), last=True)] == [2]
    whole = epoch_steps(np.random.default_rng(1).permutation(40), 4, window=5)
    costs = np.random.default_rng(1).permutation(40)
    assert sorted(costs[whole[-1]].tolist())[0] == 0
    last = np.concatenate(whole[5:])  # the second of two windows
    assert sorted(costs[whole[-1]].tolist()) == sorted(costs[last].tolist())[:4]


@given(COSTS, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["window", "step", "none"]))
def test_every_pack_is_in_one_step(costs, packs_per_step, window, balance):
    options = {"balance": balance, "window": window, "seed": 3}
    steps = epoch_steps(costs, packs_per_step, epoch=0, **options)
    assert sorted(i for step in steps for i in step.tolist()) == list(range(len(costs)))
    assert all(len(step) == packs_per_step for step in steps[:-1])
    assert len(steps) == -(-len(costs) // packs_per_step)
    again = epoch_steps(costs, packs_per_step, epoch=0, **options)
    assert [s.tolist() for s in again] == [s.tolist() for s in steps]
    if len(costs) % packs_per_step:
        assert costs[steps[-1]].min() == costs.min()


def test_an_epoch_is_cut_into_even_windows():
    """Ranks of a window's steps by cost are disjoint; 23 steps make 5 windows."""
    costs = np.arange(23 * 4 + 1) * 10
    steps = epoch_steps(costs, 4, window=5, seed=1)
    lowest = [int(step.min()) for step in steps]
    assert len(steps[-1]) == 1 and lowest[-1] == 0
    # Sorted together means: of two steps of one window, all of one cost less than all of the other.
    spans = [(step.min(), step.max()) for step in steps[:-1]]
    sizes = [4, 5, 4, 5, 5]
    starts = [0, 4, 9, 13, 18]
    for start, size in zip(starts, sizes, strict=True):
        of = sorted(spans[start : start + size])
        assert all(a[1] < b[0] for a, b in zip(of, of[1:], strict=False))
    assert spans != sorted(spans)  # and the steps of a window are shuffled


def test_the_steps_of_a_window_are_shuffled_by_its_key():
    steps = steps_of_window(np.arange(20), 2, "window", (4, 5, 6))
    assert [step.tolist() for step in steps] == [[2 * k, 2 * k + 1] for k in shuffled(10, 4, 5, 6)]


def test_epochs_and_seeds_have_other_steps():
    costs = np.random.default_rng(0).permutation(400)
    for window in (50, 5):
        found = [
            [tuple(step) for step in epoch_steps(costs, 8, window=window, seed=seed, epoch=epoch)]
            for seed, epoch in ((0, 0), (0, 1), (1, 0))
        ]
        assert found[0] != found[1] != found[2] != found[0]
        # One window of all steps has the same ones in another order; windows of five, others.
        for a, b in ((0, 1), (0, 2)):
            assert (set(found[a]) == set(found[b])) == (window == 50)


def test_bad_steps_are_refused():
    for options in ({"packs_per_step": 0}, {"packs_per_step": 1, "window": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            epoch_steps(np.arange(3), **options)
    with pytest.raises(ValueError, match="balance must be one of .*got 'even'"):
        epoch_steps(np.arange(3), 1, balance="even")  # type: ignore[arg-type]


# ------------------------------------------------------------------- to ranks


def test_a_deal_by_hand():
    # Dearest first: 5 4 | 2 1, and the rank with the 5 gets the 1.
    costs = np.array([5, 1, 4, 2])
    cells = deal(costs, ranks=2, accumulate=2)
    assert cells.tolist() == [[[0], [2]], [[1], [3]]]
    assert imbalance(costs, cells).tolist() == [5 / 4.5, 2 / 1.5]
    # Two packs in each cell of one micro-batch: 5 + 1 and 4 + 2.
    cells = deal(costs, ranks=2, accumulate=1)
    assert cells.tolist() == [[[0, 1], [2, 3]]]
    assert imbalance(costs, cells).tolist() == [1.0]


def test_without_balance_packs_are_dealt_as_they_come():
    costs = np.array([5, 1, 4, 2, 7, 3, 6, 8])
    cells = deal(costs, 2, 2, balance="none")
    assert cells.tolist() == [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]


def test_ranks_that_have_done_more_get_less():
    costs = np.array([100, 90, 51, 50, 11, 10])
    cells = deal(costs, ranks=2, accumulate=3)
    assert costs[cells[..., 0]].tolist() == [[100, 90], [50, 51], [10, 11]]


def test_a_micro_batch_is_even_before_the_step_is():
    costs = np.array([100, 50, 10, 10, 9, 5, 4, 1])
    cells = deal(costs, ranks=2, accumulate=2)
    assert costs[cells].tolist() == [[[100, 10], [50, 10]], [[5, 4], [9, 1]]]


def test_the_last_step_leaves_ranks_idle():
    costs = np.array([5, 4, 2])
    cells = deal(costs, 2, 2, packs_per_step=4)
    assert cells.tolist() == [[[0], [1]], [[-1], [2]]]
    assert imbalance(costs, cells).tolist() == [5 / 4.5, 2.0]
    cells = deal(np.array([7]), 2, 2, packs_per_step=4, balance="none")
    assert cells.tolist() == [[[0], [-1]], [[-1], [-1]]]
    assert imbalance(np.array([7]), cells).tolist() == [2.0, 1.0]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_many_steps_are_dealt_as_each_alone(ranks, accumulate, in_cell, data):
    packs = ranks * accumulate * in_cell
    found = data.draw(st.integers(1, packs))
    row = st.lists(st.integers(1, 100), min_size=found, max_size=found)
    costs = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    balance = data.draw(st.sampled_from(["window", "step", "none"]))
    cells = deal(costs, ranks, accumulate, packs_per_step=packs, balance=balance)
    assert cells.shape == (len(costs), accumulate, ranks, in_cell)
    uneven = imbalance(costs, cells)
    for k, step in enumerate(costs):
        alone = deal(step, ranks, accumulate, packs_per_step=packs, balance=balance)
        assert cells[k].tolist() == alone.tolist()
        assert uneven[k].tolist() == imbalance(step, alone).tolist()
        dealt = sorted(alone.ravel().tolist())
        assert dealt == [-1] * (packs - found) + list(range(found))


def test_heavy_tails_are_dealt_evenly():
    drawn = np.random.default_rng(0).lognormal(7.2, 1.3, 200_000)
    lengths = np.clip(drawn.astype(np.int32), 1, 32768)
    costs = pack_costs(pack(lengths, 32768), lengths, 29697)
    worst = {}
    for balance in ("window", "step", "none"):
        steps = epoch_steps(costs, 32, balance=balance)
        full = costs[np.array(steps[:-1])]
        found = imbalance(full, deal(full, 8, 4, balance=balance))
        worst[balance] = found.max(), found.mean()
    assert worst["window"][0] < 1.02 and worst["window"][1] < 1.001
    assert worst["step"][1] < 1.1
    assert worst["none"][1] > 1.35


def test_a_deal_that_does_not_come_out_even_is_refused():
    with pytest.raises(InputError, match="multiple of ranks x accumulation = 2 x 3, got 8"):
        deal(np.arange(8), 2, 3)
    with pytest.raises(InputError, match="= 0 x 1, got 8"):
        deal(np.arange(8), 0, 1)
    with pytest.raises(InputError, match="a step has 8 packs, more than packs_per_step = 6"):
        deal(np.arange(8), 2, 3, packs_per_step=6)
    with pytest.raises(ValueError, match="balance must be one of"):
        deal(np.arange(8), 2, 2, balance="even")  # type: ignore[arg-type]
