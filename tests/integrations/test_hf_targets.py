"""What each row learns, whoever made the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integrations.families import LENGTHS, packed_inputs, tiny_hf
from tests.integrations.loss_runs import error, padded
from varlen_sft import patch
from varlen_sft.data.batch import collate
from varlen_sft.data.sample import Sample
from varlen_sft.integrations.packed import Packed
from varlen_sft.types import IGNORE_INDEX


def flattened(boundaries: bool) -> dict[str, Any]:
    """As other collators do it: labels that are not shifted, edges in position ids alone."""
    given = packed_inputs()
    labels = given["input_ids"].clone()
    if not boundaries:
        labels[0, given["cu_seq_lens_q"][:-1].long()] = IGNORE_INDEX
    return {"input_ids": given["input_ids"], "position_ids": given["position_ids"],
            "labels": labels}  # fmt: skip


def test_labels_of_a_pack_never_cross_an_edge():
    model = tiny_hf("smollm2")
    patch(model)
    clean, crossing = model(**flattened(False)), model(**flattened(True))
    assert clean.loss == crossing.loss
    ends = packed_inputs()["cu_seq_lens_q"][1:].long() - 1
    assert (crossing.loss_output.token_loss[ends] == 0).all()
    assert crossing.loss_output.weight_sum == sum(LENGTHS) - len(LENGTHS)
    assert model(**flattened(False), num_items_in_batch=5).loss > 0
    with pytest.raises(
        ValueError, match="labels must be -100 at the first token of every.* 5 that"
    ):
        model(**flattened(True), num_items_in_batch=5)


def test_shift_labels_come_before_labels():
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model)
    both = model(**given, labels=torch.full_like(given["shift_labels"], 3))
    assert both.loss == model(**given).loss
    alone = {key: given[key][:, :5] for key in ("input_ids", "shift_labels")}
    both = model(**alone, labels=torch.full_like(alone["shift_labels"], 3))
    assert both.loss == model(**alone).loss > 0


def test_a_batch_of_our_own_collate():
    samples = [Sample(torch.arange(3, 3 + n, dtype=torch.int32).numpy(),
                      torch.linspace(0, 1, n).numpy(), torch.zeros(n, dtype=torch.uint8).numpy())
               for n in (9, 14)]  # fmt: skip
    batch = collate(samples)
    model = tiny_hf("smollm2")
    patch(model, prune_last_layer=True)
    ours = model(input_ids=batch.input_ids[None], packed=Packed.from_batch(batch))
    spoken = {
        "input_ids": batch.input_ids[None], "position_ids": batch.position_ids[None],
        "shift_labels": batch.labels[None], "shift_weights": batch.token_weights[None],
    }  # fmt: skip
    assert ours.loss > 0 and error(model(**spoken).loss, ours.loss) < 1e-12
    assert error(ours.loss_output.weight_sum, batch.weight_sum) < 1e-7


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"labels": torch.zeros(1, 5).long()}, r"labels must have shape \(B, L\) = \(3, 20\)"),
        ({"labels": torch.zeros(3, 20)}, "labels must be int32 or int64, got float32"),
        ({"shift_weights": torch.ones(3, 19)}, r"shift_weights must have shape \(B, L\) = \(3, 20"),
        ({"input_ids": None}, "input_ids or inputs_embeds must come with labels"),
    ],
)
def test_errors_name_what_came(wrong, message):
    model = tiny_hf("smollm2", torch.float32)
    patch(model)
    with pytest.raises((ValueError, TypeError), match=message):
        model(**{**padded(), **wrong})
