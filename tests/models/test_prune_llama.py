"""A pruned last layer changes no number, whatever is supervised and wherever it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import (
    ROPE_PARAMETERS,
    loss_and_gradients,
    relative_error,
    tiny_hf_config,
    tiny_model,
)
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import Sample
from varlen_sft.models import llama
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.modules import RotaryEmbedding, VarlenAttention
from varlen_sft.ops.last_layer import LastRows, last_rows
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths

# Of each sample: its length and the spans of tokens that are supervised.
PACKS = {
    "one answer at the end": [(30, [(20, 30)]), (41, [(35, 41)]), (17, [(9, 17)])],
    "something after the answer": [(30, [(20, 28)]), (41, [(35, 38)]), (17, [(9, 17)])],
    "several turns": [(100, [(3, 6), (60, 65), (97, 100)]), (90, [(2, 5), (50, 52)])],
    "a sample without any": [(30, []), (41, [(39, 41)]), (2, []), (17, [(1, 3)])],
    "one row": [(30, []), (41, [(7, 8)])],
}


def pack(name: str, **changes) -> PackedBatch:
    rng = np.random.default_rng(0)
    samples = []
    for length, spans in PACKS[name]:
        weights = np.zeros(length, dtype=np.float32)
        for start, end in spans:
            weights[start:end] = rng.choice([1.0, 0.25], end - start)
        ids = rng.integers(0, 53, length, dtype=np.int32)
        samples.append(Sample(ids, weights, np.zeros(length, dtype=np.uint8)))
    return collate(samples, **changes)


def pruned_and_whole(model: LlamaForSFT, batch: PackedBatch):
    assert model.prune_last_layer
    pruned = loss_and_gradients(model, batch)
    model.prune_last_layer = False
    whole = loss_and_gradients(model, batch)
    model.prune_last_layer = True
    return pruned, whole


def assert_equal(actual, expected, bound: float) -> None:
    assert relative_error(actual[0], expected[0]) < bound
    for name in expected[1]:
        assert relative_error(actual[1][name], expected[1][name]) < bound, name


@pytest.fixture(params=["runs of queries", "all queries, as on a device"])
def looks(request, monkeypatch) -> str:
    """How much of the last layer's attention is spared."""
    if request.param != "runs of queries":
        monkeypatch.setattr(llama, "last_rows", lambda rows, total, _: last_rows(rows, total))
    return request.param


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_those_of_the_whole_layer(name, dtype, bound, looks):
    model = tiny_model(tiny_hf_config(attention_bias=True, mlp_bias=True), dtype)
    pruned, whole = pruned_and_whole(model, pack(name))
    assert whole[0] > 1
    assert_equal(pruned, whole, bound)


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_every_kind_of_rope_turns_the_picked_queries(rope):
    model = tiny_model(tiny_hf_config(rope, num_hidden_layers=1))
    assert_equal(*pruned_and_whole(model, pack("several turns")), 1e-10)


def test_fields_of_the_loss_are_complete():
    model = tiny_model(tiny_hf_config())
    batch = pack("several turns", pad_to=300)
    pruned = model(batch)
    model.prune_last_layer = False
    for a, b in zip(pruned, model(batch), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


def test_pads_among_the_rows_count_nothing(looks):
    """As on a device, where rows keep their pads."""
    model, batch = tiny_model(tiny_hf_config()), pack("several turns")
    assert (batch.rows == -1).any()
    assert_equal(*pruned_and_whole(model, batch), 1e-10)


def test_bf16_is_as_near_to_fp32_as_the_whole_layer_is():
    batch = pack("several turns")
    model = tiny_model(tiny_hf_config(), torch.bfloat16)
    exact_model = tiny_model(tiny_hf_config(), torch.bfloat16).float()
    exact = loss_and_gradients(exact_model, batch)
    pruned, whole = pruned_and_whole(model, batch)
    eps = torch.finfo(torch.bfloat16).eps
    for name, expected in exact[1].items():
        allowed = 2 * relative_error(whole[1][name], expected) + eps
        assert relative_error(pruned[1][name], expected) <= allowed, name


def rows_seen(model: LlamaForSFT, batch: PackedBatch) -> dict[str, int]:
    seen: dict[str, int] = {}

    def hook(name: str):
        return lambda module, args: seen.__setitem__(name, args[0].shape[0])

    last, handles = model.layers[-1], []
    for name in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        handles.append(last.get_submodule(name).register_forward_pre_hook(hook(name)))
    model(batch)
    for handle in handles:
        handle.remove()
    return seen


def test_only_supervised_rows_pass_the_last_layer(looks):
    model, batch = tiny_model(tiny_hf_config()), pack("several turns")
    supervised = batch.supervised_tokens
    assert set(rows_seen(model, batch).values()) == {supervised}
    model.prune_last_layer = False
    assert set(rows_seen(model, batch).values()) == {len(batch.input_ids)}


def test_attention_is_asked_for_the_queries_of_the_answers_alone(monkeypatch):
    from varlen_sft import modules

    asked = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *args, **kwargs) -> Tensor:
        asked.append((len(q), len(k)))
        return real(q, k, v, *args, **kwargs)

    real = modules.varlen_attention
    monkeypatch.setattr(modules, "varlen_attention", attention)
    model, batch = tiny_model(tiny_hf_config()), pack("one answer at the end")
    model(batch)
    # Rows are one fewer than tokens, and row i learns token i + 1.
    assert asked == [(85, 85), (24, 85)]


def test_nearly_everything_supervised_or_nothing_goes_the_old_way():
    model = tiny_model(tiny_hf_config())
    samples = [Sample(np.arange(20, dtype=np.int32), np.ones(20, np.float32) * weight,
                      np.zeros(20, np.uint8)) for weight in (1, 0)]  # fmt: skip
    assert set(rows_seen(model, collate(samples[:1])).values()) == {19}
    nothing = collate(samples[1:])
    loss, gradients = loss_and_gradients(model, nothing)
    assert loss == 0 and all((grad == 0).all() for grad in gradients.values())


def test_all_logits_are_there_when_they_are_asked_for():
    model, batch = tiny_model(tiny_hf_config()), pack("several turns")
    assert model.logits(batch.input_ids, batch.position_ids, batch.sequences).shape == (188, 53)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=4),
    st.sampled_from([None, 5]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_attention_module_gives_the_rows_asked_for(lengths, window, fused, random):
    """Any rows, fused or not, with a window and a softcap: values and gradients."""
    total = sum(lengths)
    torch.manual_seed(0)
    module = VarlenAttention(
        32, 4, 2, 16, bias=True, window_size=window, softcap=3.0, fused=fused
    ).double()
    config = tiny_hf_config()
    sequences = sequences_from_lengths(lengths)
    rotation = RotaryEmbedding.from_config(config)(position_ids_from_lengths(lengths), sequences)
    hidden = torch.randn(total, 32, dtype=torch.double, requires_grad=True)
    rows = torch.tensor(sorted(random.sample(range(total), max(1, total // 3))))
    last = last_rows(rows, total, sequences) or LastRows(rows)
    leaves = (hidden, *module.parameters())
    whole, few = (
        module(hidden, rotation, sequences)[rows],
        module(hidden, rotation, sequences, last),
    )
    assert relative_error(few.detach(), whole.detach()) < 1e-11
    weight = torch.linspace(-1, 1, whole.numel(), dtype=torch.double).view_as(whole)
    a, b = (torch.autograd.grad((out * weight).sum(), leaves) for out in (few, whole))
    assert relative_error(a[0], b[0]) < 1e-10
    assert relative_error(*(torch.cat([x.flatten() for x in y[1:]]) for y in (a, b))) < 1e-10
