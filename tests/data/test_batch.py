from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import random_samples
from varlen_sft.data.batch import PackedBatch, collate, shift
from varlen_sft.data.sample import Sample
from varlen_sft.types import IGNORE_INDEX


def sample(ids, weights) -> Sample:
    return Sample(
        np.array(ids, np.int32), np.array(weights, np.float32), np.zeros(len(ids), np.uint8)
    )


def test_a_row_learns_the_next_token_of_its_own_sample():
    ids, labels, weights = shift(sample([10, 11, 12, 13], [1, 0, 0.5, 1]))
    assert ids.tolist() == [10, 11, 12]
    assert labels.tolist() == [IGNORE_INDEX, 12, 13]  # 11 has weight 0; nothing learns 10
    assert weights.tolist() == [0, 0.5, 1]


def test_a_pack_value_by_value():
    batch = collate([sample([1, 2, 3], [0, 1, 1]), sample([4, 5], [1, 0.25])])
    assert batch.input_ids.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [2, 3, 5]
    assert batch.token_weights.tolist() == [1, 1, 0.25]
    assert batch.position_ids.tolist() == [0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.max_seqlen == 2 and int(batch.num_sequences) == 2
    assert batch.rows.tolist() == [0, 1, 2] + [-1] * 125
    assert batch.weight_sum == 2.25
    assert batch.real_tokens == 3 and batch.supervised_tokens == 3


def test_the_pad_tail_is_cut_into_ignored_sequences_no_longer_than_the_longest_sample():
    batch = collate([sample([1, 2, 3], [1, 1, 1]), sample([4, 5], [1, 1])], pad_to=8, pad_id=7)
    assert batch.input_ids.tolist() == [1, 2, 4, 7, 7, 7, 7, 7]
    assert batch.labels[3:].tolist() == [IGNORE_INDEX] * 5
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 5, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert batch.max_seqlen == 2
    assert batch.pad_tokens == 5 and batch.real_tokens == 3
    assert collate([sample([1, 2, 3], [1] * 3)], pad_multiple=64).input_ids.shape == (64,)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.integers(0, 20), st.integers(0, 99))
def test_unpacking_a_pack_gives_every_sample_back(lengths, spare, seed):
    samples = random_samples(lengths, seed=seed)
    total = sum(lengths) - len(lengths)
    batch = collate(samples, pad_to=total + spare)
    edges = batch.cu_seqlens.tolist()
    assert edges[-1] == total + spare
    for index, one in enumerate(samples):
        part = slice(edges[index], edges[index + 1])
        assert batch.input_ids[part].tolist() == one.input_ids[:-1].tolist()
        assert batch.token_weights[part].tolist() == one.token_weights[1:].tolist()
        kept = one.token_weights[1:] > 0
        assert batch.labels[part].tolist() == np.where(kept, one.input_ids[1:], -100).tolist()
        assert batch.position_ids[part].tolist() == list(range(len(one) - 1))
    supervised = [row for row in batch.rows.tolist() if row >= 0]
    assert supervised == (batch.labels != -100).nonzero().flatten().tolist()
    assert int(batch.cu_seqlens.diff().max()) == batch.max_seqlen == max(lengths) - 1


def test_errors_name_the_argument_and_what_came():
    with pytest.raises(ValueError, match="samples must hold at least one sample, got none"):
        collate([])
    with pytest.raises(ValueError, match="samples must have 2 tokens or more, got 1 at index 1"):
        collate([sample([1, 2], [1, 1]), sample([1], [1])])
    with pytest.raises(ValueError, match="samples must fit pad_to=2 tokens, got 3"):
        collate([sample([1, 2, 3, 4], [1] * 4)], pad_to=2)
    with pytest.raises(ValueError, match="pad_multiple must be at least 1, got 0"):
        collate([sample([1, 2], [1] * 2)], pad_multiple=0)
    with pytest.raises(ValueError, match="token_weights must be finite and not negative"):
        sample([1, 2], [1, -1])
    with pytest.raises(ValueError, match="must have one length, got 2, 1 and 2"):
        sample([1, 2], [1]).__class__(np.zeros(2), np.zeros(1), np.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(2, dtype=torch.int64)},
            r"labels must have shape \(T=3,\), got \(2,\)",
        ),
        ({"labels": torch.tensor([2, -100, 5])}, "labels must be -100 exactly where"),
        ({"cu_seqlens": torch.tensor([0, 2])}, r"must rise from 0 to T=3, got \[0, 2\]"),
        ({"max_seqlen": 1}, "max_seqlen must be at least 2, got 1"),
        ({"position_ids": torch.tensor([0, 1, 2])}, r"finds \[0\], not \[0, 2\]"),
    ],
)
def test_a_pack_whose_fields_contradict_each_other_cannot_exist(change, message):
    batch = collate([sample([1, 2, 3], [0, 1, 1]), sample([4, 5], [1, 1])])
    with pytest.raises(ValueError, match=message):
        PackedBatch(**{**vars(batch), **change})
