"""Ranks and their micro-batches: how many there are, what is counted, how even they are."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from tests.data.streams import Made, lengths, stream
from varlen_sft.data.balance import deal, imbalance
from varlen_sft.data.order import Order, OrderOptions
from varlen_sft.data.stream import Counts
from varlen_sft.types import IGNORE_INDEX

A = 29697  # of Llama 3.2 1B, see ModelSizes.a


@pytest.mark.parametrize("ranks, micro", [(1, 12), (2, 6), (3, 4), (12, 1)])
def test_a_micro_batch_is_one_pack_unless_told_otherwise(ranks, micro):
    source = Made([33] * 24)  # each fills a pack
    order = {"packs_per_step": 12}
    for rank in range(ranks):
        found = stream(source, order, ranks=ranks, rank=rank)
        assert found.accumulate == micro
        (step,) = islice(found, 1)
        assert [len(batch.input_ids) for batch in step.batches] == [32] * micro
        assert [len(ids) for ids in step.samples] == [1] * micro


def test_fewer_micro_batches_hold_more_packs():
    source = Made([33] * 24)
    (step,) = islice(stream(source, {"packs_per_step": 12}, ranks=2, accumulate=2), 1)
    assert [len(batch.input_ids) for batch in step.batches] == [3 * 32] * 2


def test_counts_are_those_of_the_batch():
    supervised = [1, 5, 3, 2, 9, 4, 6, 7] * 5
    source = Made([10, 11, 12, 13, 14, 9, 8, 10] * 5, supervised=supervised)
    for step in islice(stream(source, ranks=2, rank=1, pad_multiple=16), 6):
        for batch, counts, ids in zip(step.batches, step.counts, step.samples, strict=True):
            rows = source.lengths[ids].astype(int) - 1
            labels = int((batch.labels != IGNORE_INDEX).sum())
            weight = float(batch.weight_sum)
            want = Counts(len(ids), int(rows.sum()), labels, weight, int(rows @ rows))
            assert counts == want
            assert not len(ids) or counts.tokens == batch.real_tokens
            assert type(counts.weight) is float and type(counts.supervised) is int


def test_an_idle_rank_counts_nothing():
    source = Made([33] * 9)
    parts = [list(islice(stream(source, ranks=4, rank=rank), 3)) for rank in range(4)]
    tail = [part[-1].counts[0] for part in parts]
    assert sorted(tail, key=lambda counts: counts.tokens) == [Counts()] * 3 + [
        Counts(1, 32, 32, 32.0, 1024)
    ]


def heavy(count: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(7.2, 1.3, count).astype(np.int32)
    return np.clip(drawn, 1, 32768)


def uneven(found: Order, ranks: int, accumulate: int, balance: str) -> np.ndarray:
    """(steps, A) of an epoch, but of its last step."""
    packs = ranks * accumulate
    steps = islice(found.walk(), found.steps(0) - 1)
    dealt = ((s.costs, deal(s.costs, ranks, accumulate, balance=balance)) for s in steps)
    return np.array([imbalance(costs, cells) for costs, cells in dealt if len(costs) == packs])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_every_micro_batch_of_an_epoch_is_even_on_heavy_tails(method, seed):
    """8 ranks at 32k: at most 1.02 where dealing as packs come shows 1.4 on average."""
    drawn = heavy(200_000, seed)
    worst = {}
    for balance in ("window", "none"):
        options = {"packs_per_step": 32, "cost_a": A, "seed": seed, "method": method}
        found = Order(drawn, OrderOptions(max_tokens=32768, balance=balance, **options))
        ratios = uneven(found, 8, 4, balance)
        assert len(ratios) == found.steps(0) - 1 > 500
        worst[balance] = ratios.max(), ratios.mean()
    assert worst["window"][0] <= 1.02 and worst["window"][1] < 1.001
    assert worst["none"][1] > 1.35


@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_few_packs_a_step_are_sorted_in_longer_windows(method):
    """One micro-batch of 8 ranks: windows of 256 steps would have 2,048 packs, too few."""
    options = {"max_tokens": 32768, "packs_per_step": 8, "cost_a": A, "method": method}
    drawn = heavy(200_000, 0)
    worst = [
        uneven(Order(drawn, OrderOptions(**options, balance_steps=steps)), 8, 1, "window").max()
        for steps in (0, 256)
    ]
    assert worst[0] <= 1.02 < worst[1]


def test_idle_ranks_of_the_tail_are_given_the_cheapest_packs_to_wait_for():
    """What is left for the last step decides how long ranks idle; it is the least there is."""
    source = Made(lengths(90))
    found = stream(source, {"cost_a": 5})
    steps = list(islice(found, found.steps_per_epoch))
    costs = [
        sorted(5 * int((source.lengths[p] - 1).sum()) + int(((source.lengths[p] - 1) ** 2).sum())
               for p in step.packs) for step in steps
    ]  # fmt: skip
    assert len(steps[-1].packs) < 4
    assert min(min(of) for of in costs) == costs[-1][0]
