"""Fewer queries than keys, as a pruned last layer asks: values and gradients of every way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FLOATS, assert_within_reference_error
from tests.ops.test_attention import IMPLS, make, run
from varlen_sft import reference
from varlen_sft.ops.attention import varlen_attention
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.types import Sequences

SIZES = st.sampled_from([0, 1, 2, 7, 31, 32, 33, 70])


def sequences(lengths: list[int]) -> Sequences:
    """Also of sequences without a token, which ``sequences_from_lengths`` refuses."""
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    return Sequences(edges, max(lengths), torch.tensor(len(lengths), dtype=torch.int32))


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    st.sampled_from(FLOATS[:3]),
    st.sampled_from([{}, {"window_size": 5}, {"softcap": 2.0}]),
)
def test_values_and_gradients(impl, pairs, heads, dtype, options):
    lengths, k_lengths = ([pair[i] for pair in pairs] for i in range(2))
    if not sum(lengths) or not sum(k_lengths):
        return
    tensors = make(sum(lengths), sum(k_lengths), *heads, dtype=dtype)
    keywords = {"k_sequences": sequences(k_lengths), **options}
    own = sequences(lengths)
    actual = run(varlen_attention, tensors, own, impl=impl, **keywords)
    low = run(reference.varlen_attention, tensors, own, **keywords)
    high = run(reference.varlen_attention, [x.double() for x in tensors], own, **keywords)
    # Gradients as one vector: where a query sees one key those of q and k are noise around 0.
    for part in (slice(0, 1), slice(1, None)):
        joined = (torch.cat([x.flatten() for x in xs[part]]) for xs in (actual, low, high))
        assert_within_reference_error(*joined)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_sequence_without_queries_gives_its_keys_no_gradient(impl):
    tensors = make(3, 12)
    own, keys = sequences([0, 3, 0]), sequences([4, 5, 3])
    _, _, dk, dv = run(varlen_attention, tensors, own, k_sequences=keys, impl=impl)
    for grad in (dk, dv):
        assert (grad[:4] == 0).all() and (grad[9:] == 0).all() and grad[4:9].abs().min() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_the_end_of_a_sequence_gives_the_end_of_the_whole(impl):
    q, k, v = make(40, 40)
    whole = sequences_from_lengths([25, 15])
    rows = torch.cat([torch.arange(20, 25), torch.arange(32, 40)])
    full = varlen_attention(q, k, v, whole, impl=impl)[rows]
    few = varlen_attention(
        q[rows], k, v, sequences_from_lengths([5, 8]), k_sequences=whole, impl=impl
    )
    torch.testing.assert_close(few, full, rtol=1e-12, atol=1e-12)
