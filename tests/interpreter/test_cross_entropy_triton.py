"""The cross-entropy kernels under Triton's interpreter, against the reference."""

from __future__ import annotations

import math
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import assert_within_reference_error
from varlen_sft import reference
from varlen_sft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from varlen_sft.ops.cross_entropy_triton import RowSums, rows_backward, score_rows_triton
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.types import LossOptions, Sequences

# The interpreter computes in numpy, which warns where a GPU gives inf or NaN and says nothing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered"
)

PLAIN = [0.0, 1.0, 0.0, 0.0]
OPTIONS = [  # softcap, logit_scale, label_smoothing, z_loss
    PLAIN,
    [3.0, 1.0, 0.0, 0.0],
    [0.0, 0.25, 0.0, 1e-2],
    [0.0, -1.5, 0.1, 0.0],
    [5.0, 2.0, 0.1, 1e-3],
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CANARY = 57.0


def draw_rows(n, vocab, dtype, seed, gap=0, offset=0):
    """Logits as a view between canaries, labels and weights; rows 1 and 2 are not supervised."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((offset + n * (vocab + gap) + 16,), CANARY, dtype=dtype)
    logits = memory.as_strided((n, vocab), (vocab + gap, 1), offset)
    logits.copy_(torch.randn(n, vocab, generator=generator) * 3)
    labels = torch.randint(0, vocab, (n,), generator=generator)
    weights = torch.rand(n, generator=generator) + 0.1
    if n > 2:
        labels[1], weights[2] = -100, 0
        logits[1], logits[2] = math.nan, math.inf
    return memory, logits, labels, weights


@contextmanager
def poisoned():
    """Memory that nobody wrote is NaN, and True where it is bool."""
    empty_like, empty = torch.empty_like, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(math.nan) if x.is_floating_point() else x.fill_(77)

    with (
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        mock.patch.object(torch.Tensor, "new_empty", lambda *a, **k: poison(empty(*a, **k))),
    ):
        yield


def gradient_left(logits, scored: RowSums):
    """What score_rows_triton left in place of the logits, times the factor that it asks for."""
    if scored.factor is None:
        return logits.clone()
    return (logits.float() * scored.factor[:, None]).to(logits.dtype)


def expected(logits, labels, weights, options, dtype):
    leaf = logits.detach().to(dtype).requires_grad_()
    output = reference.masked_cross_entropy(
        leaf, labels, token_weights=weights, options=LossOptions(*options)
    )
    output.loss_sum.backward()
    return output, leaf.grad


def assert_rows_match(scored: RowSums, low, high):
    for name, got in (("token_loss", scored.loss), ("lse", scored.lse)):
        assert_within_reference_error(got, getattr(low, name), getattr(high, name))
    assert_within_reference_error(scored.entropy, low.entropy, high.entropy)
    assert torch.equal(scored.correct, low.correct)


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([17, 64, 255, 511, 512, 513, 1025, 2048, 4099]),
    st.sampled_from(DTYPES),
    st.sampled_from(OPTIONS),
    st.sampled_from([(0, 0), (8, 0), (5, 0), (8, 8), (0, 3)]),
    st.integers(0, 99),
)
def test_rows_and_gradients(vocab, dtype, options, layout, seed):
    n = 16  # on fewer rows eager may be right by luck, and twice nothing is no bound
    gap, offset = layout
    memory, logits, labels, weights = draw_rows(n, vocab, dtype, seed, gap, offset)
    before = logits.clone()
    low, low_grad = expected(before, labels, weights, options, dtype)
    high, high_grad = expected(before, labels, weights, options, torch.float64)
    with poisoned():
        kept = score_rows_triton(logits, labels, weights, options, keep_state=True)
        dlogits = rows_backward(
            logits, kept.targets, kept.counted, kept.state, kept.lse, torch.tensor(1.0), options
        )
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())
    assert_rows_match(kept, low, high)
    assert_within_reference_error(dlogits, low_grad, high_grad)
    assert torch.equal(kept.counted, weights.where(labels != -100, 0))
    with poisoned():
        scored = score_rows_triton(logits, labels, weights, options, write_grad=True)
    for a, b in zip(scored[:5], kept[:5], strict=True):
        assert torch.equal(a, b)
    assert_within_reference_error(gradient_left(logits, scored), low_grad, high_grad)
    assert (logits[1:3] == 0).all()
    rows = torch.zeros_like(memory, dtype=torch.bool)
    rows.as_strided(logits.shape, logits.stride(), offset).fill_(True)
    assert (memory[~rows] == CANARY).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vocabulary_of_one_or_two(dtype):
    _, logits, labels, weights = draw_rows(5, 1, dtype, seed=0)
    scored = score_rows_triton(logits, labels, weights, PLAIN, write_grad=True)
    assert (scored.loss == 0).all() and (scored.entropy == 0).all() and (logits == 0).all()
    assert scored.correct.tolist() == [True, False, False, True, True]
    _, logits, labels, weights = draw_rows(64, 2, dtype, seed=1)
    low, low_grad = expected(logits, labels, weights, OPTIONS[-1], dtype)
    high, high_grad = expected(logits, labels, weights, OPTIONS[-1], torch.float64)
    scored = score_rows_triton(logits, labels, weights, OPTIONS[-1], write_grad=True)
    assert_rows_match(scored, low, high)
    assert_within_reference_error(gradient_left(logits, scored), low_grad, high_grad)


@pytest.mark.parametrize("vocab", [5, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_itself_alone(vocab, dtype):
    _, logits, labels, weights = draw_rows(5, vocab, dtype, seed=3)
    together = logits.clone()
    all_rows = score_rows_triton(together, labels, weights, PLAIN, write_grad=True)
    for row in range(5):
        part = slice(row, row + 1)
        alone = logits[part].clone()
        one = score_rows_triton(alone, labels[part], weights[part], PLAIN, write_grad=True)
        assert torch.equal(alone, together[part])
        for a, b in zip(one, all_rows, strict=True):
            assert a is None or torch.equal(a, b[part])


@pytest.mark.parametrize("softcap", [0.0, 400.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_dwarf_the_first_block(dtype, softcap):
    """What was written has to shrink, twice in some rows; -inf and a late label are in it too."""
    options = [softcap, 1.0, 0.0, 0.0]
    _, logits, labels, weights = draw_rows(16, 1100, dtype, seed=5)
    logits[3:, 600:] += 90
    logits[5:, 900:] += 120
    logits[8:, 1000] += 17.5
    logits[9, :700] = logits[10, 300:] = logits[11, 0] = -math.inf
    logits[12], logits[12, 600], logits[12, 1090] = 0, 41, 42  # before and after, both count
    labels[4:9] = torch.tensor([10, 1000, 650, 1099, 1000])
    labels[9:12] = torch.tensor([800, 5, 1000])
    finite = logits.clamp(min=-1e30)  # the reference multiplies 0 by a mean of -inf
    low, low_grad = expected(finite, labels, weights, options, dtype)
    high, high_grad = expected(finite, labels, weights, options, torch.float64)
    scored = score_rows_triton(logits, labels, weights, options, write_grad=True)
    assert_rows_match(scored, low, high)
    assert_within_reference_error(gradient_left(logits, scored), low_grad, high_grad)


def test_the_gradient_at_a_sure_label_keeps_its_digits():
    """1 - p is far below fp32's distance of 1 from its neighbours."""
    logits = torch.zeros(1, 300)
    logits[0, 7] = 30
    share = 299 * math.exp(-30) / (1 + 299 * math.exp(-30))
    labels, weights = torch.tensor([7]), torch.ones(1)
    kept = score_rows_triton(logits, labels, weights, PLAIN, keep_state=True)
    dlogits = rows_backward(logits, labels, weights, kept.state, kept.lse, torch.tensor(2.0), PLAIN)
    scored = score_rows_triton(logits, labels, weights, PLAIN, write_grad=True)
    assert float(kept.loss) == pytest.approx(-math.log1p(-share), rel=1e-6)
    assert float(gradient_left(logits, scored)[0, 7]) == pytest.approx(-share, rel=1e-6)
    assert float(dlogits[0, 7]) == pytest.approx(-2 * share, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 7, 599])
def test_a_nan_stays_in_its_row(bad, place):
    _, logits, labels, weights = draw_rows(5, 600, torch.bfloat16, seed=7)
    labels[3] = 7
    clean = logits.clone()
    expected_rows = score_rows_triton(clean, labels, weights, PLAIN, write_grad=True)
    logits[3, place] = bad
    scored = score_rows_triton(logits, labels, weights, PLAIN, write_grad=True)
    others = torch.tensor([0, 1, 2, 4])
    for a, b in zip(scored, expected_rows, strict=True):
        assert a is None or torch.equal(a[others], b[others])
    assert torch.equal(logits[others], clean[others])
    assert scored.loss[3].isnan() and scored.lse[3].isnan() and not scored.correct[3]
    assert gradient_left(logits, scored)[3].isnan().all()


def test_the_first_of_equal_logits_is_the_argmax():
    logits = torch.zeros(4, 700, dtype=torch.bfloat16)
    logits[:, [5, 300, 650]] = 2.0
    labels = torch.tensor([5, 300, 650, 6])
    scored = score_rows_triton(logits, labels, torch.ones(4), PLAIN)
    assert scored.correct.tolist() == [True, False, False, False]


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from([1, 2, 3, 7, 8, 9]), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_pack_of_logits_is_its_sequences_alone(lengths, weighted, padded, seed):
    """Unshifted labels; with room for more sequences, as a fixed capacity leaves it."""
    total = sum(lengths)
    _, logits, labels, weights = draw_rows(total, 19, torch.float32, seed)
    logits = logits.nan_to_num(1.0, 1.0).clone().requires_grad_()
    labels[torch.rand(total, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
    token_weights = weights if weighted else None
    sequences = sequences_from_lengths(lengths)
    if padded:
        tail = sequences.cu_seqlens.new_full((3,), total)
        sequences = Sequences(torch.cat((sequences.cu_seqlens, tail)), *sequences[1:])
    pack = masked_cross_entropy(
        logits, labels, token_weights=token_weights, sequences=sequences, impl="triton"
    )
    (pack.loss_sum * 0.5).backward()
    begin, losses, counted = 0, [], torch.zeros(())
    for length in lengths:
        part, nexts = slice(begin, begin + length - 1), slice(begin + 1, begin + length)
        leaf = logits.detach()[part].clone().requires_grad_()
        alone = masked_cross_entropy(
            leaf, labels[nexts], token_weights=weights[nexts] if weighted else None, impl="triton"
        )
        (alone.loss_sum * 0.5).backward()
        assert torch.equal(pack.token_loss[part], alone.token_loss)
        assert torch.equal(logits.grad[part], leaf.grad)
        last = begin + length - 1
        assert pack.token_loss[last] == 0 and (logits.grad[last] == 0).all()
        losses.append(alone.loss_sum.detach())
        counted = counted + alone.weight_sum
        begin += length
    torch.testing.assert_close(pack.loss_sum.detach(), sum(losses))
    torch.testing.assert_close(pack.weight_sum, counted)


def linear_case(dtype, seed=0, total=150):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        (torch.randn(*shape, generator=generator) * scale).to(dtype)
        for shape, scale in (((total, 16), 1.0), ((67, 16), 0.8), ((67,), 1.0))
    )
    labels = torch.randint(0, 67, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.2] = -100
    weights = torch.rand(total, generator=generator)
    weights[torch.rand(total, generator=generator) < 0.1] = 0
    return hidden, weight, bias, labels, weights


def run_linear(op, tensors, labels, weights, **kwargs):
    leaves = [x.detach().requires_grad_() for x in tensors]
    output = op(
        leaves[0], leaves[1], labels, linear_bias=leaves[2], token_weights=weights, **kwargs
    )
    return output, torch.autograd.grad(output.loss_sum * 0.5, leaves)


@pytest.mark.parametrize(
    "total, values", [*((40, values) for values in OPTIONS), (150, PLAIN)]
)  # 150 rows are two chunks
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, total, values):
    *tensors, labels, weights = linear_case(dtype, total=total)
    kwargs = {"options": LossOptions(*values, chunk_bytes=1)}
    got, grads = run_linear(linear_cross_entropy, tensors, labels, weights, impl="triton", **kwargs)
    low, low_grads = run_linear(reference.linear_cross_entropy, tensors, labels, weights, **kwargs)
    double = [x.double() for x in tensors]
    high, high_grads = run_linear(reference.linear_cross_entropy, double, labels, weights, **kwargs)
    for a, b, c in zip(grads, low_grads, high_grads, strict=True):
        assert a.dtype == dtype
        assert_within_reference_error(a, b, c)
    for name in ("token_loss", "lse"):
        a, b, c = (getattr(x, name).detach() for x in (got, low, high))
        assert_within_reference_error(a, b, c)


def test_rows_given_out_of_order_and_padded():
    hidden, weight, bias, labels, weights = linear_case(torch.float32, total=40)
    rows = ((labels != -100) & (weights > 0)).nonzero().flatten()
    pads = torch.full((7,), -1)
    shuffled = torch.cat((pads[:3], rows.flip(0), pads))
    tensors = hidden, weight, bias
    found, found_grads = run_linear(linear_cross_entropy, tensors, labels, weights, impl="triton")
    given_, given_grads = run_linear(
        linear_cross_entropy, tensors, labels, weights, impl="triton", rows=shuffled
    )
    again, again_grads = run_linear(linear_cross_entropy, tensors, labels, weights, impl="triton")
    assert all(map(torch.equal, (*found, *found_grads), (*again, *again_grads)))
    assert torch.equal(found.token_loss, given_.token_loss)
    assert torch.equal(found_grads[0], given_grads[0])
    torch.testing.assert_close(given_grads[1], found_grads[1])


def test_nothing_to_train_is_exactly_zero():
    *tensors, labels, weights = linear_case(torch.bfloat16, total=9)
    tensors[0] = torch.full_like(tensors[0], math.nan)
    for none in ((torch.full_like(labels, -100), weights), (labels, torch.zeros(9))):
        output, grads = run_linear(linear_cross_entropy, tensors, *none, impl="triton")
        assert output.loss_sum == 0 and output.weight_sum == 0
        assert all((grad == 0).all() for grad in grads)
        logits = torch.full((9, 40), math.nan, requires_grad=True)
        masked = masked_cross_entropy(
            logits, none[0].clamp(max=39), token_weights=none[1], impl="triton"
        )
        masked.loss_sum.backward()
        assert masked.loss_sum == 0 and (logits.grad == 0).all()


def test_fp64_is_refused_by_name():
    hidden, weight, _, labels, _ = linear_case(torch.float64, total=3)
    with pytest.raises(TypeError, match='hidden for impl="triton" must be float32 or .* float64'):
        linear_cross_entropy(hidden, weight, labels, impl="triton")
    with pytest.raises(TypeError, match='logits for impl="triton" must be float32 or .* float64'):
        masked_cross_entropy(hidden @ weight.T, labels, impl="triton")


def test_op_registration_and_compilation():
    _, logits, labels, weights = draw_rows(7, 33, torch.float32, seed=0)
    logits = logits.nan_to_num(1.0, 1.0).clone().requires_grad_()
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    forward = torch.ops.varlen_sft.masked_cross_entropy_triton
    for edges in (None, cu_seqlens):
        torch.library.opcheck(forward, (logits, labels, weights, PLAIN, edges))
    *_, lse, _, _, targets, counted, state = forward(logits, labels, weights, PLAIN, cu_seqlens)
    torch.library.opcheck(
        torch.ops.varlen_sft.masked_cross_entropy_triton_backward,
        (logits.detach(), targets, counted, state, lse, torch.tensor(0.5), PLAIN),
    )
    *tensors, labels, weights = linear_case(torch.float32, total=7)
    leaves = [x.requires_grad_() for x in tensors]
    labels, weights = labels.clamp(min=0), weights + 1  # on a CPU no other row is written
    for chunk_bytes in (1, 2**20):
        torch.library.opcheck(
            torch.ops.varlen_sft.linear_cross_entropy,
            (*leaves, labels, weights, None, PLAIN, chunk_bytes, True, True, True, "triton"),
        )
    compiled = torch.compile(masked_cross_entropy, fullgraph=True, backend="aot_eager")
    eager_logits = logits.detach().clone().requires_grad_()
    for leaf, op in ((logits, compiled), (eager_logits, masked_cross_entropy)):
        leaf.grad = None
        (op(leaf, torch.arange(7), impl="triton").loss_sum * 0.3).backward()
    assert torch.equal(logits.grad, eager_logits.grad)
