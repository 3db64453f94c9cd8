"""The global order: whole epochs, packed and dealt into steps by the rule that is written down."""

from __future__ import annotations

import json
import threading
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varlen_sft.data.balance import epoch_order, epoch_steps, steps_of_window
from varlen_sft.data.mixture import Mixture
from varlen_sft.data.order import Order, OrderedStep, OrderOptions
from varlen_sft.data.packing import StreamPacker, pack
from varlen_sft.errors import InputError

METHODS = ("planned", "streaming", "next-fit", "none")


def lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 33, count).astype(np.int32)


def order(drawn: np.ndarray, mixture: Mixture | None = None, **options) -> Order:
    wanted = {"max_tokens": 32, "packs_per_step": 4, "balance_steps": 3} | options
    return Order(drawn, OrderOptions(**wanted), mixture)


def epoch_of(found: Order, epoch: int) -> list[OrderedStep]:
    return list(islice(found.walk(epoch), found.steps(epoch)))


def names(steps: list[OrderedStep]) -> list[list[list[int]]]:
    return [[pack.tolist() for pack in step.packs] for step in steps]


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 150),
    method=st.sampled_from(METHODS),
    balance=st.sampled_from(["window", "step", "none"]),
    packs=st.integers(1, 7),
    window=st.integers(1, 9),
    seed=st.integers(0, 5),
    a=st.sampled_from([None, 7]),
)
def test_every_sample_is_in_one_pack_of_each_epoch(count, method, balance, packs, window, seed, a):
    drawn = lengths(count, seed)
    options = {"method": method, "balance": balance, "packs_per_step": packs, "seed": seed}
    found = order(drawn, window=window, cost_a=a, **options)
    for epoch in (0, 3):
        steps = epoch_of(found, epoch)
        assert [(step.epoch, step.step) for step in steps] == [
            (epoch, k) for k in range(len(steps))
        ]
        assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
        assert [len(step.packs) for step in steps[:-1]] == [packs] * (len(steps) - 1)
        assert 1 <= len(steps[-1].packs) <= packs
        ids = np.concatenate([pack for step in steps for pack in step.packs])
        assert np.array_equal(np.sort(ids), np.arange(count))
        for step in steps:
            for members, cost in zip(step.packs, step.costs, strict=True):
                tokens = drawn[members].astype(int)
                assert tokens.sum() <= 32
                assert cost == (tokens.sum() if a is None else 7 * tokens.sum() + tokens @ tokens)


def test_a_planned_epoch_follows_the_rule():
    drawn = lengths(200)
    ids = epoch_order(200, 5, 1)
    packs = pack(drawn[ids], 32).relabelled(ids)
    costs = 9 * packs.sums(drawn) + packs.sums(drawn, power=2)
    steps = epoch_steps(costs, 4, window=3, seed=5, epoch=1)
    expected = [[packs[k].tolist() for k in step.tolist()] for step in steps]
    assert names(epoch_of(order(drawn, seed=5, cost_a=9), 1)) == expected


@pytest.mark.parametrize("balance", ["window", "step", "none"])
def test_streaming_packs_are_those_of_the_stream_window_by_window(balance):
    drawn = lengths(300)
    found = order(drawn, method="streaming", window=8, balance=balance)
    steps = epoch_of(found, 2)
    stream = list(StreamPacker(drawn, 32, window=8, order=epoch_order(300, 0, 2)))
    assert len(steps) == -(-len(stream) // 4)
    for first in range(0, len(steps), 3):
        window = steps[first : first + 3]
        theirs = [pack.tolist() for pack in stream[4 * first : 4 * (first + 3)]]
        mine = [pack.tolist() for step in window for pack in step.packs]
        assert sorted(mine) == sorted(theirs)
        assert (mine == theirs) == (balance != "window")
        if balance == "window":  # neighbours in cost: no step reaches into another
            ends = sorted((step.costs.min(), step.costs.max()) for step in window)
            assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("method", METHODS)
def test_epochs_are_packed_and_shuffled_anew(method):
    found = order(lengths(120), method=method)
    epochs = [names(epoch_of(found, epoch)) for epoch in range(3)]
    packs = [{tuple(sorted(pack)) for step in epoch for pack in step} for epoch in epochs]
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert epochs[a] != epochs[b]
        if method != "none":
            assert len(packs[a] & packs[b]) < len(packs[a]) / 2
    assert names(epoch_of(order(lengths(120), method=method, seed=1), 0)) != epochs[0]
    assert names(epoch_of(order(lengths(120), method=method), 1)) == epochs[1]


@pytest.mark.parametrize("method", METHODS)
def test_any_step_is_found_alone(method):
    drawn = lengths(200)
    walked = list(islice(order(drawn, method=method).walk(), 60))
    assert walked[-1].epoch >= 1
    found = order(drawn, method=method)
    for k in (59, 0, 31, 30, 7, 58):
        there = found.step(*found.locate(k))
        assert (there.epoch, there.step) == (walked[k].epoch, walked[k].step)
        assert names([there]) == names([walked[k]])
    with pytest.raises(IndexError, match="epoch 0 has .* steps, no step 1000"):
        found.step(0, 1000)
    with pytest.raises(IndexError, match=f"epoch 1 has {found.steps(1)} steps"):
        found.step(1, found.steps(1))
    with pytest.raises(IndexError, match="there is no step -1"):
        found.locate(-1)
    with pytest.raises(IndexError, match="no step -1"):
        found.step(0, -1)


@pytest.mark.parametrize("count, left", [(300, 10), (295, 6), (293, 5), (287, 1), (286, 0)])
def test_the_steps_of_a_streaming_window_follow_the_rule(count, left):
    drawn = lengths(count)
    steps = names(epoch_of(order(drawn, method="streaming", window=8, seed=5), 2))
    stream = list(StreamPacker(drawn, 32, window=8, order=epoch_order(count, 5, 2)))
    expected = []
    assert len(stream) == 14 * 12 + left
    starts = range(0, len(stream) - 5, 12)  # fewer than six are no window of their own
    for number, first in enumerate(starts):
        last = number == len(starts) - 1
        packs = stream[first:] if last else stream[first : first + 12]
        costs = np.array([drawn[pack].sum() for pack in packs])
        for places in steps_of_window(costs, 4, "window", (5, 2, number), last=last):
            expected.append([packs[k].tolist() for k in places.tolist()])
    assert steps == expected


@pytest.mark.parametrize("count, windows", [(28, 2), (29, 2), (30, 3), (31, 3), (42, 4)])
def test_half_a_window_of_half_empty_packs_is_one_of_its_own(count, windows):
    """Tokens alone would say that two such packs are one: packs are counted, and none is lost."""
    found = order(np.full(count, 17, np.int32), method="streaming", window=8)
    steps = epoch_of(found, 0)
    ids = np.concatenate([pack for step in steps for pack in step.packs])
    assert sorted(ids.tolist()) == list(range(count))
    assert {step.start["number"] for step in steps} == set(range(windows))


def test_steps_are_counted_epoch_by_epoch_where_epochs_differ():
    found = order(lengths(60), method="next-fit", packs_per_step=1)
    counts = [found.steps(epoch) for epoch in range(4)]
    assert len(set(counts)) > 1
    walked = [(s.epoch, s.step) for s in islice(found.walk(), sum(counts))]
    assert [found.locate(k) for k in range(sum(counts))] == walked


def test_a_streaming_walk_goes_on_from_a_window_without_packing_what_was_before(monkeypatch):
    drawn = lengths(400)
    walked = list(islice(order(drawn, method="streaming", window=8).walk(), 30))
    before = walked[16]
    start = json.loads(json.dumps(before.start))
    assert len(start["window"]) <= 8
    taken = []
    take = StreamPacker.take
    monkeypatch.setattr(StreamPacker, "take", lambda *a: taken.append(a[1]) or take(*a))
    again = order(drawn, method="streaming", window=8).walk(0, 17, start)
    assert names(list(islice(again, 13))) == names(walked[17:])
    assert len(taken) <= 7  # the first window, and those of the 14 steps


@pytest.mark.parametrize(
    "start, message",
    [
        ({}, "must be its number, a cursor and positions"),
        ({"number": 1, "cursor": 5.5, "window": []}, "must be its number, a cursor and positions"),
        ({"number": 1, "cursor": 40, "window": ["a"]}, "must be its number, a cursor"),
        ({"number": 1, "cursor": 40, "window": [1, 2], "max_tokens": 16}, "packs of 16 tokens"),
        ({"number": 1, "cursor": 40, "window": [1, 2], "max_tokens": 32}, "holds 2 samples"),
        (
            {"number": 0, "cursor": 40, "window": list(range(8)), "max_tokens": 32},
            "window 0 of epoch 0 does not start there",
        ),
    ],
)
def test_a_start_that_cannot_be_is_refused(start, message):
    found = order(lengths(400), method="streaming", window=8)
    with pytest.raises(InputError, match=message):
        next(found.walk(0, 3, start))


def test_a_planned_order_has_no_window_to_start_at():
    with pytest.raises(InputError, match="packs of the method 'planned' have no window"):
        next(order(lengths(40)).walk(0, 0, {"number": 0}))


def test_a_walk_begins_at_a_step_that_is_there():
    with pytest.raises(InputError, match="epoch 0 has .* steps, no step 99"):
        next(order(lengths(40)).walk(0, 99))


def test_epochs_of_a_mixture_take_their_share():
    drawn = lengths(90)
    mixture = Mixture([np.ones(60, int), np.ones(30, int)], (1, 1), 3)
    found = order(drawn, mixture, seed=3)
    seen = []
    for epoch in range(4):
        ids = np.concatenate([p for step in epoch_of(found, epoch) for p in step.packs])
        assert len(ids) == 60 and len(set(ids.tolist())) == 60
        assert np.count_nonzero(ids >= 60) == 30
        seen += ids.tolist()
    assert np.bincount(seen).tolist() == [2] * 60 + [4] * 30
    assert found.locate(found.steps(0) + 1) == (1, 1)


def test_threads_see_the_same_steps():
    drawn = lengths(500)
    expected = names(list(islice(order(drawn, method="streaming").walk(), 120)))
    shared = order(drawn, method="streaming")
    found: dict[int, list] = {}

    def look(k: int) -> None:
        found[k] = names(list(islice(shared.walk(), 120)))

    threads = [threading.Thread(target=look, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {k: expected for k in range(3)}


@pytest.mark.parametrize("name", ["max_tokens", "packs_per_step", "window"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least 1, is 0"):
        order(lengths(4), **{name: 0})


def test_as_many_steps_are_sorted_together_as_8192_packs_make_and_no_fewer_than_256():
    for packs, steps in ((1, 8192), (30, 274), (32, 256), (1000, 256)):
        assert OrderOptions(max_tokens=8, packs_per_step=packs).balance_steps == steps
    with pytest.raises(InputError, match="balance_steps must be at least 0, is -1"):
        order(lengths(4), balance_steps=-1)


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="no samples to train on"):
        order(lengths(0))
