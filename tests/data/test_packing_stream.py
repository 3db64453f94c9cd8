"""Oldest-first best fit, and its state."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft.data.packing import OverlongSample, StreamPacker, pack, pack_tokens
from varlen_sft.errors import InputError

CASES = st.integers(1, 40).flatmap(
    lambda c: st.tuples(
        st.just(c), st.lists(st.integers(1, c), max_size=100), st.integers(1, 20), st.randoms()
    )
)


def tolist(packs) -> list[list[int]]:
    return [ids.tolist() for ids in packs]


def plain(lengths, max_tokens: int, window: int, order) -> list[list[int]]:
    """The same rule, looking at everything."""
    coming, held, packs = list(order), [], []
    while True:
        while coming and len(held) < window:
            held.append(coming.pop(0))
        if not held:
            return packs
        packs.append([])
        space, taken = max_tokens, held[0]
        while taken is not None:
            held.remove(taken)
            packs[-1].append(taken)
            space -= lengths[taken]
            held += [coming.pop(0)] if coming else []
            fitting = [i for i in held if lengths[i] <= space]
            taken = max(fitting, key=lambda i: lengths[i], default=None)  # the oldest of equals


def test_a_case_by_hand():
    # 6 takes 3, not 2 or what comes in for it (5, 4); 2 takes 5, then 1; 4 is left.
    packer = StreamPacker([6, 3, 2, 5, 4, 1], 10, window=3)
    assert packer.state_dict() == {"max_tokens": 10, "cursor": 3, "window": [0, 1, 2]}
    first = next(packer)
    assert first.tolist() == [0, 1] and first.dtype == np.int64
    assert packer.state_dict() == {"max_tokens": 10, "cursor": 5, "window": [2, 3, 4]}
    assert tolist(packer) == [[2, 3, 5], [4]]
    assert packer.state_dict() == {"max_tokens": 10, "cursor": 6, "window": []}


@given(CASES)
def test_packs_are_those_of_the_plain_rule(case):
    max_tokens, lengths, window, random = case
    order = list(range(len(lengths)))
    random.shuffle(order)
    packer = StreamPacker(lengths, max_tokens, window=window, order=np.array(order, dtype=np.int64))
    found = tolist(packer)
    assert found == plain(lengths, max_tokens, window, order)
    assert sorted(i for ids in found for i in ids) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in ids) <= max_tokens for ids in found)


@given(CASES, st.data())
def test_a_state_at_any_point_gives_the_same_packs(case, data):
    max_tokens, lengths, window, random = case
    order = np.array(random.sample(range(len(lengths)), len(lengths)), dtype=np.int32)
    whole = tolist(StreamPacker(lengths, max_tokens, window=window, order=order))
    found, state = [], None
    while len(found) < len(whole):
        packer = StreamPacker(lengths, max_tokens, window=window, order=order, state=state)
        assert state is None or packer.state_dict() == state
        found += tolist(packer.take(data.draw(st.integers(1, 4))))
        state = json.loads(json.dumps(packer.state_dict()))
        assert len(state["window"]) <= window
    assert found == whole
    after = StreamPacker(lengths, max_tokens, window=window, order=order, state=state)
    assert tolist(after) == [] and len(after.take()) == 0


@given(CASES)
def test_a_window_of_one_is_next_fit(case):
    max_tokens, lengths, _, _ = case
    streamed = pack(lengths, max_tokens, "streaming", window=1)
    assert tolist(streamed) == tolist(pack(lengths, max_tokens, "next-fit"))


@given(CASES)
def test_nothing_waits_for_more_packs_than_the_window_has_samples(case):
    max_tokens, lengths, window, _ = case
    packer = StreamPacker(lengths, max_tokens, window=window)
    waited: dict[int, int] = {}
    while held := packer.state_dict()["window"]:
        waited = {i: waited.get(i, 0) + 1 for i in held}
        assert max(waited.values()) <= window
        assert next(packer)[0] == held[0]


def test_a_window_of_64_leaves_little_free():
    drawn = np.random.default_rng(0).lognormal(6.1, 1.0, 100_000)
    for max_tokens in (4096, 32768):
        lengths = np.clip(drawn.astype(np.int32), 1, max_tokens)
        tokens = pack_tokens(pack(lengths, max_tokens, "streaming"), lengths)
        assert lengths.sum() / (len(tokens) * max_tokens) > 0.997


def test_more_than_is_looked_up_at_a_time():
    lengths = np.random.default_rng(3).integers(1, 100, 10_000)
    order = np.random.default_rng(4).permutation(10_000)
    packer = StreamPacker(lengths, 128, order=order)
    first = packer.take(1500)
    rest = StreamPacker(lengths, 128, order=order, state=packer.state_dict()).take()
    assert tolist(first) + tolist(rest) == tolist(StreamPacker(lengths, 128, order=order))
    assert sorted([*first.ids, *rest.ids]) == list(range(10_000))


def test_samples_that_are_not_in_the_order_are_left_out_and_may_come_again():
    packer = StreamPacker([5, 6, 7], 10, order=np.array([2, 0, 2, 0]))
    assert tolist(packer) == [[2], [0, 0], [2]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_tokens": 11}, "it is of packs of 11 tokens, not 10"),
        ({"cursor": 9}, "it is at sample 9 of a stream of 8"),
        ({"cursor": -1}, "it is at sample -1 of a stream of 8"),
        ({"window": [2, 1, 4]}, "not rising positions before its cursor"),
        ({"window": [2, 2, 3]}, "not rising positions before its cursor"),
        ({"window": [2, 3, 5]}, "not rising positions before its cursor"),
        ({"window": [-1, 3, 4]}, "not rising positions before its cursor"),
        ({"window": [2, 3]}, "it holds 2 samples, a window of 3 was asked for"),
        ({"window": [1, 2, 3, 4]}, "it holds 4 samples, a window of 3 was asked for"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, reason):
    state = {"max_tokens": 10, "cursor": 5, "window": [2, 3, 4]}
    lengths = [6, 3, 2, 5, 4, 1, 2, 2]
    StreamPacker(lengths, 10, window=3, state=state)
    with pytest.raises(InputError, match=f"the packing state does not fit: .*{reason}"):
        StreamPacker(lengths, 10, window=3, state=state | change)


def test_a_state_that_lacks_something_is_refused():
    with pytest.raises(InputError, match="it lacks cursor, window"):
        StreamPacker([1], 10, state={"max_tokens": 10})


def test_bad_arguments_are_refused():
    with pytest.raises(OverlongSample, match="sample 1 has length 11"):
        StreamPacker([1, 11], 10)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        StreamPacker([1], 10, window=0)
    with pytest.raises(InputError, match=r"below 2\*\*31, the longest is 2147483648"):
        StreamPacker([1, 2**31], 2**31)


def test_the_longest_lengths_there_are():
    longest = 2**31 - 1
    for dtype in (np.int32, np.int64, np.uint64):
        lengths = np.array([5, longest - 5, longest, 1, longest - 1], dtype)
        assert tolist(StreamPacker(lengths, longest)) == [[0, 1], [2], [3, 4]]
