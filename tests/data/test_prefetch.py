"""What is made ahead comes in order, is waited for honestly, and leaves no thread behind."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from itertools import count, islice

import pytest

from varlen_sft.data.prefetch import Prefetch, Stall


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def settled(begun: list, count: int) -> list:
    """What was begun, as soon as it is so many and a while longer."""
    until = time.monotonic() + 10
    while len(begun) < count and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    return sorted(begun)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(workers):
    def make(k: int) -> int:
        time.sleep(0.002 * (k % 3))  # later ones are ready earlier
        return k * k

    with Prefetch(range(20), make, workers=workers) as ahead:
        assert list(ahead) == [k * k for k in range(20)]
        assert list(ahead) == []


def test_never_more_than_the_depth_is_ahead():
    begun = []
    with Prefetch(count(), begun.append, workers=2, depth=3) as ahead:
        assert settled(begun, 3) == [0, 1, 2]
        next(ahead)
        assert settled(begun, 4) == [0, 1, 2, 3]
        next(ahead)
        assert settled(begun, 5) == [0, 1, 2, 3, 4]


def test_without_workers_nothing_is_made_before_it_is_asked_for():
    begun = []
    with Prefetch(count(), begun.append, workers=0) as ahead:
        next(ahead)
        assert begun == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_where_its_result_would_have_come(workers):
    def make(k: int) -> int:
        if k == 3:
            raise KeyError("three")
        return k

    with Prefetch(count(), make, workers=workers) as ahead:
        assert list(islice(ahead, 3)) == [0, 1, 2]
        with pytest.raises(KeyError, match="three"):
            next(ahead)
        assert list(ahead) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_items_comes_after_what_they_gave(workers):
    def items():
        yield 1
        raise OSError("gone")

    with Prefetch(items(), str, workers=workers) as ahead:
        assert next(ahead) == "1"
        with pytest.raises(OSError, match="gone"):
            next(ahead)


def test_a_script_that_leaves_an_iterator_open_ends():
    script = """
from itertools import count
from varlen_sft.data.prefetch import Prefetch
kept = Prefetch(count(), lambda k: k, workers=2)
def steps():
    with kept:
        yield from kept
left = steps()
print(next(left), next(left))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


def test_leaving_early_ends_the_threads():
    with Prefetch(count(), str, workers=3) as ahead:
        next(ahead)
    with pytest.raises(StopIteration):
        next(ahead)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_maker_is_waited_for(workers):
    def make(_: int) -> None:
        time.sleep(0.02)

    stall = Stall()
    with Prefetch(range(6), make, workers=workers, stall=stall) as ahead:
        assert len(list(ahead)) == 6
    assert stall.results == 6
    assert workers or stall.first_s >= 0.02  # a thread may have begun before it is asked
    assert 0.05 <= stall.waited_s <= stall.elapsed_s
    assert stall.share > 0.7


def test_a_slow_consumer_does_not_wait():
    stall = Stall()
    with Prefetch(range(6), str, workers=1, stall=stall) as ahead:
        for _ in ahead:
            time.sleep(0.02)
    assert stall.elapsed_s >= 0.1
    assert stall.share < 0.3


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_result_is_no_part_of_the_time(workers):
    stall = Stall()
    first = iter([0.3, 0.0, 0.0])
    with Prefetch(range(3), lambda _: time.sleep(next(first)), workers=workers, stall=stall) as a:
        list(a)
    assert stall.first_s >= 0.3 or (workers and stall.first_s >= 0.2)  # it began before
    assert stall.waited_s <= stall.elapsed_s < 0.2


def test_nothing_made_is_no_stall():
    assert Stall().share == 0.0


@pytest.mark.parametrize("wrong", [{"workers": -1}, {"depth": 0}])
def test_numbers_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="workers must be at least 0 and depth at least 1"):
        Prefetch([], str, **wrong)
