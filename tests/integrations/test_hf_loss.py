"""The patched loss: the numbers of Hugging Face's own, from supervised rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.families import FAMILIES, LENGTHS, packed_inputs, tiny_hf
from tests.integrations.loss_runs import (
    assert_equal,
    by_the_book,
    error,
    gradients,
    padded,
    shifted,
)
from varlen_sft import patch
from varlen_sft.integrations import hf_loss
from varlen_sft.integrations.hf_loss import install_loss
from varlen_sft.types import IGNORE_INDEX


@pytest.mark.parametrize(
    "given, dtype, bound",
    # in fp64 the mask of HF's eager attention overflows its fp32 softmax
    [(packed_inputs(), torch.float64, 1e-10), (padded(), torch.float32, 1e-5)],
    ids=["packed", "padded"],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_the_logits(name, given, dtype, bound):
    model = tiny_hf(name, dtype)
    patch(model, loss=False)
    expected = by_the_book(model, given)
    wanted = gradients(model, expected)
    install_loss(model)
    output = model(**given, num_items_in_batch=1)
    assert output.logits is None and output.past_key_values is None
    assert error(output.loss, expected) < bound
    assert_equal(gradients(model, output.loss), wanted, bound)


@pytest.mark.parametrize("name", ["smollm2", "gemma2", "granite"])
def test_on_a_padded_batch_it_is_the_loss_of_hugging_face(name):
    model, given = tiny_hf(name, torch.float32), padded()
    stock = model(**given)
    wanted = gradients(model, stock.loss)
    patch(model)
    ours = model(**given)
    assert error(ours.loss, stock.loss) < 1e-6 and ours.logits is None
    assert_equal(gradients(model, ours.loss), wanted, 1e-5)


@pytest.fixture
def head_calls(monkeypatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """hidden, weight and rows of each call of the head."""
    seen = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append((*args[:2], kwargs["rows"]))
        return real(*args, **kwargs)

    real = hf_loss.linear_cross_entropy
    monkeypatch.setattr(hf_loss, "linear_cross_entropy", spy)
    return seen


def test_only_supervised_rows_meet_the_head(head_calls):
    model, given = tiny_hf("smollm2"), padded()
    patch(model)
    caches = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs["use_cache"]), with_kwargs=True
    )
    output = model(**given).loss_output
    assert caches == [False]  # HF makes a cache in training, too, which nobody reads
    supervised = shifted(given) != IGNORE_INDEX
    assert torch.equal(head_calls[0][2], supervised.nonzero().flatten())
    assert output.token_loss.shape == (60,) and (output.token_loss > 0).equal(supervised)
    assert (output.entropy > 0).equal(supervised)


def test_bf16_is_no_worse_than_twice_hugging_face():
    model, given = tiny_hf("gemma2", torch.bfloat16), padded()
    exact = tiny_hf("gemma2", torch.float32)
    exact.load_state_dict(model.state_dict())
    high, low = (gradients(m, m(**given).loss) for m in (exact, model))
    patch(model)
    for name, grad in gradients(model, model(**given).loss).items():
        allowed = 2 * error(low[name], high[name]) + torch.finfo(torch.bfloat16).eps
        assert error(grad, high[name]) <= allowed, name


def test_autocast_lowers_the_head_as_it_lowers_linear_layers(head_calls):
    model, given = tiny_hf("smollm2", torch.float32), padded()
    exact = gradients(model, model(**given).loss)
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients(model, model(**given).loss)
        patch(model)
        output = model(**given)
        ours = gradients(model, output.loss)
    assert output.loss.dtype == torch.float32
    assert head_calls[0][0].dtype == head_calls[0][1].dtype == torch.bfloat16
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        allowed = 2 * error(low[name], exact[name]) + torch.finfo(torch.bfloat16).eps
        assert 0 < error(grad, exact[name]) <= allowed, name


# ------------------------------------------------------------------- denominators


@pytest.mark.parametrize(
    "items", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)]
)
def test_num_items_divides_the_sum(items):
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model)
    output = model(**given, num_items_in_batch=items)
    assert output.loss == output.loss_output.loss_sum / 7
    mean = model(**given)
    assert mean.loss == mean.loss_output.loss_sum / (given["shift_labels"] != IGNORE_INDEX).sum()


def test_micro_batches_over_one_count_are_one_batch():
    model, given = tiny_hf("qwen3"), packed_inputs()
    patch(model)
    edges = given["cu_seq_lens_q"].tolist()
    count = int((given["shift_labels"] != IGNORE_INDEX).sum())
    whole = gradients(model, model(**given, num_items_in_batch=count).loss)
    parts: dict[str, Tensor] = {}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        piece = {k: given[k][:, start:end] for k in ("input_ids", "shift_labels")}
        for name, grad in gradients(model, model(**piece, num_items_in_batch=count).loss).items():
            parts[name] = parts.get(name, 0) + grad
    assert_equal(parts, whole, 1e-6)  # alone the samples went through HF's eager softmax in fp32


def test_weights_count(head_calls):
    model, given = tiny_hf("smollm2"), packed_inputs()
    patch(model, loss=False)
    weights = torch.rand(sum(LENGTHS), generator=torch.Generator().manual_seed(0))
    weights[weights < 0.3] = 0
    expected = by_the_book(model, given, weights)
    install_loss(model)
    output = model(**given, shift_weights=weights[None])
    trained = weights[given["shift_labels"][0] != IGNORE_INDEX].double().sum()
    assert (weights[head_calls[0][2]] > 0).all() and len(head_calls[0][2]) > 30
    assert error(output.loss, expected / trained) < 1e-10
    assert error(model(**given, shift_weights=weights[None], num_items_in_batch=3).loss,
                          expected / 3) < 1e-10  # fmt: skip


@pytest.mark.parametrize("prune", [False, True])
def test_nothing_to_train_is_zero_and_has_zero_gradients(prune):
    model, given = tiny_hf("smollm2"), packed_inputs()
    given["shift_labels"] = torch.full_like(given["shift_labels"], IGNORE_INDEX)
    patch(model, prune_last_layer=prune)
    for items in (None, 0, torch.tensor(0)):
        loss = model(**given, num_items_in_batch=items).loss
        assert loss == 0 and all((g == 0).all() for g in gradients(model, loss).values())


def test_numbers_that_mixed_precision_rounded_are_refused():
    model, given = tiny_hf("smollm2", torch.float32), packed_inputs()
    patch(model)
    with pytest.raises(TypeError, match="num_items_in_batch must not be rounded.*cast_forward"):
        model(**given, num_items_in_batch=torch.tensor(7.0, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="shift_weights must not be rounded, got bfloat16"):
        model(**given, shift_weights=torch.ones(1, sum(LENGTHS), dtype=torch.bfloat16))
