"""Supervised rows that a batch brings along: used as they are, refused when they are stale."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_samples, relative_error
from tests.integrations.families import FAMILIES, tiny_hf
from varlen_sft import Collator, patch
from varlen_sft.integrations import hf_targets, packed
from varlen_sft.integrations.hf_targets import Targets
from varlen_sft.integrations.packed import Packed

LENGTHS = [5, 34, 2, 17, 9]


def batch_of(**options) -> dict:
    return Collator(fractional_weights=True, **options)(random_samples(LENGTHS, seed=1))


def without(batch: dict, *keys: str) -> dict:
    return {key: value for key, value in batch.items() if key not in keys}


def loss_and_gradients(model, batch: dict):
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=7).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("prune", [False, True])
def test_loss_and_gradients_are_those_without_rows(prune, monkeypatch):
    model, batch = tiny_hf("llama3"), batch_of(pad_to=80)
    patch(model, prune_last_layer=prune)
    expected = loss_and_gradients(model, without(batch, "rows"))
    monkeypatch.setattr(hf_targets.Targets, "supervised_rows", lambda self: self.rows)
    found = loss_and_gradients(model, batch)
    assert expected[0] > 0 and relative_error(found[0], expected[0]) < 1e-12
    assert relative_error(found[1], expected[1]) < 1e-12


def test_rows_come_with_a_pack_whoever_named_it():
    batch = batch_of()
    ways = {
        "flash": batch,
        "position ids": without(batch, *packed.FLASH_KEYS, "use_cache"),
        "labels": without(batch, "shift_labels", "shift_weights") | {"rows": rows_of(batch)},
    }
    for name, call in ways.items():
        targets = Targets.from_call(call, Packed.from_call(call))
        assert targets.rows is call["rows"], name
        assert torch.equal(targets.supervised_rows(), call["rows"])


def rows_of(batch: dict) -> torch.Tensor:
    """By the rule itself."""
    return (batch["shift_labels"][0] != -100).nonzero().flatten()


def test_rows_of_several_padded_sequences():
    labels = torch.tensor([[4, 5, 6, -100], [-100, 7, 8, 9]])
    call = {"input_ids": labels.clamp(min=0), "labels": labels}
    found = Targets.from_call(call, None).supervised_rows()
    assert found.tolist() == [0, 1, 4, 5, 6]  # of the eight, each with the label after it
    call["rows"] = torch.tensor([0, 1, 4, 5, 6, -1])
    assert Targets.from_call(call, None).rows is call["rows"]


STALE = {
    "one too few": lambda rows: rows[1:],
    "one too many": lambda rows: torch.cat([rows, torch.tensor([3])]),
    "one twice": lambda rows: torch.cat([rows, rows[:1]]),
    "past the end": lambda rows: torch.cat([rows, torch.tensor([99])]),
    "below -1": lambda rows: torch.cat([rows, torch.tensor([-2])]),
}


@pytest.mark.parametrize("fault", STALE)
@pytest.mark.parametrize("on_host", [True, False])
def test_stale_rows_are_refused(fault, on_host, monkeypatch):
    batch = batch_of()
    supervised = rows_of(batch)
    assert 3 not in supervised.tolist()
    batch["rows"] = STALE[fault](supervised)
    monkeypatch.setattr(packed, "_on_host", lambda tensor: on_host)
    error = ValueError if on_host else RuntimeError  # on a device, an assertion there
    with pytest.raises(error, match="rows must be the supervised rows of the labels"):
        Targets.from_call(batch, Packed.from_call(batch))


def test_labels_changed_after_the_collator_are_noticed():
    model, batch = tiny_hf("llama3"), batch_of()
    patch(model)
    batch["shift_labels"][0, rows_of(batch)[0]] = -100
    with pytest.raises(ValueError, match="who changes the labels of a finished batch.*got .*"):
        model(**batch)
    assert model(**without(batch, "rows")).loss > 0


@pytest.mark.parametrize("rows", [torch.zeros(3), torch.zeros(1, 3, dtype=torch.int64)])
def test_rows_of_another_kind(rows):
    batch = batch_of() | {"rows": rows}
    with pytest.raises((TypeError, ValueError), match="rows must (be int64|have shape)"):
        Targets.from_call(batch, Packed.from_call(batch))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_model_leaves_rows_alone(name, training):
    model = tiny_hf(name, torch.float32, attention="eager").train(training)
    batch = Collator()(random_samples(LENGTHS, seed=1, fractional=False))
    assert model(**batch).loss == model(**without(batch, "rows")).loss


def test_logits_of_an_evaluation():
    model, batch = tiny_hf("llama3", torch.float32).eval(), batch_of()
    patch(model)
    with torch.no_grad():
        output, plain = model(**batch), model(**without(batch, "rows"))
    assert torch.equal(output.logits, plain.logits) and output.loss == plain.loss
