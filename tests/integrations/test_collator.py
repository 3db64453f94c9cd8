"""Features of Hugging Face data sets become packs: values, refusals, and what HF makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import random_samples, relative_error
from tests.integrations.families import tiny_hf
from varlen_sft import Collator, Sample, collate, varlen_attention
from varlen_sft.integrations import denominator
from varlen_sft.types import Sequences

A = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
B = {"input_ids": [8, 9], "labels": [8, -100]}


def row(batch, key):
    assert batch[key].shape[0] == 1
    return batch[key][0].tolist()


def test_two_features_become_one_row():
    batch = Collator()([A, B])
    assert row(batch, "input_ids") == [5, 6, 7, 8, 9]
    assert row(batch, "position_ids") == [0, 1, 2, 0, 1]
    assert row(batch, "shift_labels") == [6, 7, -100, -100, -100]
    assert row(batch, "labels") == [-100, 6, 7, -100, -100]  # 8 starts a sample: nobody's target
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[key].tolist() == [0, 3, 5] and batch[key].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)
    assert type(batch["max_length_q"]) is int
    assert all(batch[key].dtype == torch.int64 for key in ("input_ids", "position_ids", "labels"))
    assert "shift_weights" not in batch and "attention_mask" not in batch
    assert batch["rows"].tolist() == [0, 1] + [-1] * 126 and batch["rows"].dtype == torch.int64
    assert list(batch)[0] == "input_ids"  # of which Accelerate reads the batch size


def test_rows_are_those_that_learn_something():
    features = [A, {"input_ids": [5, 6, 7, 8], "token_weights": [3, 0.5, 0, 2]}, B]
    batch = Collator(fractional_weights=True, pad_to=40)(features)
    assert batch["rows"][:5].tolist() == [0, 1, 3, 5, -1]
    nothing = Collator()([B])
    assert nothing["rows"].tolist() == []  # none to pad, either


def test_a_batch_without_labels_when_asked():
    batch = Collator(return_labels=False)([A, B])
    assert "labels" not in batch and row(batch, "shift_labels") == [6, 7, -100, -100, -100]


@pytest.mark.parametrize(
    "says",
    [
        {"labels": [-100, -100, 7, 8]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"completion_mask": [False, False, True, True]},
        {"token_weights": [0.0, 0, 1, 1]},
        {"labels": [-100, -100, 7, 8], "assistant_masks": [1, 1, 1, 1]},
        {"completion_mask": [0, 1, 1, 1], "assistant_masks": [0, 0, 1, 1], "labels": None},
    ],
)
def test_every_way_to_say_what_is_trained(says):
    feature = {"input_ids": torch.tensor([5, 6, 7, 8]), **says}
    assert row(Collator()([feature]), "shift_labels") == [-100, 7, 8, -100]


def test_all_tokens_are_trained_only_when_asked():
    with pytest.raises(ValueError, match="remove_unused_columns=False.*train_all=True"):
        Collator()([A, {"input_ids": [5, 6]}])
    batch = Collator(train_all=True)([{"input_ids": [5, 6, 7]}, {"input_ids": [8]}, B])
    assert row(batch, "shift_labels") == [6, 7, -100, -100, -100, -100]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]


def test_weights_of_fractions():
    feature = {"input_ids": [5, 6, 7, 8], "token_weights": [3, 0.5, 0, 2]}
    with pytest.raises(ValueError, match=r"here 0\.5.*WeightedTrainerMixin"):
        Collator()([A, feature])
    batch = Collator(fractional_weights=True)([A, feature])
    assert row(batch, "shift_labels") == [6, 7, -100, 6, -100, 8, -100]
    assert row(batch, "shift_weights") == [1, 1, 0, 0.5, 0, 2, 0]
    assert batch["shift_weights"].dtype == torch.float32
    assert float(denominator([batch, batch])) == 9
    assert "shift_weights" not in Collator(fractional_weights=True)([A, B])


def test_the_denominator_counts_targets_where_nothing_is_weighted():
    assert float(denominator([Collator()([A, B]), Collator(return_labels=False)([A])])) == 4
    assert float(denominator([{"labels": torch.tensor([[4, 5, -100], [-100, 6, 7]])}])) == 3
    with pytest.raises(ValueError, match="shift_labels or labels.*input_ids"):
        denominator([{"input_ids": torch.zeros(1, 2)}])
    with pytest.raises(ValueError, match="at least one batch"):
        denominator([])


def test_rows_that_are_packs_already():
    packed = {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]}
    batch = Collator()([packed | {"position_ids": [0, 1, 2, 0, 1]}, A])
    assert row(batch, "shift_labels") == [6, 7, -100, 9, -100, 6, 7, -100]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8] and batch["max_length_q"] == 3


@pytest.mark.parametrize(("options", "total"), [({"pad_to": 9}, 9), ({"pad_multiple": 4}, 8)])
def test_a_pad_tail_is_sequences_of_its_own(options, total):
    batch = Collator(pad_id=3, **options)([A, B])
    assert row(batch, "input_ids") == [5, 6, 7, 8, 9] + [3] * (total - 5)
    assert row(batch, "labels")[5:] == row(batch, "shift_labels")[5:] == [-100] * (total - 5)
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 8, 9][: 4 + (total == 9)]
    assert row(batch, "position_ids")[5:] == [0, 1, 2, 0][: total - 5]
    assert batch["max_length_q"] == 3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_the_targets_are_those_of_our_own_batches(lengths, seed):
    samples = random_samples(lengths, seed=seed)
    ours = collate(samples)
    theirs = Collator(fractional_weights=True, return_labels=False)(samples)
    last = theirs["cu_seq_lens_q"][1:].long() - 1
    kept = torch.ones(sum(lengths), dtype=torch.bool).index_fill(0, last, False)
    for key, expected in {
        "input_ids": ours.input_ids, "position_ids": ours.position_ids,
        "shift_labels": ours.labels, "shift_weights": ours.token_weights,
    }.items():  # fmt: skip
        if key in theirs:
            assert torch.equal(theirs[key][0, kept], expected), key
    assert (theirs["shift_labels"][0, last] == -100).all()
    assert float(denominator([theirs])) == pytest.approx(float(ours.weight_sum))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "at least one feature"),
        ([A, {"labels": [1]}], "feature 1 must have input_ids, it has .*labels"),
        ([{**A, "input_ids": []}], "feature 0: input_ids must be integers"),
        ([{**A, "input_ids": [0.5, 1, 2]}], "feature 0: input_ids must be integers"),
        ([{**A, "input_ids": [[5, 6, 7]]}], r"one axis, got shape \(1, 3\)"),
        ([A, {**B, "labels": [8]}], "feature 1: labels must have 2 entries, got 1"),
        ([{**A, "labels": [6, 7, -100]}], "the token itself.*not before.*got 6 at token 0"),
        ([{**A, "assistant_masks": [0, 1, 2]}], "assistant_masks must be 0 or 1, got 2 at token 2"),
        ([{**B, "token_weights": [1, -1]}], "token_weights must be finite and >= 0, got -1"),
        ([{**B, "token_weights": [1, float("nan")]}], "finite and >= 0, got nan at token 1"),
        ([{**A, "attention_mask": [1, 1, 0]}], "must be 3 ones, got 2 ones of 3"),
        ([{**A, "position_ids": [0, 1, 0]}], "already needs seq_lengths, got position_ids .0 1 0"),
        ([{**A, "seq_lengths": [2, 2]}], r"sum to 3, got \[2, 2\]"),
        ([{**A, "seq_lengths": [3, 0]}], r"at least 1 each"),
    ],
)
def test_features_that_contradict_themselves_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        Collator(pad_to=8)(features)


def test_too_many_tokens_for_the_row_are_refused():
    with pytest.raises(ValueError, match="pad_to=4 tokens, got 5"):
        Collator(pad_to=4)([A, B])


def test_a_padded_attention_mask_of_ones_says_nothing():
    batch = Collator()([A | {"attention_mask": [1, 1, 1], "position_ids": [0, 1, 2]}])
    assert row(batch, "input_ids") == [5, 6, 7] and "attention_mask" not in batch


# What Hugging Face's own models make of it, without a patch.


def alone(model, samples):
    """Sum of losses of the samples, each run by itself by HF, and the gradient of it."""
    total = 0.0
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        labels = ids.masked_fill(torch.from_numpy(sample.token_weights) == 0, -100)
        loss = model(input_ids=ids[None], labels=labels[None], num_items_in_batch=1).loss
        total = total + loss
    total.backward()
    return total.detach(), model.model.embed_tokens.weight.grad.clone()


def test_a_stock_model_sees_each_sample_alone():
    model, samples = tiny_hf("llama3", attention="sdpa"), whole_weights([5, 9, 2, 17])
    loss, gradient = alone(model, samples)
    model.zero_grad()
    packed = model(**Collator(pad_multiple=8)(samples), num_items_in_batch=1).loss
    packed.backward()
    # HF takes its loss in fp32 whatever comes
    assert relative_error(packed.detach(), loss) < 1e-6
    assert relative_error(model.model.embed_tokens.weight.grad, gradient) < 1e-6


def test_hf_flash_attention_takes_the_edges_once_as_int32_and_python_ints(monkeypatch):
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=None, causal=False,
    ):  # fmt: skip
        calls.append((cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal))
        sequences = Sequences(cu_seqlens_q, max_seqlen_q, torch.tensor(0))
        return varlen_attention(q, k, v, sequences, softmax_scale=softmax_scale)

    process = flash._lazy_define_process_function(flash_attn_varlen_func)
    functions = ((None, flash_attn_varlen_func, None, None, None), (process, dict))
    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: functions)
    model, samples = tiny_hf("llama3", attention="sdpa"), whole_weights([5, 9, 2, 17])
    loss, gradient = alone(model, samples)
    model.zero_grad()
    model.config._attn_implementation = "flash_attention_2"
    packed = model(**Collator()(samples), num_items_in_batch=1).loss
    packed.backward()
    assert relative_error(packed.detach(), loss) < 1e-6
    assert relative_error(model.model.embed_tokens.weight.grad, gradient) < 1e-6
    assert len(calls) == model.config.num_hidden_layers
    for edges, edges_k, longest, longest_k, causal in calls:
        assert edges.tolist() == edges_k.tolist() == [0, 5, 14, 16, 33]
        assert edges.dtype == edges_k.dtype == torch.int32
        assert (longest, longest_k) == (17, 17) and type(longest) is int and causal


def whole_weights(lengths) -> list[Sample]:
    samples = random_samples(lengths, fractional=False)
    for sample in samples:
        sample.token_weights[-1] = 1.0
        assert np.isin(sample.token_weights, (0, 1)).all()
    return samples
