"""The promise: a conversation's loss and gradients in a pack are those it has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.helpers import (
    ROPE_PARAMETERS,
    alone,
    loss_and_gradients,
    random_samples,
    relative_error,
    tiny_hf_config,
    tiny_model,
)
from varlen_sft.data.batch import collate, shift
from varlen_sft.models.llama import LlamaForSFT

PROMISE = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTHS = [5, 34, 2, 17, 18, 41]  # the rows of a sample are one fewer: 16, 17, 33, 40 cross limits


def assert_equal(actual, expected, bound: float) -> None:
    assert relative_error(actual[0], expected[0]) < bound
    assert actual[1].keys() == expected[1].keys()
    for name in actual[1]:
        assert relative_error(actual[1][name], expected[1][name]) < bound, name


@pytest.mark.parametrize("dtype", PROMISE)
@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
def test_pack_equals_alone(rope, dtype):
    model = tiny_model(tiny_hf_config(rope), dtype)
    samples = random_samples(LENGTHS)
    packed = loss_and_gradients(model, collate(samples))
    assert packed[0] > 1
    assert_equal(packed, alone(model, samples), PROMISE[dtype])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(2, 20), min_size=1, max_size=6), st.integers(0, 30), st.randoms())
def test_order_and_pad_tail_change_nothing(lengths, spare, random):
    model = tiny_model(tiny_hf_config())
    samples = random_samples(lengths, seed=random.randrange(99))
    expected = loss_and_gradients(model, collate(samples))
    shuffled = random.sample(samples, len(samples))
    pad_to = sum(lengths) - len(lengths) + spare
    actual = loss_and_gradients(model, collate(shuffled, pad_to=pad_to, pad_id=3))
    if expected[0] > 0:
        assert_equal(actual, expected, 1e-10)
    else:
        assert all((grad == 0).all() for grad in actual[1].values())


def test_a_corrupted_neighbour_changes_no_bit_of_another_sample():
    model = tiny_model(tiny_hf_config())
    samples = random_samples([9, 12, 7])
    batch = collate(samples)
    clean = model(batch).token_loss
    other = random_samples([9, 12, 7], seed=1)
    corrupted = model(collate([samples[0], other[1], samples[2]])).token_loss
    rows = torch.ones(25, dtype=torch.bool)
    rows[8:19] = False
    assert torch.equal(clean[rows], corrupted[rows])
    assert not torch.equal(clean[~rows], corrupted[~rows])


def test_no_gradient_crosses_a_boundary():
    model = tiny_model(tiny_hf_config())
    samples = random_samples([9, 12, 7])
    for keep in range(3):
        silent = [
            s if i == keep else s.__class__(s.input_ids, s.token_weights * 0, s.roles)
            for i, s in enumerate(samples)
        ]
        batch = collate(silent)
        model.zero_grad()
        embedded = model.embed_tokens(batch.input_ids).detach().requires_grad_()
        hook = model.embed_tokens.register_forward_hook(lambda *_, e=embedded: e)
        model(batch).loss_sum.backward()
        hook.remove()
        edges = batch.cu_seqlens.tolist()
        for index in range(3):
            part = embedded.grad[edges[index] : edges[index + 1]]
            assert (part.abs().sum() > 0) == (index == keep)
            assert index == keep or (part == 0).all()


# ------------------------------------------------------- against transformers


@pytest.fixture
def fp64_norms(monkeypatch):
    """LlamaRMSNorm computes in fp32 whatever comes; the promise of 1e-10 needs it in fp64."""

    def forward(self, x):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x * scale

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def hf_alone(config: dict, folder, samples, dtype):
    """Loss and gradients of HF's own model, eager attention, one sample at a time."""
    total, gradients = torch.zeros(()), {}
    for sample in samples:
        # A fresh model each time: HF's dynamic and longrope tables remember earlier lengths.
        hf = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        ids, labels, weights = (torch.from_numpy(x) for x in shift(sample))
        logits = hf(ids[None]).logits[0]
        rows = torch.nn.functional.cross_entropy(
            logits, labels, reduction="none", ignore_index=-100
        )
        loss = (rows * weights).sum()
        loss.backward()
        total = total + loss.detach()
        for name, parameter in hf.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    return total, gradients


def under_hf_names(model: LlamaForSFT, gradients: dict) -> dict:
    from varlen_sft.models.checkpoint import hf_parts

    named = {}
    for name, pieces in hf_parts(model).items():
        cut = gradients[name].split([rows for _, rows in pieces])
        named.update(zip((key for key, _ in pieces), cut, strict=True))
    return named


@pytest.mark.parametrize("rope", ROPE_PARAMETERS)
@pytest.mark.parametrize("change", [{}, {"attention_bias": True, "mlp_bias": True}], ids=str)
def test_our_pack_equals_transformers_alone(rope, change, tmp_path, fp64_norms):
    config = tiny_hf_config(rope, **change)
    tiny_model(config).save_pretrained(tmp_path)
    model = LlamaForSFT.from_pretrained(tmp_path)
    samples = random_samples(LENGTHS)
    loss, gradients = loss_and_gradients(model, collate(samples))
    assert loss > 1
    expected = hf_alone(config, tmp_path, samples, torch.float64)
    assert_equal((loss, under_hf_names(model, gradients)), expected, 1e-10)


def test_tied_head_and_transformers_own_norms(tmp_path):
    """Nothing of HF changed: its norms round to fp32, so the promise is that of fp32."""
    config = tiny_hf_config(tie_word_embeddings=True)
    tiny_model(config).save_pretrained(tmp_path)
    model = LlamaForSFT.from_pretrained(tmp_path)
    samples = random_samples(LENGTHS)
    loss, gradients = loss_and_gradients(model, collate(samples))
    expected = hf_alone(config, tmp_path, samples, torch.float64)
    assert "lm_head.weight" not in gradients and "lm_head.weight" not in expected[1]
    assert_equal((loss, under_hf_names(model, gradients)), expected, PROMISE[torch.float32])


def test_bf16_is_no_worse_than_twice_eager_bf16(tmp_path):
    config = tiny_hf_config()
    tiny_model(config, torch.bfloat16).save_pretrained(tmp_path)
    samples = random_samples(LENGTHS)
    exact = loss_and_gradients(
        LlamaForSFT.from_pretrained(tmp_path, dtype=torch.float32), collate(samples)
    )
    model = LlamaForSFT.from_pretrained(tmp_path)
    loss, gradients = loss_and_gradients(model, collate(samples))
    eager = hf_alone(config, tmp_path, samples, torch.bfloat16)
    ours = under_hf_names(model, gradients)
    exact_named = under_hf_names(model, exact[1])
    bound = 2 * relative_error(eager[0], exact[0]) + torch.finfo(torch.bfloat16).eps
    assert relative_error(loss, exact[0]) <= bound
    for name, grad in ours.items():
        assert relative_error(grad, exact_named[name]) <= (
            2 * relative_error(eager[1][name], exact_named[name]) + torch.finfo(torch.bfloat16).eps
        ), name


def test_a_tiny_model_can_learn():
    """Gradients point down: ten steps on one pack lower its loss, and only its loss counts."""
    model = tiny_model(tiny_hf_config(), torch.float32)
    batch = collate(random_samples([20, 30], seed=np.random.default_rng(0).integers(9)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        output = model(batch)
        loss = output.loss_sum / output.weight_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
