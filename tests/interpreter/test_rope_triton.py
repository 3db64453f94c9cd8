"""The Triton RoPE kernel, interpreted: values, fences, bits, addresses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import ROPE_PARAMETERS, assert_within_reference_error
from tests.ops.test_rope import eager_hf
from varlen_sft import reference
from varlen_sft.ops import rope_triton
from varlen_sft.ops.rope import apply_rope, apply_rope_, rope_table

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BITS = {2: torch.int16, 4: torch.int32}
POSITIONS = 70
CANARY = 77.0

# One token, edges of a block of tokens, one long sequence among short ones.
PACKS = st.one_of(
    st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17]), min_size=1, max_size=4),
    st.permutations([61, 1, 1, 2, 1]),
)
HEADS = st.sampled_from([(1, 1), (3, 1), (4, 2), (9, 3), (17, 5), (2, 7)])
# (D, R): powers of two and not, halves that 16 bytes do not divide, partial rotary.
DIMS = st.sampled_from([(16, 16), (80, 80), (96, 96), (112, 112), (256, 256)] +
                       [(64, 24), (6, 4), (96, 32), (72, 72)])  # fmt: skip
LAYOUTS = st.sampled_from(["fused", "transposed", "contiguous"])


def laid_out(q: Tensor, k: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same values as views of one buffer (T, H + 2 K, D), of (H, T, D), or plain."""
    if layout == "fused":
        q, k, _ = torch.cat((q, k, k), dim=1).split((q.shape[1], k.shape[1], k.shape[1]), dim=1)
        return q, k
    if layout == "transposed":
        return tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    return q.clone(), k.clone()


def make(lengths, heads, dims, dtype, seed=0, layout="fused"):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    q, k = (torch.randn(total, n, dims[0], generator=generator).to(dtype) for n in heads)
    parameters = {**ROPE_PARAMETERS["default"], "partial_rotary_factor": dims[1] / dims[0]}
    cos, sin = rope_table(parameters, dims[0], POSITIONS)
    if seed % 2:
        ids = torch.randint(0, POSITIONS, (total,), generator=generator)
    else:
        ids = reference.position_ids_from_lengths(lengths)
    return *laid_out(q, k, layout), cos, sin, ids


def bits(x: Tensor) -> Tensor:
    """For comparisons that tell -0 from +0 and one NaN from another."""
    return x.contiguous().view(BITS[x.element_size()])


def same_bits(actual, expected) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(actual, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(PACKS, HEADS, DIMS, st.booleans(), st.sampled_from(DTYPES), LAYOUTS, st.integers(0, 99))
def test_values_and_gradients(lengths, heads, dims, interleaved, dtype, layout, seed):
    q, k, cos, sin, ids = make(lengths, heads, dims, dtype, seed, layout)
    dq, dk, *_ = make(lengths, heads, dims, dtype, seed + 100, layout)

    def run(op, q, k, **more):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = op(q, k, cos, sin, ids, interleaved=interleaved, **more)
        gradients = (dq.to(q.dtype), dk.to(q.dtype))
        return [x.detach() for x in (*out, *torch.autograd.grad(out, (q, k), gradients))]

    actual = run(apply_rope, q, k, impl="triton")
    low = run(reference.apply_rope, q, k)
    high = run(reference.apply_rope, q.double(), k.double())
    for a, b, c in zip(actual, low, high, strict=True):
        assert_within_reference_error(a, b, c)
    for a, b in zip(actual, (q, k, dq, dk), strict=True):
        assert torch.equal(a[..., dims[1] :], b[..., dims[1] :])


@settings(max_examples=20, deadline=None)
@given(PACKS, HEADS, DIMS, st.booleans(), st.sampled_from(DTYPES), st.integers(0, 99))
def test_every_output_is_written_and_nothing_around_it(
    lengths, heads, dims, interleaved, dtype, seed
):
    q, k, cos, sin, ids = make(lengths, heads, dims, dtype, seed)
    buffers, outs = [], []
    for x in (q, k):
        gap_d, gap_h = 8 - seed % 8, 1 + seed % 3  # aligned and not
        buffer = torch.full((x.shape[0] + 2, x.shape[1] + gap_h, x.shape[2] + gap_d), CANARY)
        buffers.append(buffer.to(dtype))
        outs.append(buffers[-1][1:-1, : x.shape[1], : x.shape[2]].fill_(torch.nan))
    rope_triton.rope(*outs, q, k, cos, sin, ids, interleaved, False, False)
    assert same_bits(outs, apply_rope(q, k, cos, sin, ids, interleaved=interleaved, impl="triton"))
    for buffer, out in zip(buffers, outs, strict=True):
        assert torch.isfinite(out).all()
        out.fill_(CANARY)
        assert (buffer == CANARY).all()


def with_zeros(x: Tensor) -> Tensor:
    """A quarter of it 0 and a quarter -0."""
    kind = torch.arange(x.numel()).view(x.shape) * 7 % 4
    return x.masked_fill(kind == 0, 0.0).masked_fill(kind == 1, -0.0)


@pytest.mark.parametrize("layout", ["fused", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [((3, 1), 64), ((9, 3), 80)])
def test_hf_numerics_are_bit_equal_to_transformers_forward_and_backward(heads, dim, dtype, layout):
    q, k, cos, sin, ids = make([17, 1, 15], heads, (dim, dim), dtype, 3, layout)
    dq, dk, *_ = make([17, 1, 15], heads, (dim, dim), dtype, 5, layout)
    cos[2::5], sin[3::5] = 0.0, -0.0  # products of every sign of zero
    q, k, dq, dk = laid_out(with_zeros(q), with_zeros(k), layout) + laid_out(
        with_zeros(dq), with_zeros(dk), layout
    )

    def run(op):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        out = op(*leaves)
        return *(x.detach() for x in out), *torch.autograd.grad(out, leaves, (dq, dk))

    ours = run(lambda q, k: apply_rope(q, k, cos, sin, ids, numerics="hf", impl="triton"))
    assert same_bits(ours, run(lambda q, k: eager_hf(q, k, cos, sin, ids)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_interleaved_hf_numerics_are_the_reference_s(dtype):
    q, k, cos, sin, ids = make([17, 1, 15], (3, 1), (64, 32), dtype, 3)
    kwargs = {"interleaved": True, "numerics": "hf"}
    ours = apply_rope(q, k, cos, sin, ids, **kwargs, impl="triton")
    assert same_bits(ours, reference.apply_rope(q, k, cos, sin, ids, **kwargs))


@pytest.mark.parametrize("interleaved", [False, True])
def test_backward_turns_back(interleaved):
    q, k, cos, sin, ids = make([17, 1, 5], (4, 2), (64, 48), torch.float32, 1)
    leaves = (q.requires_grad_(), k.requires_grad_())
    out = apply_rope(*leaves, cos, sin, ids, interleaved=interleaved, impl="triton")
    back = torch.autograd.grad(out, leaves, [x.detach() for x in out])
    for a, x in zip(back, leaves, strict=True):
        assert_within_reference_error(a, x, x.detach().double())


def test_a_token_s_result_is_bitwise_the_same_in_any_company():
    q, k, cos, sin, ids = make([16, 1, 9], (3, 1), (80, 80), torch.bfloat16)
    together = apply_rope(q, k, cos, sin, ids, impl="triton")
    for start, end in ((0, 16), (16, 17), (17, 26)):
        rows = slice(start, end)
        alone = apply_rope(q[rows], k[rows], cos, sin, ids[rows], impl="triton")
        assert same_bits(alone, [x[rows] for x in together])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (64, 24)])
def test_in_place_equals_out_of_place_and_leaves_all_else(dims, interleaved, dtype):
    q, k, cos, sin, ids = make([9, 1], (9, 3), dims, dtype)
    kwargs = {"interleaved": interleaved, "impl": "triton"}
    expected = apply_rope(q, k, cos, sin, ids, **kwargs)
    buffer = torch.cat((q, k, k), dim=1)
    before = buffer.clone()
    got = apply_rope_(buffer[:, :9], buffer[:, 9:12], cos, sin, ids, **kwargs)
    assert got[0].data_ptr() == buffer.data_ptr()
    assert same_bits((buffer,), (torch.cat((*expected, k), dim=1),))
    assert not torch.equal(buffer, before)


def test_in_place_does_not_move_what_is_past_the_rotary_dimensions(monkeypatch):
    q, k, cos, sin, ids = make([9, 1], (4, 2), (64, 16), torch.bfloat16, layout="contiguous")
    launched = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.update(kwargs)

    monkeypatch.setattr(rope_triton, "rope_kernel", Kernel())
    apply_rope_(q, k, cos, sin, ids, impl="triton")
    assert launched["REST"] == 0
    apply_rope(q, k, cos, sin, ids, impl="triton")
    assert launched["REST"] == 48


@pytest.mark.parametrize("far", ["tokens", "heads"])
def test_addresses_past_two_to_the_31_elements(far):
    """Three rows 2^30 + 32 elements apart: reserved as address space, a few pages are touched."""
    step = 2**30 + 32
    small, *_, cos, sin, ids = make([3], (3, 1), (16, 16), torch.bfloat16, 1, "contiguous")
    strides = (step, 16, 1) if far == "tokens" else (16, step, 1)
    wide = torch.empty(2 * step + 64, dtype=torch.bfloat16).as_strided((3, 3, 16), strides)
    wide.copy_(small)
    expected = apply_rope(small, small, cos, sin, ids, impl="reference", numerics="hf")
    got = apply_rope(wide, wide, cos, sin, ids, impl="triton", numerics="hf")
    assert same_bits(got, expected)
    apply_rope_(wide, small, cos, sin, ids, impl="triton", numerics="hf")  # as an output
    assert same_bits((wide, small), expected)


def test_position_ids_may_be_int32_and_strided():
    q, k, cos, sin, ids = make([17, 1], (3, 1), (16, 16), torch.float32, 1)
    expected = apply_rope(q, k, cos, sin, ids, impl="triton")
    strided = torch.stack((ids, ids.flip(0)), dim=1)[:, 0]
    for other in (ids.int(), strided, strided.int()):
        assert same_bits(apply_rope(q, k, cos, sin, other, impl="triton"), expected)


@pytest.mark.parametrize("bad", [-1, POSITIONS, 2**40, -(2**33)])
def test_a_position_outside_the_table_is_named_or_gives_nan(bad):
    q, k, cos, sin, ids = make([9], (3, 1), (64, 24), torch.bfloat16, 1)
    expected = apply_rope(q, k, cos, sin, ids, impl="triton")
    ids[3] = bad
    with pytest.raises(ValueError, match=rf"in \[0, {POSITIONS}\), got {bad} at row 3"):
        apply_rope(q, k, cos, sin, ids, impl="triton")
    outs = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k)]
    with pytest.raises(RuntimeError, match=r"position_ids must be in \[0, P\)"):  # as on a device
        rope_triton.rope(*outs, q, k, cos, sin, ids, False, False, False)
    for out, value in zip(outs, expected, strict=True):
        assert out[3].isnan().all()
        assert same_bits((out[:3], out[4:]), (value[:3], value[4:]))


def test_what_the_kernel_does_not_take():
    q, k, cos, sin, ids = make([5], (2, 1), (16, 16), torch.float32)
    with pytest.raises(TypeError, match="q must be float32 or bfloat16 or float16, got float64"):
        apply_rope(q.double(), k.double(), cos, sin, ids, impl="triton")
    doubled = torch.cat((cos, cos), dim=1)[:, :8]
    with pytest.raises(ValueError, match=r"cos must be contiguous, got strides \(16, 1\)"):
        apply_rope(q, k, doubled, sin, ids, impl="triton")


@pytest.mark.parametrize(("total", "kv_heads", "rotary"), [(0, 1, 16), (5, 0, 16), (5, 1, 0)])
def test_nothing_to_do(total, kv_heads, rotary):
    q, k, ids = torch.randn(total, 3, 16), torch.randn(total, kv_heads, 16), torch.arange(total)
    cos, sin = rope_table(ROPE_PARAMETERS["default"], 16, 8)
    tables = cos[:, : rotary // 2].contiguous(), sin[:, : rotary // 2].contiguous()
    out = apply_rope(q, k, *tables, ids, numerics="hf", impl="triton")
    assert same_bits(out, reference.apply_rope(q, k, *tables, ids, numerics="hf"))


def test_op_registration_and_compilation():
    q, k, cos, sin, ids = make([3, 2], (2, 1), (16, 16), torch.bfloat16, layout="contiguous")
    q, k = q.requires_grad_(), k.requires_grad_()
    torch.library.opcheck(
        torch.ops.varlen_sft.rope, (q, k, cos, sin, ids, False, True, False, "triton")
    )
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    expected = apply_rope(q, k, cos, sin, ids, impl="triton")
    assert same_bits(compiled(q, k, cos, sin, ids, impl="triton"), expected)
