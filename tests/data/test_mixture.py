"""Mixtures: the shares are those asked for, and no sample is favoured."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from varlen_sft.data.mixture import Mixture
from varlen_sft.errors import InputError


def ones(*counts: int) -> list[np.ndarray]:
    return [np.ones(count, np.int64) for count in counts]


def test_without_weights_an_epoch_is_everything():
    mixture = Mixture(ones(3, 4), None, 0)
    assert mixture.whole
    first, second = mixture.ids(0), mixture.ids(1)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first.tolist() != second.tolist()
    assert mixture.ids(0).tolist() == first.tolist()
    assert Mixture(ones(3, 4), None, 1).ids(0).tolist() != first.tolist()


def test_the_source_that_runs_out_first_is_taken_whole():
    mixture = Mixture(ones(100, 30), (1, 1), 0)
    assert not mixture.whole
    ids = mixture.ids(0)
    assert len(ids) == 60
    assert set(range(100, 130)) <= set(ids.tolist())


def test_a_share_by_tokens_ends_at_the_sample_that_reaches_it():
    units = [np.full(50, 10), np.array([7, 8])]
    ids = Mixture(units, (2, 1), 0).ids(0)
    assert sorted(ids[ids >= 50]) == [50, 51]
    assert np.count_nonzero(ids < 50) == 3  # 30 of 30 wanted


def test_what_was_taken_too_much_is_given_back_in_the_next_epoch():
    units = [np.full(50, 10), np.array([7, 8])]
    mixture = Mixture(units, (1, 1), 0)
    # Wanted in all 15, 30, 45, 60: taken 20, 30, 50, 60.
    assert [np.count_nonzero(mixture.ids(e) < 50) for e in range(4)] == [2, 1, 2, 1]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    units=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=3),
    seed=st.integers(0, 3),
)
def test_over_epochs_no_sample_is_favoured(data, units, seed):
    units = [np.array([*part, 1]) for part in units]
    weights = tuple(data.draw(st.floats(0.01, 100)) for _ in units)
    mixture = Mixture(units, weights, seed)
    totals = [int(part.sum()) for part in units]
    scale = min(total / Fraction(w) for total, w in zip(totals, weights, strict=True))
    edges = np.cumsum([0, *map(len, units)])
    flat = np.concatenate(units)
    taken: Counter[int] = Counter()
    for epoch in range(7):
        ids = mixture.ids(epoch).tolist()
        assert len(set(ids)) == len(ids)
        taken.update(ids)
        for k, weight in enumerate(weights):
            own = [taken[i] for i in range(edges[k], edges[k + 1])]
            assert max(own) - min(own) <= 1
            given = int(np.dot(own, flat[edges[k] : edges[k + 1]]))
            wanted = math.floor((epoch + 1) * scale * Fraction(weight))
            assert wanted <= given < wanted + max(10, 1)


def test_an_epoch_is_the_same_whatever_was_asked_before():
    units = [np.arange(1, 40), np.arange(1, 9)]
    whole = [Mixture(units, (3, 1), 5).ids(e).tolist() for e in range(6)]
    mixture = Mixture(units, (3, 1), 5)
    for epoch in (4, 1, 5, 0, 2, 3):
        assert mixture.ids(epoch).tolist() == whole[epoch]


@pytest.mark.parametrize(
    "weights, message",
    [
        ((1,), "weights must be one for each source: 2, got 1"),
        ((1, 0), "the weight of source 2 must be more than 0, is 0"),
        ((-1, 1), "the weight of source 1 must be more than 0, is -1"),
        ((1, math.nan), "the weight of source 2 must be more than 0, is nan"),
        ((1, math.inf), "the weight of source 2 must be more than 0, is inf"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        Mixture(ones(2, 2), weights, 0)


def test_a_source_without_anything_to_count_is_refused():
    with pytest.raises(InputError, match="source 2 has nothing that its weight could count"):
        Mixture([np.ones(2, int), np.zeros(3, int)], (1, 1), 0)
