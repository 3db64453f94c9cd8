from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import FLOATS, assert_within_reference_error, relative_error
from varlen_sft import reference
from varlen_sft.ops.attention import varlen_attention
from varlen_sft.ops.sequences import sequences_from_lengths

IMPLS = ["cpp", "sdpa", "reference"]
LENGTHS = st.lists(st.sampled_from([1, 2, 3, 7, 8, 9, 31, 33]), min_size=1, max_size=6)


def make(total, k_total, heads=4, kv_heads=2, head_dim=16, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def new(n, h):
        return torch.randn(n, h, head_dim, generator=generator, dtype=torch.double).to(dtype)

    return new(total, heads), new(k_total, kv_heads), new(k_total, kv_heads)


def run(op, tensors, *args, **kwargs):
    """Output and the gradients of q, k, v under a fixed, uneven loss."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = op(*leaves, *args, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.double).view_as(out).to(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sampled_from([(1, 1), (4, 2), (3, 3)]), st.sampled_from(FLOATS[:3]))
def test_values_and_gradients(impl, lengths, heads, dtype):
    tensors = make(sum(lengths), sum(lengths), *heads, dtype=dtype)
    sequences = sequences_from_lengths(lengths)
    actual = run(varlen_attention, tensors, sequences, impl=impl)
    low = run(reference.varlen_attention, tensors, sequences)
    high = run(reference.varlen_attention, [x.double() for x in tensors], sequences)
    # Gradients as one vector: where a query sees one key those of q and k are noise around 0.
    for part in (slice(0, 1), slice(1, None)):
        joined = (torch.cat([x.flatten() for x in xs[part]]) for xs in (actual, low, high))
        assert_within_reference_error(*joined)


def test_the_reference_is_textbook_attention_of_each_sequence():
    lengths = [3, 1, 5]
    q, k, v = make(9, 9)
    out = reference.varlen_attention(q, k, v, sequences_from_lengths(lengths))
    for o, qi, ki, vi in zip(*(x.split(lengths) for x in (out, q, k, v)), strict=True):
        for head in range(4):
            for row in range(len(qi)):
                scores = ki[: row + 1, head // 2] @ qi[row, head] / 4.0
                expected = scores.softmax(0) @ vi[: row + 1, head // 2]
                torch.testing.assert_close(o[row, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_neighbour_changes_no_bit_and_gets_no_gradient(impl):
    lengths = [5, 8, 3]
    tensors = make(16, 16)
    sequences = sequences_from_lengths(lengths)
    clean = varlen_attention(*tensors, sequences, impl=impl)
    corrupted = [x.clone() for x in tensors]
    for x in corrupted:
        x[5:13] = float("nan")
    dirty = varlen_attention(*corrupted, sequences, impl=impl)
    assert torch.equal(clean[:5], dirty[:5]) and torch.equal(clean[13:], dirty[13:])

    leaves = [x.requires_grad_() for x in tensors]
    varlen_attention(*leaves, sequences, impl=impl)[5:13].sum().backward()
    for x in leaves:
        assert (x.grad[:5] == 0).all() and (x.grad[13:] == 0).all()
        assert x.grad[5:13].abs().sum() > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_unequal_lengths_are_aligned_bottom_right(impl):
    q, k, v = make(5, 9)
    q_sequences, k_sequences = sequences_from_lengths([2, 3]), sequences_from_lengths([6, 3])
    out = varlen_attention(q, k, v, q_sequences, k_sequences=k_sequences, impl=impl)
    # The two queries are the last two of a sequence of six.
    whole = torch.cat((torch.zeros(4, 4, 16, dtype=q.dtype), q[:2]))
    full = reference.varlen_attention(whole, k[:6], v[:6], sequences_from_lengths([6]))
    torch.testing.assert_close(out[:2], full[4:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_queries_without_keys_give_zero_and_no_nan_gradient(impl):
    tensors = make(4, 2)
    sequences, k_sequences = sequences_from_lengths([4]), sequences_from_lengths([2])
    got = run(varlen_attention, tensors, sequences, k_sequences=k_sequences, impl=impl)
    assert (got[0][:2] == 0).all() and got[0][2:].abs().min() > 0
    assert all(torch.isfinite(x).all() for x in got)


@pytest.mark.parametrize("impl", IMPLS)
def test_window_counts_itself_and_softcap_bounds_scores(impl):
    q, k, v = make(6, 6)
    sequences = sequences_from_lengths([6])
    alone = varlen_attention(q, k, v, sequences, window_size=1, impl=impl)
    torch.testing.assert_close(alone, v.repeat_interleave(2, dim=1))
    wide = varlen_attention(q, k, v, sequences, window_size=6, impl=impl)
    torch.testing.assert_close(wide, varlen_attention(q, k, v, sequences), rtol=1e-12, atol=1e-12)
    flat = varlen_attention(q, k, v, sequences, softcap=1e-9, impl=impl)
    mean = v.cumsum(0) / torch.arange(1, 7)[:, None, None]
    torch.testing.assert_close(flat, mean.repeat_interleave(2, dim=1))


def test_strided_views_and_capacity_padding():
    lengths = [5, 2]
    q, k, v = make(7, 7)
    fused = torch.cat((q, k, v), dim=1)
    views = fused.split((4, 2, 2), dim=1)
    sequences = sequences_from_lengths(lengths)
    padded = sequences._replace(cu_seqlens=torch.tensor([0, 5, 7, 7, 7], dtype=torch.int32))
    assert torch.equal(varlen_attention(*views, padded), varlen_attention(q, k, v, sequences))


def test_scale_is_used():
    q, k, v = make(6, 6)
    sequences = sequences_from_lengths([6])
    scaled = varlen_attention(q, k, v, sequences, softmax_scale=0.5)
    assert relative_error(scaled, varlen_attention(q * 2, k, v, sequences)) < 1e-12


def test_errors_name_the_argument_and_what_came():
    q, k, v = make(6, 6)
    sequences = sequences_from_lengths([6])
    with pytest.raises(ValueError, match=r"sequences must cover all 6 tokens, got .* at 5"):
        varlen_attention(q, k, v, sequences_from_lengths([5]))
    with pytest.raises(ValueError, match="q must have a multiple of K=2 heads, got H=3"):
        varlen_attention(q[:, :3], k, v, sequences)
    with pytest.raises(TypeError, match="k must be float64, got float32"):
        varlen_attention(q, k.float(), v, sequences)
    with pytest.raises(ValueError, match=r"v must have shape .*, got \(5, 2, 16\)"):
        varlen_attention(q, k, v[:5], sequences)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        varlen_attention(q, k, v, sequences, window_size=0)
    with pytest.raises(ValueError, match="as many sequences as q's, 1, got 2"):
        varlen_attention(q, k, v, sequences, k_sequences=sequences_from_lengths([3, 3]))


LONGER = st.lists(st.sampled_from([1, 15, 16, 17, 32, 65, 257, 300]), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(
    LONGER,
    st.lists(st.integers(-20, 40), min_size=3, max_size=3),
    st.sampled_from([8, 16, 24, 64, 80]),
    st.sampled_from([None, 1, 5, 40, 280]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(FLOATS),
)
def test_the_cpu_kernel_over_its_blocks(lengths, more, head_dim, window, softcap, dtype):
    """Blocks of 8 to 32 queries, strips of 256 keys, more and fewer keys than queries."""
    k_lengths = [max(1, n + m) for n, m in zip(lengths, more, strict=False)]
    tensors = make(sum(lengths), sum(k_lengths), 3, 1, head_dim, dtype)
    sequences = sequences_from_lengths(lengths)
    options = {
        "k_sequences": sequences_from_lengths(k_lengths),
        "window_size": window,
        "softcap": softcap,
    }
    actual = run(varlen_attention, tensors, sequences, impl="cpp", **options)
    low = run(reference.varlen_attention, tensors, sequences, **options)
    high = run(reference.varlen_attention, [x.double() for x in tensors], sequences, **options)
    for part in (slice(0, 1), slice(1, None)):
        joined = (torch.cat([x.flatten() for x in xs[part]]) for xs in (actual, low, high))
        assert_within_reference_error(*joined)


def test_the_cpu_kernel_does_not_depend_on_neighbours_threads_or_memory():
    lengths = [70, 3, 300]
    tensors = make(373, 373, dtype=torch.bfloat16)
    sequences = sequences_from_lengths(lengths)
    packed = run(varlen_attention, tensors, sequences, impl="cpp")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        again = run(varlen_attention, tensors, sequences, impl="cpp")
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(packed, again, strict=True))
    alone = varlen_attention(*(x[73:] for x in tensors), sequences_from_lengths([300]), impl="cpp")
    assert torch.equal(packed[0][73:], alone)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = make(40, 40, dtype=torch.float32)
    out = varlen_attention(q * 1e4, k * 1e4, v, sequences_from_lengths([40]), impl="cpp")
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1))
    seen = scores.masked_fill(~reference.attention_mask(40, 40), -torch.inf)
    expected = v.repeat_interleave(2, dim=1)[seen.argmax(-1), torch.arange(4)[:, None]]
    torch.testing.assert_close(out, expected.transpose(0, 1))


def test_the_cpu_kernel_refuses_edges_that_do_not_rise():
    q, k, v = make(6, 6)
    sequences = sequences_from_lengths([6])
    bad = sequences._replace(cu_seqlens=torch.tensor([0, 4, 2, 6], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to at most 6, got 2"):
        varlen_attention(q, k, v, bad, impl="cpp")


def test_op_registration_and_compilation():
    q, k, v = (x.requires_grad_() for x in make(7, 7))
    sequences = sequences_from_lengths([5, 2])
    edges = sequences.cu_seqlens
    torch.library.opcheck(torch.ops.varlen_sft.attention_cpu, (q, k, v, edges, edges, 0.25, 3, 2.0))
    torch.library.opcheck(torch.ops.varlen_sft.sdpa_cpu, (q, k, v, sequences.cu_seqlens, 0.25))
    compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v, sequences), varlen_attention(q, k, v, sequences))


def test_reference_gradient():
    leaves = [x.requires_grad_() for x in make(5, 5, 2, 1, 4)]
    sequences = sequences_from_lengths([3, 2])
    assert torch.autograd.gradcheck(
        lambda q, k, v: reference.varlen_attention(q, k, v, sequences, window_size=2, softcap=3.0),
        leaves,
    )
