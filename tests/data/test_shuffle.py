"""Permutations: those of a stable sort of the numbers drawn, in every order of equal ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft.data import shuffle
from varlen_sft.data.shuffle import _places, shuffled


def test_a_million_are_those_of_a_stable_sort_of_what_is_drawn():
    """Of 64 bits 20 are the place's: some neighbours are alike in the other 44."""
    import hashlib

    key = int.from_bytes(hashlib.blake2b(b"7,3", digest_size=16).digest(), "little")
    drawn = np.random.Philox(key=key).random_raw(1 << 20)
    assert (shuffled(1 << 20, 7, 3) == np.argsort(drawn, kind="stable")).all()


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 40) | st.integers(2**63, 2**63 + 9)),
    st.integers(0, 8),
    st.integers(1, 9),
)
def test_places_are_those_of_a_stable_sort(numbers, kinds, chunk):
    """Also where most high bits are equal, where numbers are, and where chunks end among them."""
    drawn = np.array(numbers, dtype=np.uint64)
    if kinds:
        drawn = drawn % np.uint64(kinds) << np.uint64(50) | drawn & np.uint64(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "CHUNK", chunk)
        found = _places(drawn.copy())
    assert found.dtype == np.int64
    assert found.tolist() == np.argsort(drawn, kind="stable").tolist()
