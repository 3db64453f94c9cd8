"""Mistakes planted in batches of somebody's own: each is found, at its place, and no other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.setups import (
    BOS,
    EOS,
    FACTS,
    LENGTHS,
    PAD_IS_EOS,
    features,
    only,
    packed,
    padded,
    padded_tail,
    shift_labels,
    told,
)
from varlen_sft.tools.check_mistake import ModelFacts
from varlen_sft.tools.check_setup import inspect_batch

# ----------------------------------------------------------- nothing to find


@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_right_batches_are_left_alone(lengths, seed):
    samples = features(lengths, seed)
    tail = torch.arange(3)
    batches = [
        packed(samples),
        packed(samples, flash=True),
        shift_labels(packed(samples), samples),
        padded_tail(packed(samples), 3, tail),
        padded(samples),
        padded(samples, left=True),
        {**padded(samples), "position_ids": torch.arange(max(lengths))[None]},
    ]
    for batch in batches:
        assert inspect_batch(batch, FACTS, samples) == []
        assert inspect_batch(batch, FACTS) == []
    assert inspect_batch(padded(samples, pad=EOS), PAD_IS_EOS, samples) == []
    assert inspect_batch(packed(samples), FACTS, samples[::-1]) == []  # in any order
    lists = {key: value.tolist() for key, value in packed(samples).items()}
    assert inspect_batch({**lists, "lengths": lengths}, FACTS) == []


def test_one_conversation_of_several_turns_is_left_alone():
    ids = torch.tensor([[1, 5, 2, 1, 6, 7, 2, 1, 5, 2, 1, 9, 8, 2]])  # BOS and EOS in every turn
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    assert inspect_batch(batch, FACTS) == []


# --------------------------------------------------------------------- edges


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (torch.ones(1, 16, dtype=torch.long), "all ones"),
        (torch.ones(1, 16).long().index_fill_(1, torch.tensor([14, 15]), 0), "2 zeros in it"),
        (torch.arange(1, 4).repeat_interleave(torch.tensor(LENGTHS))[None], "0 to 3 number the"),
    ],
)
@pytest.mark.parametrize("with_samples", [True, False])
def test_a_mask_beside_packed_ids(mask, kind, with_samples):
    samples = features(LENGTHS)
    batch = {**packed(samples), "attention_mask": mask}
    if kind == "2 zeros in it":
        batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
        samples[2] = {"input_ids": samples[2]["input_ids"]}
    mistake = only(inspect_batch(batch, FACTS, samples if with_samples else None))
    assert told(mistake) == ("a mask beside packed ids", 0, 5, True)
    assert kind in mistake.what and "leave attention_mask out" in mistake.mend


def test_a_mask_of_ones_beside_flash_edges():
    batch = {**packed(features(LENGTHS), flash=True), "attention_mask": torch.ones(1, 16)}
    assert told(only(inspect_batch(batch))) == ("a mask beside packed ids", 0, 5, True)


def test_a_dense_mask_is_judged_by_what_it_lets_through():
    samples = features(LENGTHS)
    number = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))
    causal = torch.ones(16, 16).tril().bool()
    block = (number[:, None] == number) & causal
    batch = {**packed(samples), "attention_mask": block[None, None]}
    assert inspect_batch(batch, FACTS, samples) == []
    additive = torch.zeros(1, 1, 16, 16).masked_fill(~block, torch.finfo(torch.float32).min)
    assert inspect_batch({**batch, "attention_mask": additive}, FACTS, samples) == []
    additive[0, 0, 7, 3] = 0
    mistake = only(inspect_batch({**batch, "attention_mask": additive}, FACTS, samples))
    assert told(mistake) == ("a mask that lets samples see each other", 0, 7, True)
    assert "token 2 of sample 1 see column 3" in mistake.what


@pytest.mark.parametrize("known_by", ["samples", "lengths", "flash", "seq_idx"])
def test_positions_that_are_not_reset(known_by):
    samples = features(LENGTHS)
    batch = packed(samples, flash=known_by == "flash")
    batch["position_ids"] = torch.arange(16)[None]
    if known_by == "lengths":
        batch["lengths"] = LENGTHS
    if known_by == "seq_idx":
        batch["seq_idx"] = torch.arange(3).repeat_interleave(torch.tensor(LENGTHS))[None]
    mistake = only(inspect_batch(batch, FACTS, samples if known_by == "samples" else None))
    assert told(mistake) == ("positions are not reset", 0, 5, True)
    assert mistake.what == "token 0 of sample 1 has position 5, not 0"
    assert ("FlashAttention alone" in mistake.effect) == (known_by == "flash")


def test_flash_edges_without_position_ids():
    batch = packed(features(LENGTHS), flash=True)
    del batch["position_ids"]
    mistake = only(inspect_batch(batch))
    assert told(mistake) == ("positions are not reset", 0, 5, True)
    assert "there are no position_ids" in mistake.what


def test_positions_wrong_inside_a_sample():
    samples = features(LENGTHS)
    batch = packed(samples)
    batch["position_ids"][0, 9] = 40
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert told(mistake) == ("positions are not reset", 0, 9, True)


@pytest.mark.parametrize(("facts", "token"), [(FACTS, BOS), (PAD_IS_EOS, EOS)])
def test_several_samples_that_nothing_tells_apart_are_suspected(facts, token):
    batch = packed(features(LENGTHS))
    del batch["position_ids"]
    mistake = only(inspect_batch(batch, facts))
    assert told(mistake) == ("positions are not reset", 0, 5, False)
    assert f"token {token}, which can" in mistake.what and "2 times" in mistake.what


def test_zero_padded_position_ids():
    samples = features(LENGTHS)
    batch = padded_tail(packed(samples), 6, torch.zeros(6).long())
    for known in (samples, None):
        mistake = only(inspect_batch(batch, FACTS, known))
        assert told(mistake) == ("zero-padded position ids", 0, 16, True)
        assert "6 tokens have position 0" in mistake.what
        assert "6 sequences more" in mistake.effect and "0.2 MiB" in mistake.effect
    edges = torch.tensor([0, 5, 12, 16, 22]).int()
    flash = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 7, "max_length_k": 7}
    assert only(inspect_batch({**batch, **flash})).name == "zero-padded position ids"


def test_samples_of_one_token_are_no_padding():
    samples = [{"input_ids": torch.tensor([7])}] * 3 + features([4])[:1]
    batch = {
        "input_ids": torch.cat([s["input_ids"] for s in samples])[None],
        "position_ids": torch.tensor([[0, 0, 0, 0, 1, 2, 3]]),
    }
    assert inspect_batch(batch, FACTS, samples) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"max_length_q": None}, "max_length_q is missing beside cu_seq_lens_q, cu_seq_lens_k and"),
        ({"max_length_q": torch.tensor(7)}, "max_length_q is a tensor"),
        ({"max_length_k": 6}, "max_length_k is 6, the longest sample has 7 tokens"),
        ({"cu_seq_lens_k": torch.tensor([0, 5, 12, 16])}, "cu_seq_lens_k is int64, not int32"),
        ({"cu_seq_lens_q": torch.tensor([0, 5, 12]).int()}, "rise from 0 to 16, got [0, 5, 12]"),
    ],
)
def test_edges_that_flash_attention_cannot_use(change, what):
    samples = features(LENGTHS)
    mistake = only(inspect_batch({**packed(samples, flash=True), **change}, FACTS, samples))
    assert mistake.name == "edges that FlashAttention cannot use" and what in mistake.what


def test_flash_edges_that_are_not_the_samples():
    samples = features(LENGTHS)
    batch = packed(samples, flash=True)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.tensor([0, 5, 16]).int()
    batch["max_length_q"] = batch["max_length_k"] = 11
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert "no edge at column 12, where sample 2 begins" in mistake.what


def test_a_sample_that_is_part_of_another_is_not_taken_from_it():
    batch = {"input_ids": [[3, 5, 7, 5]], "position_ids": [[0, 1, 2, 0]]}
    assert inspect_batch(batch, samples=[[5], [3, 5, 7]]) == []


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("batch", "samples", "reason"),
    [
        ({"labels": [[1, 2]]}, None, "batch must have input_ids, got labels"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, None, r"labels must have shape \(1, 2\)"),
        ({"input_ids": [[0.5]]}, None, "input_ids must be integers"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, None, "attention_mask must have shape"),
        ({"input_ids": [[1, 2, 3]]}, [[1, 2], [4]], r"sample 1 \(1 tokens\) is not"),
        ({"input_ids": [[1, 2]], "lengths": [3]}, None, "must lie within 2 tokens"),
        ({"input_ids": [[1], [2]], "lengths": [1, 1]}, None, "lengths are those of one row"),
    ],
)
def test_a_batch_that_makes_no_sense_is_refused(batch, samples, reason):
    with pytest.raises(ValueError, match=reason):
        inspect_batch(batch, samples=samples)


def test_a_mistake_reads_well():
    batch = {**packed(features(LENGTHS)), "attention_mask": torch.ones(1, 16)}
    lines = str(only(inspect_batch(batch, FACTS))).splitlines()
    assert lines[0].startswith("a mask beside packed ids: row 0, column 5: a 2-D attention_mask")
    assert [line.split(":")[0] for line in lines[1:]] == ["  what it does", "  how to mend it"]


def test_facts_of_a_config():
    config = SimpleNamespace(
        to_dict=lambda: {
            "eos_token_id": [2, 5], "pad_token_id": 2, "bos_token_id": 1,
            "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 500.0,
        }
    )  # fmt: skip
    facts = ModelFacts.of(config)
    assert (facts.pads, facts.stops, facts.bos, facts.query_size) == ({2}, {2, 5}, 1, 32)
    ((kind, rope),) = facts.rope
    assert kind == "" and rope["rope_type"] == "dynamic" and rope["rope_theta"] == 500.0
