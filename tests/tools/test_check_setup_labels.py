"""Mistakes planted in the targets of a batch: each is found, at its place, and no other."""

from __future__ import annotations

import pytest
import torch

from tests.tools.setups import (
    BOS,
    EOS,
    FACTS,
    LENGTHS,
    PAD,
    PAD_IS_EOS,
    features,
    only,
    packed,
    padded,
    shift_labels,
    told,
)
from varlen_sft.tools.check_setup import inspect_batch


def test_boundary_labels_that_are_trained():
    samples = features(LENGTHS)
    whole = [{**s, "labels": s["input_ids"]} for s in samples]
    batch = packed(whole)  # all tokens are trained, the first of each sample too
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert told(mistake) == ("a boundary label is trained", 0, 5, True)
    assert "2 wrong targets among 15" in mistake.effect and f"have {BOS} here" in mistake.what
    batch["labels"][0, [5, 12]] = -100
    assert inspect_batch(batch, FACTS, samples) == []


@pytest.mark.parametrize("with_samples", [True, False])
def test_a_row_that_is_shifted_as_a_whole(with_samples):
    samples = features(LENGTHS)
    whole = packed([{**s, "labels": s["input_ids"]} for s in samples])
    targets = whole.pop("labels").roll(-1, dims=1)
    targets[0, -1] = -100
    batch = {**whole, "shift_labels": targets}
    mistake = only(inspect_batch(batch, FACTS, samples if with_samples else None))
    assert told(mistake) == ("a boundary label is trained", 0, 4, True)
    assert "where sample 0 ends" in mistake.what


def test_labels_that_were_shifted_already():
    samples = features(LENGTHS)
    batch = shift_labels(packed(samples), samples)
    batch["labels"] = batch.pop("shift_labels")
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert (mistake.name, mistake.row) == ("labels are shifted wrongly", 0)
    assert "the token 1 places on, instead of the one 0 places on" in mistake.what
    assert mistake.effect == "every row learns the token 2 places on, not the next"


def test_unshifted_shift_labels():
    samples = features(LENGTHS)
    batch = packed(samples)
    batch["shift_labels"] = batch.pop("labels")
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert mistake.name == "labels are shifted wrongly"
    assert mistake.effect == "every row learns the token 0 places on, not the next"


def test_labels_of_another_text():
    batch = packed(features(LENGTHS))
    batch["labels"][0, 10] = 3 if int(batch["input_ids"][0, 10]) != 3 else 4
    mistake = only(inspect_batch(batch, FACTS))
    assert told(mistake) == ("labels are shifted wrongly", 0, 10, True)
    assert "1 target of" in mistake.effect


@pytest.mark.parametrize("make", ["padded", "left", "packed", "packed flash"])
@pytest.mark.parametrize("with_samples", [True, False])
def test_pad_is_eos_masked_by_value(make, with_samples):
    samples = features(LENGTHS)
    if make.startswith("packed"):
        batch = packed(samples, flash="flash" in make)
    else:
        batch = padded(samples, pad=EOS, left=make == "left")
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == EOS, -100)
    mistake = only(inspect_batch(batch, PAD_IS_EOS, samples if with_samples else None))
    certain = with_samples or make != "packed"
    column = 6 if make == "left" else 4
    assert told(mistake) == ("pad = eos is masked by value", 0, column, certain)
    assert f"token {EOS}, which ends what is trained here" in mistake.what


def test_pad_is_eos_where_the_mask_was_made_by_value_too():
    samples = features(LENGTHS)
    batch = padded(samples, pad=EOS)
    batch["attention_mask"] = (batch["input_ids"] != EOS).long()
    batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == EOS, -100)
    mistake = only(inspect_batch(batch, PAD_IS_EOS))
    assert told(mistake) == ("pad = eos is masked by value", 0, 4, False)
    assert "if it is the text's own and no padding" in mistake.what
    assert only(inspect_batch(batch, PAD_IS_EOS, samples)).certain


def test_a_mask_with_holes():
    ids = torch.tensor([[5, 6, 2, 7, 8, 2, 2, 2]])
    mask = (ids != EOS).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    names = [told(mistake) for mistake in inspect_batch(batch, PAD_IS_EOS)]
    assert ("the attention mask has holes", 0, 2, True) in names
    assert ("pad = eos is masked by value", 0, 2, False) in names


def test_tokens_that_lost_their_labels():
    samples = features(LENGTHS)
    batch = packed(samples)
    batch["labels"][0, 9:11] = -100
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert told(mistake) == ("trained tokens have no label", 0, 9, True)
    batch["labels"][0, 11] = -100  # its EOS as well: no rule of pad = eos takes the others
    assert told(only(inspect_batch(batch, FACTS, samples))) == told(mistake)


def test_padding_that_is_trained():
    samples = features(LENGTHS)
    batch = padded(samples)
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, PAD)
    mistake = only(inspect_batch(batch, FACTS, samples))
    assert told(mistake) == ("padding is trained", 0, 5, True)
    assert "(5 places)" in mistake.what
