from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FLOATS, assert_within_reference_error, relative_error
from varlen_sft import _extension, reference
from varlen_sft.ops.cross_entropy import (
    LossOptions,
    linear_cross_entropy,
    masked_cross_entropy,
    supervised_rows,
)
from varlen_sft.ops.cross_entropy_chunks import (
    UNWRITTEN,
    Head,
    chunk_rows,
    defers,
    fits_one_chunk,
)
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.types import Sequences

IMPLS = [
    "reference",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not _extension.load(), reason=_extension.status())
    ),
]
OPTIONS = [
    LossOptions(),
    LossOptions(softcap=3.0),
    LossOptions(logit_scale=0.25, z_loss=1e-2),
    LossOptions(label_smoothing=0.1, softcap=5.0, logit_scale=2.0, z_loss=1e-3),
]


def make(total, hidden_size, vocabulary, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).to(dtype)

    labels = torch.randint(0, vocabulary, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.5] = -100
    weights = torch.rand(total, generator=generator) * (
        torch.rand(total, generator=generator) < 0.8
    )
    weight = normal(vocabulary, hidden_size) / math.sqrt(hidden_size) * 3
    return normal(total, hidden_size), weight, normal(vocabulary), labels, weights


def run(op, hidden, weight, bias, labels, **kwargs):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    output = op(leaves[0], leaves[1], labels, linear_bias=leaves[2], **kwargs)
    return output, torch.autograd.grad(output.loss_sum * 0.5, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1, 2, 127, 130]),
    st.sampled_from([2, 17, 259]),
    st.sampled_from(FLOATS[:3]),
    st.sampled_from(OPTIONS),
    st.booleans(),
    st.integers(0, 99),
)
def test_values_and_gradients(impl, total, vocabulary, dtype, options, weighted, seed):
    if dtype != torch.float64:
        # On few rows or columns eager may be right by luck, and twice nothing is no bound.
        total, vocabulary = total + 500, max(vocabulary, 17)
    hidden, weight, bias, labels, weights = make(total, 8, vocabulary, dtype, seed)
    kwargs = {"token_weights": weights if weighted else None, "options": options}
    tensors = (hidden, weight, bias)
    actual, grads = run(linear_cross_entropy, *tensors, labels, impl=impl, **kwargs)
    low, low_grads = run(reference.linear_cross_entropy, *tensors, labels, **kwargs)
    double = [x.double() for x in tensors]
    high, high_grads = run(reference.linear_cross_entropy, *double, labels, **kwargs)
    for a, b, c in zip(grads, low_grads, high_grads, strict=True):
        assert a.dtype == dtype
        assert_within_reference_error(a, b, c)
    # Sums are held in fp32, but logits are rounded to the dtype first, as eager's are.
    for name in ("token_loss", "lse"):
        a, b, c = (getattr(x, name).detach() for x in (actual, low, high))
        assert_within_reference_error(a, b, c)
    # A sum may be off by twice what eager's rows are off, and by a few roundings of fp32 or fp64.
    w = weights.double() if weighted else torch.ones(total).double()
    eps = 4 * torch.finfo(actual.loss_sum.dtype).eps
    allowed = 2 * ((low.token_loss - high.token_loss).abs() * w).sum() + eps * high.loss_sum.abs()
    assert (actual.loss_sum - high.loss_sum).abs() <= allowed + 1e-12
    assert (actual.weight_sum - high.weight_sum).abs() <= eps * high.weight_sum
    if dtype == torch.float64:  # below it a near tie may fall either way, by the rounding of a GEMM
        assert torch.equal(actual.correct, low.correct)


@pytest.mark.parametrize("impl", IMPLS)
def test_plain_loss_is_torch_cross_entropy_on_supervised_rows(impl):
    hidden, weight, bias, labels, weights = make(50, 8, 33)
    output = linear_cross_entropy(
        hidden, weight, labels, token_weights=weights, linear_bias=bias, impl=impl
    )
    logits = F.linear(hidden, weight, bias)
    supervised = (labels != -100) & (weights > 0)
    per_row = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(output.loss_sum, (per_row * weights).sum())
    torch.testing.assert_close(output.weight_sum, weights[supervised].double().sum())
    torch.testing.assert_close(output.token_loss, per_row.where(supervised, 0))
    torch.testing.assert_close(output.lse, logits.logsumexp(-1).where(supervised, 0))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(output.entropy, entropy.where(supervised, 0))
    assert torch.equal(output.correct, (logits.argmax(-1) == labels) & supervised)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vocabulary_of_one_token_has_nothing_to_learn(impl):
    hidden, weight, bias, labels, _ = make(5, 8, 1)
    output, grads = run(linear_cross_entropy, hidden, weight, bias, labels.clamp(0, 0), impl=impl)
    assert output.loss_sum == 0 and output.correct.all()
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_change_nothing_but_rounding(impl):
    hidden, weight, bias, labels, weights = make(700, 8, 64, torch.float32)
    small = LossOptions(chunk_bytes=1)  # 128 rows at a time
    one, one_grads = run(linear_cross_entropy, hidden, weight, bias, labels, impl=impl)
    many, many_grads = run(
        linear_cross_entropy, hidden, weight, bias, labels, options=small, impl=impl
    )
    assert torch.equal(one.weight_sum, many.weight_sum)
    assert relative_error(many.loss_sum.detach(), one.loss_sum.detach()) < 1e-6
    for a, b in zip(many_grads, one_grads, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_given_rows_equal_found_rows_and_pads_add_nothing(impl):
    hidden, weight, bias, labels, weights = make(40, 8, 33)
    rows = supervised_rows(labels, weights)
    assert rows.shape[0] % 128 == 0
    expected = ((labels != -100) & (weights > 0)).nonzero().flatten()
    assert rows[: len(expected)].tolist() == expected.tolist()
    assert (rows[len(expected) :] == -1).all()
    found, found_grads = run(
        linear_cross_entropy, hidden, weight, bias, labels, token_weights=weights, impl=impl
    )
    given_, given_grads = run(
        linear_cross_entropy, hidden, weight, bias, labels, token_weights=weights, rows=rows,
        impl=impl,
    )  # fmt: skip
    for a, b in zip((*found, *found_grads), (*given_, *given_grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("op", [linear_cross_entropy, reference.linear_cross_entropy])
def test_nothing_to_train_is_exactly_zero(impl, op):
    hidden, weight, bias, labels, _ = make(5, 8, 33)
    kwargs = {"impl": impl} if op is linear_cross_entropy else {}
    for none in (
        {"labels": torch.full_like(labels, -100)},
        {"labels": labels.clamp(min=0), "token_weights": torch.zeros(5)},
    ):
        output, grads = run(op, hidden, weight, bias, **none, **kwargs)
        assert output.loss_sum == 0 and output.weight_sum == 0
        assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_not_supervised_may_hold_nan(impl):
    hidden, weight, _, labels, weights = make(20, 8, 33)
    clean = linear_cross_entropy(hidden, weight, labels, token_weights=weights, impl=impl)
    hidden[(labels == -100) | (weights == 0)] = float("nan")
    dirty = linear_cross_entropy(hidden, weight, labels, token_weights=weights, impl=impl)
    assert torch.equal(clean.loss_sum, dirty.loss_sum)
    logits = (hidden @ weight.T).requires_grad_()
    masked = masked_cross_entropy(logits, labels, token_weights=weights, impl=impl)
    masked.loss_sum.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("chunk_bytes", [2**30, 1], ids=["one chunk", "many"])
@pytest.mark.parametrize("impl", IMPLS)
def test_pads_of_the_rows_read_none_that_may_hold_nan(impl, chunk_bytes):
    """In one chunk gradients are left to the backward; of many the last has pads alone."""
    hidden, weight, _, labels, _ = make(600, 8, 133)
    labels[0], labels[300:] = -100, -100
    rows = torch.nn.functional.pad((labels != -100).nonzero().flatten(), (0, 200), value=-1)
    gradients = []
    for garbage in (0.0, float("nan")):
        hidden = hidden.detach().clone().requires_grad_()
        hidden.data[labels == -100] = garbage
        output = linear_cross_entropy(
            hidden,
            weight.requires_grad_(),
            labels,
            rows=rows,
            impl=impl,
            options=LossOptions(chunk_bytes=chunk_bytes),
        )
        gradients.append(torch.autograd.grad(output.loss_sum, (hidden, weight)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_row_does_not_depend_on_its_neighbours(impl):
    logits = torch.randn(9, 1003, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(9)
    together = masked_cross_entropy(logits, labels, impl=impl)
    for row in range(9):
        one = masked_cross_entropy(logits[row : row + 1], labels[row : row + 1], impl=impl)
        assert torch.equal(one.token_loss[0], together.token_loss[row])


@pytest.mark.parametrize("impl", IMPLS)
def test_boundary_targets_do_not_exist_for_unshifted_labels(impl):
    lengths = [3, 1, 4]
    logits = torch.randn(8, 33, dtype=torch.double, requires_grad=True)
    labels = torch.arange(8)
    weights = torch.tensor([9.0, 1, 2, 9, 9, 1, 0, 3])  # a first token is nobody's target
    output = masked_cross_entropy(
        logits, labels, token_weights=weights, sequences=sequences_from_lengths(lengths), impl=impl
    )
    pairs = [(0, 1, 1.0), (1, 2, 2.0), (4, 5, 1.0), (6, 7, 3.0)]
    log_p = logits.detach().log_softmax(-1)
    expected = sum(-w * log_p[row, target] for row, target, w in pairs)
    torch.testing.assert_close(output.loss_sum.detach(), expected)
    assert output.weight_sum == 7
    output.loss_sum.backward()
    assert logits.grad.abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 4, 6]


def test_only_the_sum_is_differentiable():
    hidden, weight, _, labels, _ = make(5, 8, 33)
    output = linear_cross_entropy(hidden.requires_grad_(), weight, labels)
    assert output.loss_sum.requires_grad
    for name in ("weight_sum", "token_loss", "lse", "entropy"):
        with pytest.raises(RuntimeError, match="does not require grad"):
            getattr(output, name).sum().backward()


def test_gradients_that_nobody_wants_are_not_made():
    hidden, weight, _, labels, _ = make(5, 8, 33)
    hidden.requires_grad_()
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).loss_sum.requires_grad
    outputs = torch.ops.varlen_sft.linear_cross_entropy(
        hidden, weight, None, labels, torch.ones(5).double(), None, [0, 1, 0, 0], 2**20,
        True, False, False, "reference",
    )  # fmt: skip
    assert all(outputs[i].numel() == 0 for i in (6, 7, 8)) and outputs[9].shape == (128, 33)
    made = torch.ops.varlen_sft.linear_cross_entropy_backward(
        *outputs[9:], hidden, weight, torch.ones(()).double(), True, False, False
    )
    assert made[0].shape == hidden.shape and made[1].numel() == made[2].numel() == 0


def test_a_gradient_of_one_chunk_is_rounded_once():
    """Products of small integers are exact, a third of them is not: it has one right rounding."""
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randint(-9, 10, shape, generator=draw) for shape in [(40, 70), (50, 8), (70, 8)]]
    dlogits, hidden, weight = (x.bfloat16() for x in whole)
    scored = torch.cat((torch.randperm(50, generator=draw)[:37], torch.full((3,), UNWRITTEN)))
    third = torch.tensor(1 / 3)
    dhidden, dweight, dbias = torch.ops.varlen_sft.linear_cross_entropy_backward(
        dlogits, scored, torch.empty(0), hidden, weight, third, True, True, True
    )
    dlogits, hidden, weight, third = (x.double() for x in (dlogits[:37], hidden, weight, third))
    want = torch.zeros(50, 8, dtype=torch.float64)
    want[scored[:37]] = dlogits @ weight * third
    assert torch.equal(dhidden, want.bfloat16())
    assert torch.equal(dweight, (dlogits.T @ hidden[scored[:37]] * third).bfloat16())
    assert torch.equal(dbias, (dlogits.sum(0) * third).bfloat16())


def test_factors_of_rows_go_into_the_gradients_of_one_chunk():
    """Powers of two round nothing; what is behind the last row was never written."""
    draw = torch.Generator().manual_seed(0)
    whole = [torch.randint(-2, 3, shape, generator=draw) for shape in [(40, 70), (50, 8), (70, 8)]]
    dlogits, hidden, weight = (x.bfloat16() for x in whole)
    dlogits[37:] = torch.nan
    rows = torch.randperm(50, generator=draw)[:37]
    factor = 2.0 ** torch.randint(-3, 1, (40,), generator=draw)
    dhidden, dweight, dbias = torch.ops.varlen_sft.linear_cross_entropy_backward(
        dlogits, torch.cat((rows, torch.full((3,), UNWRITTEN))), factor, hidden, weight,
        torch.tensor(0.5), True, True, True,
    )  # fmt: skip
    scaled = dlogits[:37].double() * factor[:37, None] / 2
    want = torch.zeros(50, 8, dtype=torch.float64)
    want[rows] = scaled @ weight.double()
    assert torch.equal(dhidden.double(), want)
    torch.testing.assert_close(
        dweight.double(), scaled.T @ hidden[rows].double(), rtol=2**-8, atol=0
    )
    torch.testing.assert_close(dbias.double(), scaled.sum(0), rtol=2**-8, atol=0)


def test_how_many_rows_are_one_chunk():
    """Llama 3's head: 512 MiB are 2,093 rows in bf16; its dW is 1 GiB, in fp32 2."""
    bf16, fp32 = (
        torch.empty(128_256, 4096, dtype=d, device="meta") for d in (torch.bfloat16, torch.float32)
    )
    half = 2**29
    assert [chunk_rows(x, half, False) for x in (bf16, fp32)] == [2048, 1024]
    assert [chunk_rows(x, half, True) for x in (bf16, fp32)] == [4096, 4096]
    assert chunk_rows(bf16, 2**31, True) == 8320 and chunk_rows(bf16, 1, False) == 128
    # What the fp32 sum takes more than the gradient: 4,096 rows of logits.
    assert fits_one_chunk(8192, bf16, half, True) and not fits_one_chunk(8193, bf16, half, True)
    assert fits_one_chunk(4096, fp32, half, True) and not fits_one_chunk(4097, fp32, half, True)
    assert not fits_one_chunk(2049, bf16, half, False)
    assert defers(8192, bf16, half, True) and not defers(8193, bf16, half, True)
    assert not defers(128, bf16.half(), half, True)


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_values_are_named(impl):
    hidden, weight, _, labels, weights = make(5, 8, 33)
    labels[2] = 33
    with pytest.raises(ValueError, match=r"labels must be -100 or in \[0, 33\), got 33 at row 2"):
        linear_cross_entropy(hidden, weight, labels, impl=impl)
    labels[2] = -1
    with pytest.raises(ValueError, match="got -1 at row 2"):
        linear_cross_entropy(hidden, weight, labels, impl=impl)
    labels[2] = 3
    for bad in (-1.0, math.nan, math.inf):
        weights[3] = bad
        with pytest.raises(
            ValueError, match=r"token_weights must be finite and >= 0, got .* row 3"
        ):
            linear_cross_entropy(hidden, weight, labels, token_weights=weights, impl=impl)
    with pytest.raises(ValueError, match=r"rows must be in \[-1, 5\), got 5"):
        linear_cross_entropy(hidden, weight, labels, rows=torch.tensor([0, 5]), impl=impl)


def test_errors_name_the_argument_and_what_came():
    hidden, weight, bias, labels, weights = make(5, 8, 33)
    with pytest.raises(TypeError, match="linear_weight must be float64, got float32"):
        linear_cross_entropy(hidden, weight.float(), labels)
    with pytest.raises(
        ValueError, match=r"linear_weight must have shape \(V, C=8\), got \(33, 7\)"
    ):
        linear_cross_entropy(hidden, weight[:, :7], labels)
    with pytest.raises(TypeError, match="labels must be int64, got int32"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(ValueError, match=r"token_weights must have shape \(T=5\), got \(4,\)"):
        linear_cross_entropy(hidden, weight, labels, token_weights=weights[:4])
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        LossOptions(label_smoothing=1)


@pytest.mark.parametrize("impl", IMPLS)
def test_op_registration_and_compilation(impl):
    hidden, weight, bias, labels, weights = make(7, 8, 33)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    rows = supervised_rows(labels, weights)
    torch.library.opcheck(
        torch.ops.varlen_sft.linear_cross_entropy,
        (*leaves, labels, weights.double(), rows, [0.0, 1.0, 0.0, 0.0], 2**20, True, True, True,
         impl),
    )  # fmt: skip
    logits = hidden.detach() @ weight.detach().T
    torch.library.opcheck(
        torch.ops.varlen_sft.masked_cross_entropy,
        (logits.requires_grad_(), labels, weights.double(), [0.0, 1.0, 0.0, 0.0], True, impl),
    )
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = compiled(hidden, weight, labels, rows=rows, impl=impl)
    assert torch.equal(
        got.loss_sum, linear_cross_entropy(hidden, weight, labels, rows=rows, impl=impl).loss_sum
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_gradient(options):
    hidden, weight, bias, labels, weights = make(4, 3, 5)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: (
            reference.linear_cross_entropy(
                h, w, labels, token_weights=weights, linear_bias=b, options=options
            ).loss_sum
        ),
        leaves,
    )


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 99))
def test_a_pack_of_logits_is_its_sequences_alone(impl, lengths, spare, seed):
    """Unshifted labels; cu_seqlens with room for more sequences is padded with T."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    logits = torch.randn(total, 19, generator=generator).requires_grad_()
    labels = torch.randint(0, 19, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.3] = -100
    weights = torch.rand(total, generator=generator)
    sequences = sequences_from_lengths(lengths)
    tail = sequences.cu_seqlens.new_full((spare,), total)
    padded = Sequences(torch.cat((sequences.cu_seqlens, tail)), *sequences[1:])
    pack = masked_cross_entropy(logits, labels, token_weights=weights, sequences=padded, impl=impl)
    (grad,) = torch.autograd.grad(pack.loss_sum, logits)
    begin, counted = 0, torch.zeros(())
    for length in lengths:
        part, nexts = slice(begin, begin + length - 1), slice(begin + 1, begin + length)
        leaf = logits.detach()[part].clone().requires_grad_()
        alone = masked_cross_entropy(leaf, labels[nexts], token_weights=weights[nexts], impl=impl)
        assert torch.equal(pack.token_loss[part], alone.token_loss)
        assert torch.equal(grad[part], torch.autograd.grad(alone.loss_sum, leaf)[0])
        begin += length
        assert pack.token_loss[begin - 1] == 0 and (grad[begin - 1] == 0).all()
        counted = counted + alone.weight_sum
    torch.testing.assert_close(pack.weight_sum, counted)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_gradients_of_many_chunks_are_summed_in_fp32(impl):
    """64 chunks: what each but the first adds is half of bf16's step at the sum so far."""
    total = 128 * 64
    hidden = torch.ones(total, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(total, dtype=torch.long)
    weights = torch.full((total,), 2.0**-7)
    weights[:128] = 2.0
    options = LossOptions(chunk_bytes=1)
    output = linear_cross_entropy(
        hidden, weight, labels, token_weights=weights, options=options, impl=impl
    )
    output.loss_sum.backward()
    # -1/2 of each row's weight: -128, then 63 times -0.5; -159.5 is rounded once, at the end.
    assert weight.grad.flatten().tolist() == [-160, 160]


@pytest.mark.parametrize("impl", IMPLS)
def test_pads_that_reach_the_head_write_nowhere(impl, monkeypatch):
    """On a device pads are not counted out: they are scored with weight 0 and then dropped."""
    hidden, weight, bias, labels, weights = make(40, 8, 33)
    labels[0], weights[0] = 5, 1.0  # the row that a pad reads
    rows = supervised_rows(labels, weights)
    kwargs = {"token_weights": weights, "rows": rows, "impl": impl}
    without, without_grads = run(linear_cross_entropy, hidden, weight, bias, labels, **kwargs)
    monkeypatch.setattr(Head, "_checked", lambda self, rows: rows)
    padded, padded_grads = run(linear_cross_entropy, hidden, weight, bias, labels, **kwargs)
    for a, b in zip((*padded[2:], padded_grads[0]), (*without[2:], without_grads[0]), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(padded_grads[1:], without_grads[1:], strict=True):
        torch.testing.assert_close(a, b)
    assert padded.token_loss[0] > 0 and padded.lse[0] != 0
    torch.testing.assert_close(padded.loss_sum, without.loss_sum)
