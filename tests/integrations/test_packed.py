"""What a call says about its pack: read right, or refused by name."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_samples
from tests.integrations.families import packed_inputs
from varlen_sft.data.batch import collate
from varlen_sft.integrations import packed as packed_module
from varlen_sft.integrations.packed import FLASH_KEYS, Packed

LENGTHS = [3, 4, 1, 5]
EDGES = [0, 3, 7, 8, 13]
POSITIONS = [0, 1, 2, 0, 1, 2, 3, 0, 0, 1, 2, 3, 4]


def call(**changes):
    """A collator's keywords; None takes one away."""
    given = {**packed_inputs(LENGTHS), **changes}
    return {key: value for key, value in given.items() if value is not None}


def edges(values):
    """A call with these for q and k."""
    both = torch.tensor(values, dtype=torch.int32)
    return call(cu_seq_lens_q=both, cu_seq_lens_k=both)


def without_flash(**changes):
    return call(**dict.fromkeys(FLASH_KEYS), **changes)


def assert_is_the_pack(packed) -> None:
    assert packed.sequences.cu_seqlens.tolist() == EDGES
    assert packed.sequences.cu_seqlens.dtype == torch.int32
    assert packed.sequences.max_seqlen == 5 and isinstance(packed.sequences.max_seqlen, int)
    assert packed.sequences.num_sequences.item() == 4
    assert packed.position_ids.tolist() == POSITIONS


@pytest.mark.parametrize(
    "given",
    [
        call(),
        call(position_ids=None),  # then they come from the lengths
        call(attention_mask=torch.ones(1, 13, dtype=torch.long)),
        call(attention_mask=torch.ones(1, 13, dtype=torch.bool)),
        without_flash(),
        without_flash(input_ids=None),
    ],
    ids=["flash", "no_positions", "ones", "true", "positions", "positions_alone"],
)
def test_the_pack_is_found(given):
    packed = Packed.from_call(given)
    assert_is_the_pack(packed)
    assert torch.equal(packed.labels, call()["shift_labels"][0])
    assert packed.token_weights is None and packed.rows is None


def test_targets_come_along():
    weights = torch.rand(1, 13)
    packed = Packed.from_call(call(shift_weights=weights))
    assert torch.equal(packed.token_weights, weights[0])
    assert Packed.from_call(call(shift_labels=None)).labels is None


def test_a_pack_given_as_such_goes_first():
    batch = collate(random_samples([4, 6, 3]), pad_multiple=8)
    packed = Packed.from_batch(batch)
    assert Packed.from_call({"packed": packed, "input_ids": batch.input_ids[None]}) is packed
    assert packed.sequences is not None and packed.rows is batch.rows
    assert packed.labels is batch.labels and packed.token_weights is batch.token_weights
    assert packed.sequences.cu_seqlens is batch.cu_seqlens


@pytest.mark.parametrize(
    "given",
    [
        {"input_ids": torch.ones(2, 5, dtype=torch.long)},
        without_flash(position_ids=None),
        without_flash(position_ids=torch.arange(13)[None]),  # one sequence: an ordinary call
        without_flash(position_ids=torch.arange(7, 20)[None]),  # a decoding step
        without_flash(attention_mask=torch.ones(1, 13)),  # HF takes the mask's word, as it does
        without_flash(past_key_values=object()),
        {
            "input_ids": torch.ones(2, 4, dtype=torch.long),
            "position_ids": torch.tensor([[0, 1, 0, 1]]),  # one for all rows, as HF expands it
        },
        {"position_ids": torch.zeros(3, 1, 6, dtype=torch.long)},
    ],
    ids=["plain", "ids", "one", "later", "mask", "cache", "rows", "three_axes"],
)
def test_a_call_without_a_pack(given):
    assert Packed.from_call(given) is None


def test_a_number_out_of_line_is_an_edge():
    positions = torch.tensor([[5, 6, 7, 0, 1, 9, 10]])
    packed = Packed.from_call({"position_ids": positions})
    assert packed.sequences.cu_seqlens.tolist() == [0, 3, 5, 7]
    assert packed.position_ids.tolist() == [5, 6, 7, 0, 1, 9, 10]


ZERO = torch.ones(1, 13, dtype=torch.long).index_fill_(1, torch.tensor([12]), 0)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (call(attention_mask=ZERO), ValueError, "attention_mask must not have zeros"),
        (call(attention_mask=torch.ones(1, 12)), ValueError, r"\(1, T=13\), got \(1, 12\)"),
        (call(attention_mask=torch.ones(1, 1, 13, 13)), ValueError, r"got \(1, 1, 13, 13\)"),
        (call(attention_mask={"full_attention": None}), ValueError, "got dict"),
        (call(past_key_values=object()), ValueError, "past_key_values must be None"),
        (call(max_length_q=torch.tensor(5)), TypeError, "max_length_q must be a Python int"),
        (call(max_length_k=6), ValueError, "must be equal, got 5, 6"),
        (call(max_length_k=None), ValueError, "must come with max_length_k"),
        (call(cu_seq_lens_q=None), ValueError, "must come with cu_seq_lens_q"),
        (
            call(cu_seq_lens_k=torch.tensor([0, 3, 7, 9, 13]).int()), ValueError,
            r"must be equal, got \[0, 3, 7, 8, 13\] and \[0, 3, 7, 9, 13\]",
        ),
        (call(cu_seq_lens_k=torch.tensor([0, 13]).int()), ValueError, r"\(B\+1=5\)"),
        (call(cu_seq_lens_q=torch.tensor(EDGES)), TypeError, "cu_seq_lens_q must be int32"),
        (call(input_ids=torch.ones(1, 12).long()), ValueError, "rise from 0 to T=12, got .*13"),
        (edges([0, 3, 7, 8, 12]), ValueError, r"rise from 0 to T=13, got .0, 3, 7, 8, 12"),
        (edges([1, 3, 7, 8, 13]), ValueError, "cu_seq_lens_q must rise from 0 to T=13"),
        (edges([0, 7, 3, 8, 13]), ValueError, "cu_seq_lens_q must rise from 0 to T=13"),
        (edges([0, 3, 7, 13]), ValueError, "must be the longest sequence.*got 5 for .3, 4, 6."),
        (call(input_ids=torch.ones(2, 13).long()), ValueError, r"got \(2, 13\)"),
        (call(input_ids=None), ValueError, "input_ids or inputs_embeds"),
        (call(position_ids=torch.arange(12)[None]), ValueError, r"\(1, T=12\), got \(1, 13\)"),
        (call(position_ids=torch.arange(13).expand(3, 1, 13)), ValueError, r"position_ids"),
        (call(shift_weights=torch.ones(1, 13).double()), TypeError, "shift_weights must be float3"),
        ({"packed": {"sequences": 3}}, TypeError, "packed must be a Packed, got dict"),
    ],
)  # fmt: skip
def test_contradictions_are_named(given, error, words):
    with pytest.raises(error, match=words):
        Packed.from_call(given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (edges([0, 3, 7, 8, 12]), "rise from 0 to T=13"),
        (edges([0, 7, 3, 8, 13]), "rise from 0 to T=13"),
        (edges([0, 3, 7, 13]), "must be the longest sequence"),
        (call(cu_seq_lens_k=torch.tensor([0, 3, 7, 9, 13]).int()), "must be equal"),
    ],
)
def test_edges_on_a_device_are_asserted_there(given, words, monkeypatch):
    """Where the host does not know the values, the device is told to stop."""
    monkeypatch.setattr(packed_module, "_on_host", lambda tensor: False)
    assert_is_the_pack(Packed.from_call(call()))
    with pytest.raises(RuntimeError, match=words):  # on a CPU such an assertion fails at once
        Packed.from_call(given)


def test_the_same_on_another_device():
    packed = Packed.from_batch(collate(random_samples([4, 6])))
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert {value.device.type for value in moved.sequences if torch.is_tensor(value)} == {"meta"}
    assert moved.position_ids.is_meta and moved.labels.is_meta and moved.rows.is_meta
    assert moved.sequences.max_seqlen == packed.sequences.max_seqlen
