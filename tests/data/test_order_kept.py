"""What is made ahead is made once, and is there when it is asked for."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.data.test_order import lengths, names, order
from varlen_sft.data import order as module
from varlen_sft.data.order_kept import Kept


def settle(kept: Kept) -> None:
    for result in list(kept._known.values()):
        result.result(timeout=10)


def test_each_is_made_once_and_two_are_kept():
    made: list[int] = []
    kept = Kept(lambda number: made.append(number) or number * 10, "make")
    assert [kept.get(k) for k in (3, 3, 4, 3, 4)] == [30, 30, 40, 30, 40]
    assert made == [3, 4]
    assert kept.get(5) == 50 and kept.get(4) == 40  # the one asked for before stays
    assert made == [3, 4, 5]
    assert kept.get(3) == 30 and made == [3, 4, 5, 3]


def test_what_was_begun_does_not_displace_what_is_asked_for():
    made: list[int] = []
    kept = Kept(lambda number: made.append(number) or number, "make")
    kept.get(0)
    kept.get(9)
    kept.get(0)
    kept.begin(1)
    settle(kept)
    assert kept.get(0) == 0 and kept.get(1) == 1
    assert made == [0, 9, 1]
    kept.get(0)
    kept.begin(2)
    settle(kept)
    kept.get(7)  # somebody looks elsewhere while 0 is walked and 2 is made ready
    assert kept.get(0) == 0 and made == [0, 9, 1, 2, 7]


def test_who_asks_waits_for_who_makes():
    gate, made = threading.Event(), []

    def make(number: int) -> int:
        made.append(number)
        assert gate.wait(10)
        return number

    kept = Kept(make, "make")
    kept.begin(2)
    threading.Timer(0.05, gate.set).start()
    assert kept.get(2) == 2 and made == [2]


def test_an_error_is_raised_where_it_is_asked_for_and_made_again_after():
    errors = [OSError("gone")]

    def make(number: int) -> int:
        if errors:
            raise errors.pop()
        return number

    kept = Kept(make, "make")
    kept.begin(1)
    time.sleep(0.05)
    assert kept.get(1) == 1
    errors.append(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        kept.get(2)
    assert kept.get(2) == 2


@pytest.fixture
def packed(monkeypatch):
    """Numbers of the epochs that were packed, in order, with the thread that did it."""
    found: list[tuple[int, str]] = []
    for kind in ("WholeEpoch", "StreamingEpoch"):
        made = getattr(module, kind)

        def packing(lengths, ids, options, number, made=made):
            found.append((number, threading.current_thread().name))
            return made(lengths, ids, options, number)

        monkeypatch.setattr(module, kind, packing)
    return found


@pytest.mark.parametrize("method", ["planned", "streaming", "next-fit", "none"])
def test_the_next_epoch_is_packed_in_a_thread_before_it_begins(packed, method):
    found = order(lengths(200), method=method, balance_steps=3)
    walk = found.walk(ahead=True)
    first = [next(walk) for _ in range(found.steps(0) - 1)]
    assert not first[-1].last
    settle(found._epochs)
    assert [number for number, _ in packed] == [0, 1]
    assert packed[1][1] == "pack an epoch"
    assert names([*first, next(walk)]) == names([found.step(0, k) for k in range(found.steps(0))])
    assert names([next(walk)]) == names([order(lengths(200), method=method).step(1, 0)])
    assert [number for number, _ in packed][:2] == [0, 1]


def test_the_first_window_of_the_next_epoch_is_packed_with_it():
    found = order(lengths(200), method="streaming", balance_steps=100)
    next(found.walk(ahead=True))
    settle(found._epochs)
    until = time.monotonic() + 10
    windows = found._epochs._known[1].result()._windows
    while 0 not in windows._known and time.monotonic() < until:
        time.sleep(0.001)
    assert sorted(windows._known) == [0]
    settle(windows)


def test_the_next_epoch_is_packed_when_this_one_is_soon_over(packed):
    found = order(lengths(200), balance_steps=3)
    walk = found.walk(ahead=True)
    for left in range(found.steps(0), 0, -1):
        next(walk)
        settle(found._epochs)
        assert [number for number, _ in packed] == ([0, 1] if left <= 3 else [0])


def test_without_ahead_an_epoch_is_packed_when_it_begins(packed):
    found = order(lengths(200))
    walk = found.walk()
    for _ in range(found.steps(0)):
        next(walk)
    assert [number for number, _ in packed] == [0]
    next(walk)
    assert packed == [(0, "MainThread"), (1, "MainThread")]


def test_the_next_window_is_packed_in_a_thread_while_this_one_is_walked():
    found = order(lengths(400), method="streaming", balance_steps=3)
    walk = found.walk(ahead=True)
    next(walk)
    windows = found.epoch(0)._windows
    settle(windows)
    assert sorted(windows._known) == [0, 1]
    begun = windows._known[1]
    for _ in range(3):
        last = next(walk)
    assert last.step == 3 and windows._known[1] is begun
    assert list(found._epochs._known) == [0]
    walk.close()


@pytest.mark.parametrize("method", ["planned", "streaming"])
def test_a_walk_ahead_gives_the_steps_of_one_that_is_not(method):
    drawn = lengths(300)
    plain, ahead = order(drawn, method=method).walk(), order(drawn, method=method).walk(ahead=True)
    for _ in range(100):
        assert names([next(ahead)]) == names([next(plain)])


@pytest.mark.parametrize("method", ["planned", "streaming", "next-fit"])
def test_a_late_epoch_is_packed_alone(packed, method):
    found = order(lengths(200), method=method)
    found.check(7, 3, None)
    next(found.walk(7, 3))
    found.check_ranks(5)
    assert [number for number, _ in packed] == [7]


def test_a_late_step_of_epochs_that_are_alike_is_found_with_one_packing(packed):
    drawn = np.full(400, 8, np.int32)
    found = order(drawn)
    assert found.locate(7 * 25 + 3) == (7, 3)
    found.step(7, 3)
    assert [number for number, _ in packed] == [7]


def test_few_packs_are_counted_where_tokens_do_not_tell(packed):
    found = order(np.array([20, 20, 20], np.int32))  # 60 tokens fill two packs, and need three
    found.check_ranks(2)
    assert packed == []
    found.check_ranks(3)
    assert [number for number, _ in packed] == [0]
    with pytest.raises(module.InputError, match="an epoch has 3 packs, fewer than 4 ranks"):
        found.check_ranks(4)
