from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from varlen_sft import reference
from varlen_sft.ops.sequences import (
    cu_seqlens_from_position_ids,
    sequences_from_lengths,
    sequences_from_position_ids,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def test_lengths_give_the_values_that_flash_attention_takes():
    sequences = sequences_from_lengths([3, 1, 4])
    assert sequences.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert sequences.cu_seqlens.dtype == torch.int32
    assert type(sequences.max_seqlen) is int and sequences.max_seqlen == 4
    assert int(sequences.num_sequences) == 3


@given(LENGTHS)
def test_position_ids_made_from_lengths_give_the_lengths_back(lengths):
    cu_seqlens, longest = cu_seqlens_from_position_ids(reference.position_ids_from_lengths(lengths))
    assert cu_seqlens.diff().tolist() == lengths
    assert longest == max(lengths)


@given(LENGTHS, st.integers(0, 5))
def test_a_fixed_capacity_pads_with_the_total(lengths, spare):
    position_ids = reference.position_ids_from_lengths(lengths)
    capacity = len(lengths) + spare
    sequences = sequences_from_position_ids(position_ids, capacity=capacity)
    total = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    assert sequences.cu_seqlens.tolist() == [0, *ends, *[total] * spare]
    assert sequences.max_seqlen == max(lengths)
    assert int(sequences.num_sequences) == len(lengths)


@pytest.mark.parametrize(
    ("position_ids", "ends"),
    [
        ([5, 6, 7, 0, 1, 2], [0, 3, 6]),  # a leading chunk that does not start at 0
        ([0, 1, 2, 7, 8], [0, 3, 5]),  # a jump is an edge
        ([3, 2, 1], [0, 1, 2, 3]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [0, 4]),  # a continued count cannot be told apart: documented
        ([4], [0, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_one_rule(position_ids, ends, dtype):
    ids = torch.tensor(position_ids, dtype=dtype)
    assert cu_seqlens_from_position_ids(ids)[0].tolist() == ends
    assert sequences_from_position_ids(ids, capacity=8).cu_seqlens.tolist() == (
        ends + [len(ids)] * (9 - len(ends))
    )


def test_no_tokens_are_no_sequences():
    empty = torch.zeros(0, dtype=torch.int64)
    assert sequences_from_position_ids(empty, capacity=2).cu_seqlens.tolist() == [0, 0, 0]
    assert sequences_from_position_ids(empty).cu_seqlens.tolist() == [0]


def test_errors_name_the_argument_and_what_came():
    ids = torch.tensor([0, 1, 0])
    with pytest.raises(ValueError, match=r"lengths must be at least 1, got 0 at index 1"):
        sequences_from_lengths([3, 0])
    with pytest.raises(ValueError, match=r"less than 2\^31 tokens, got 2147483648"):
        sequences_from_lengths([2**31])
    with pytest.raises(ValueError, match=r"capacity must hold every sequence, got 1 for 2"):
        sequences_from_position_ids(ids, capacity=1)
    with pytest.raises(ValueError, match=r"max_seqlen must be at least .* 2, got 1"):
        sequences_from_position_ids(ids, max_seqlen=1)
    with pytest.raises(ValueError, match=r"max_seqlen must be at least .* 2, got 1"):
        sequences_from_position_ids(ids, capacity=4, max_seqlen=1)
    with pytest.raises(TypeError, match=r"position_ids must be int32 or int64, got float32"):
        sequences_from_position_ids(ids.float())
    with pytest.raises(ValueError, match=r"position_ids must have shape \(T\), got \(1, 3\)"):
        sequences_from_position_ids(ids[None])
    with pytest.raises(ValueError, match=r"impl must be None or one of reference, got 'cuda'"):
        sequences_from_position_ids(ids, impl="cuda")


def test_op_registration():
    ids = reference.position_ids_from_lengths([3, 1, 4])
    torch.library.opcheck(torch.ops.varlen_sft.sequences, (ids, 6))


def test_a_fixed_capacity_is_traced_without_a_data_dependent_op():
    def op(ids):
        return torch.ops.varlen_sft.sequences(ids, 4)

    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        cu_seqlens, count, longest = op(mode.from_tensor(torch.arange(7)))
    assert cu_seqlens.shape == (5,) and count.shape == () and longest.shape == ()
