"""Packs in two arrays, the simple methods, and the planner in chunks."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft.data import packing_planned, packs
from varlen_sft.data.packing import OverlongSample, Packs, pack, pack_tokens, packing_stats
from varlen_sft.errors import InputError

CASES = st.integers(1, 60).flatmap(
    lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))
)


def tolist(found: Packs) -> list[list[int]]:
    return [pack.tolist() for pack in found]


@pytest.fixture
def chunks_of_7(monkeypatch):
    monkeypatch.setattr(packs, "CHUNK", 7)
    monkeypatch.setattr(packing_planned, "CHUNK", 7)


def test_next_fit_and_none_by_hand():
    lengths = [4, 6, 1, 9, 2, 8]
    assert tolist(pack(lengths, 10, "next-fit")) == [[0, 1], [2, 3], [4, 5]]
    assert tolist(pack([4, 7, 1, 9, 2], 10, "next-fit")) == [[0], [1, 2], [3], [4]]
    assert tolist(pack(lengths, 10, "none")) == [[0], [1], [2], [3], [4], [5]]


@given(CASES)
def test_next_fit_closes_a_pack_only_when_it_must(case):
    max_tokens, lengths = case
    found = tolist(pack(lengths, max_tokens, "next-fit"))
    assert [i for ids in found for i in ids] == list(range(len(lengths)))
    for ids, after in zip(found, found[1:], strict=False):
        held = sum(lengths[i] for i in ids)
        assert held <= max_tokens < held + lengths[after[0]]


@pytest.mark.parametrize("method", ["planned", "streaming", "next-fit", "none"])
def test_any_method_packs_each_whole_sample_once(method):
    drawn = np.random.default_rng(1).lognormal(4.0, 1.0, 5000)
    lengths = np.clip(drawn.astype(np.int32), 1, 512)
    found = pack(lengths, 512, method)
    assert sorted(found.ids.tolist()) == list(range(5000))
    assert packing_stats(found, lengths, 512).tokens == lengths.sum()
    assert len(pack([], 512, method)) == 0 and tolist(pack([3], 512, method)) == [[0]]


@given(CASES)
def test_chunks_change_nothing(case):
    max_tokens, lengths = case
    whole = tolist(pack(lengths, max_tokens))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_planned, "CHUNK", 7)
        assert tolist(pack(lengths, max_tokens)) == whole


def test_order_within_packs_and_among_equals():
    # Longest first; equal lengths by id, into packs in the order they were opened.
    assert tolist(pack([3, 5, 3, 5, 2, 2, 3], 8)) == [[1, 0], [3, 2], [6, 4, 5]]
    # 3 fits both packs as tightly, and goes to the one that has had this space for longer.
    assert tolist(pack([17, 13, 4, 3], 20)) == [[0, 3], [1, 2]]


def test_more_lengths_than_fit_into_16_bits():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 70_001))
    found = pack(lengths, 70_000)
    assert sorted(found.ids.tolist()) == list(range(70_000))
    assert (pack_tokens(found, lengths) <= 70_000).all()
    assert len(found) == -(-int(lengths.sum()) // 70_000)  # l beside 70,000 - l
    for ids in found[:100]:
        assert (np.diff(lengths[ids]) < 0).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.uint64])
def test_any_integers_are_lengths(dtype):
    lengths = np.array([2, 5, 3, 7, 5, 2], dtype=dtype)
    assert tolist(pack(lengths, 10)) == [[3, 2], [1, 4], [0, 5]]
    assert tolist(pack(lengths, 10, "streaming")) == [[0, 3], [1, 4], [2, 5]]


def test_packs_are_a_sequence():
    found = Packs(np.array([4, 2, 0, 1, 3]), np.array([0, 2, 3, 5]))
    assert len(found) == 3 and found[-1].tolist() == [1, 3]
    assert tolist(found) == [[4, 2], [0], [1, 3]] == [p.tolist() for p in found[0:3]]
    with pytest.raises(IndexError):
        found[3]
    names = np.array([10, 11, 12, 13, 14], dtype=np.int32)
    assert tolist(found.relabelled(names)) == [[14, 12], [10], [11, 13]]


def test_sums(chunks_of_7):
    starts = np.array([0, 2, 3, 12, 13, 20])
    found = Packs(np.arange(20)[::-1].copy(), starts)
    values = np.arange(20, dtype=np.int32) * 100_000
    by_hand = [[values[i] for i in ids] for ids in found]
    assert found.sums(values).tolist() == [sum(map(int, row)) for row in by_hand]
    assert found.sums(values, power=2).tolist() == [sum(int(v) ** 2 for v in r) for r in by_hand]
    assert Packs(np.arange(0), np.zeros(1, int)).sums(values).tolist() == []


def test_an_overlong_sample_has_a_name():
    with pytest.raises(OverlongSample, match="sample 1 has length 9.*2 samples are longer") as e:
        pack(np.array([3, 9, 8, 10]), 8)
    assert isinstance(e.value, InputError)
    assert (e.value.sample, e.value.length, e.value.max_tokens, e.value.count) == (1, 9, 8, 2)
    with pytest.raises(InputError, match="sample 2 has length 0, must be at least 1"):
        pack([3, 4, 0], 8, "streaming")


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of .*got 'best'"):
        pack([1], 8, "best")  # type: ignore[arg-type]


def test_ten_million_lengths_need_little_memory():
    """Beyond the lengths: 8 bytes of ids and 4 of places per sample, and what packs need."""
    code = """
import numpy as np
from varlen_sft.data.packing import pack
lengths = np.clip(np.random.default_rng(0).lognormal(6.1, 1.0, 3_000_000), 1, 4096).astype(np.int32)
pack(lengths[:1000], 4096)
memory = lambda field: int(open("/proc/self/status").read().split(field + ":")[1].split()[0])
before = memory("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
packs = pack(lengths, 4096)
print((memory("VmHWM") - before) * 1024 / len(lengths))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 30  # bytes per sample: 300 MB for ten million
