from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.helpers import FLOATS, ROPE_PARAMETERS, assert_within_reference_error
from varlen_sft import _extension, reference
from varlen_sft.ops.backends import INTERPRETED
from varlen_sft.ops.rope import apply_rope, apply_rope_, rope_table

IMPLS = [
    "reference",
    pytest.param(
        "cpp", marks=pytest.mark.skipif(not _extension.load(), reason=_extension.status())
    ),
]
POSITIONS = 64


def make(total, heads, kv_heads, head_dim, rotary, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(
        total, heads + 2 * kv_heads, head_dim, generator=generator, dtype=torch.double
    )
    q, k, _ = qkv.to(dtype).split((heads, kv_heads, kv_heads), dim=1)  # views of a fused buffer
    parameters = {**ROPE_PARAMETERS["default"], "partial_rotary_factor": rotary / head_dim}
    cos, sin = rope_table(parameters, head_dim, POSITIONS)
    ids = torch.randint(0, POSITIONS, (total,), generator=generator)
    return q, k, cos, sin, ids


def eager_hf(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor):
    """transformers' own function on its own layout, (B, H, T, D)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    cos, sin = (torch.cat((x[ids], x[ids]), -1).to(q.dtype)[None] for x in (cos, sin))
    q, k = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


@pytest.mark.parametrize("impl", IMPLS)
@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    st.sampled_from([(16, 16), (80, 80), (64, 24), (6, 4)]),
    st.booleans(),
    st.sampled_from(FLOATS),
    st.integers(0, 99),
)
def test_values_and_gradients(impl, total, heads, dims, interleaved, dtype, seed):
    q, k, cos, sin, ids = make(total, *heads, *dims, dtype, seed)
    kwargs = {"interleaved": interleaved}

    def run(op, q, k, **more):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = op(q, k, cos, sin, ids, **kwargs, **more)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=torch.double).view_as(x) for x in out]
        loss = sum((x * w.to(x.dtype)).sum() for x, w in zip(out, weights, strict=True))
        return [x.detach() for x in (*out, *torch.autograd.grad(loss, (q, k)))]

    actual = run(apply_rope, q, k, impl=impl)
    low = run(reference.apply_rope, q, k)
    high = run(reference.apply_rope, q.double(), k.double())
    for a, b, c in zip(actual, low, high, strict=True):
        assert_within_reference_error(a, b, c)
    assert torch.equal(actual[0][..., 2 * cos.shape[1] :], q[..., 2 * cos.shape[1] :])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_hf_numerics_are_bit_equal_to_transformers_forward_and_backward(impl, dtype):
    q, k, cos, sin, ids = make(33, 3, 1, 64, 64, dtype)
    generator = torch.Generator().manual_seed(1)
    dq, dk = (torch.randn(x.shape, generator=generator).to(dtype) for x in (q, k))

    def run(op):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k)]
        out = op(*leaves)
        return *out, *torch.autograd.grad(out, leaves, (dq, dk))

    ours = run(lambda q, k: apply_rope(q, k, cos, sin, ids, numerics="hf", impl=impl))
    theirs = run(lambda q, k: eager_hf(q, k, cos, sin, ids))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_fp32_numerics_are_closer_to_fp64_than_hf():
    q, k, cos, sin, ids = make(64, 4, 4, 64, 64, torch.bfloat16)
    exact = reference.apply_rope(q.double(), k.double(), cos, sin, ids)[0]
    error = {
        numerics: (apply_rope(q, k, cos, sin, ids, numerics=numerics)[0] - exact).norm()
        for numerics in ("fp32", "hf")
    }
    assert error["fp32"] < 0.8 * error["hf"]


@pytest.mark.parametrize("impl", IMPLS)
def test_views_are_read_where_they_lie(impl):
    q, k, cos, sin, ids = make(7, 4, 2, 16, 16)
    expected = apply_rope(q.contiguous(), k.contiguous(), cos, sin, ids, impl="reference")
    transposed = q.transpose(0, 1).contiguous().transpose(0, 1)  # HF's layout
    for view in (q, transposed):
        out = apply_rope(view, k, cos, sin, ids, impl=impl)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_equals_out_of_place_and_leaves_the_rest_of_the_buffer(impl):
    q, k, cos, sin, ids = make(9, 4, 2, 16, 8)
    expected = apply_rope(q, k, cos, sin, ids, impl=impl)
    buffer = torch.cat((q, k, k), dim=1)
    got = apply_rope_(buffer[:, :4], buffer[:, 4:6], cos, sin, ids, impl=impl)
    assert got[0].data_ptr() == buffer.data_ptr()
    assert torch.equal(buffer, torch.cat((*expected, k), dim=1))
    with pytest.raises(RuntimeError, match="use apply_rope"):
        apply_rope_(buffer.requires_grad_()[:, :4], k, cos, sin, ids, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [-1, POSITIONS])
def test_a_position_outside_the_table_is_named(impl, bad):
    q, k, cos, sin, ids = make(5, 2, 1, 16, 16)
    ids[3] = bad
    with pytest.raises(ValueError, match=rf"position_ids must be in \[0, 64\), got {bad} at row 3"):
        apply_rope(q, k, cos, sin, ids, impl=impl)


def test_errors_name_the_argument_and_what_came():
    q, k, cos, sin, ids = make(5, 2, 1, 16, 16)
    with pytest.raises(TypeError, match="q must be float64 or .*, got int64"):
        apply_rope(q.long(), k, cos, sin, ids)
    with pytest.raises(TypeError, match="cos must be float32, got bfloat16"):
        apply_rope(q, k, cos.bfloat16(), sin, ids)
    with pytest.raises(ValueError, match=r"k must have shape \(T=5, K, D=16\), got \(5, 1, 8\)"):
        apply_rope(q, k[..., :8], cos, sin, ids)
    with pytest.raises(ValueError, match=r"at most D/2 = 4 columns, got 8"):
        apply_rope(q[..., :8], k[..., :8], cos, sin, ids)
    with pytest.raises(ValueError, match=r"position_ids must have shape \(T=5\), got \(4\,\)"):
        apply_rope(q, k, cos, sin, ids[:4])
    with pytest.raises(ValueError, match="numerics must be 'fp32' or 'hf', got 'bf16'"):
        apply_rope(q, k, cos, sin, ids, numerics="bf16")
    with pytest.raises(ValueError, match="q must be contiguous on its last axis"):
        apply_rope(q[..., ::2], k[..., ::2], cos[:, :4], sin[:, :4], ids)
    with pytest.raises(ValueError, match="one of cpp, triton, reference, got 'x'"):
        apply_rope(q, k, cos, sin, ids, impl="x")
    if not INTERPRETED:
        with pytest.raises(ValueError, match="impl='triton' runs on cuda, got tensors on cpu"):
            apply_rope(q, k, cos, sin, ids, impl="triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_op_registration_and_compilation(impl):
    q, k, cos, sin, ids = make(5, 2, 1, 16, 16)
    q, k = q.contiguous().requires_grad_(), k.contiguous().requires_grad_()
    torch.library.opcheck(
        torch.ops.varlen_sft.rope, (q, k, cos, sin, ids, False, False, False, impl)
    )
    compiled = torch.compile(apply_rope, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, cos, sin, ids)[0], apply_rope(q, k, cos, sin, ids)[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_reference_gradient(interleaved):
    q, k, cos, sin, ids = make(3, 2, 1, 6, 4)
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda q, k: reference.apply_rope(q, k, cos, sin, ids, interleaved=interleaved), leaves
    )


# ------------------------------------------------------------------------ Triton


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_launch_compiles_what_the_list_of_variants_says(monkeypatch):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from varlen_sft.ops import rope_triton

    kernel = rope_triton.rope_kernel
    target = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, target)
    compiled = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: compiled.append(bind(*args, **kwargs))

    monkeypatch.setattr(rope_triton, "rope_kernel", Kernel())
    floats = {"*fp32": torch.float32, "*bf16": torch.bfloat16, "*fp16": torch.float16}
    for variant in rope_triton.variants():
        meta, dtype = variant.constexprs, floats[variant.signature["q"]]
        in_place = "in place" in variant.name
        dim = 2 * meta["HALF"] + (48 if in_place else meta["REST"])
        buffer = torch.empty(5, meta["H"] + 2 * meta["K"], dim, dtype=dtype)
        q, k = buffer[:, : meta["H"]], buffer[:, meta["H"] : meta["H"] + meta["K"]]
        outs = (q, k) if in_place else (torch.empty_like(q), torch.empty_like(k))
        ids = torch.arange(5, dtype=torch.int32 if "int32" in variant.name else torch.int64)
        tables = torch.empty(2, 9, meta["HALF"])
        flags = (meta["INTERLEAVED"], meta["HF"], meta["INVERSE"])
        rope_triton.rope(*outs, q, k, *tables, ids, *flags)
        arguments, types, options = compiled.pop()
        types = dict(zip(arguments, types, strict=True))
        assert {name: kind for name, (kind, _) in types.items()} == variant.signature
        assert {name: arguments[name] for name in meta} == meta
        assert tuple(name for name, (_, hint) in types.items() if hint == "D") == variant.aligned
        assert options == {
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.enable_fp_fusion,
        }


def on_cuda(*tensors: Tensor) -> list[Tensor]:
    return [x.cuda() for x in tensors]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "dims"),
    [
        ((1, 1), (16, 16)),
        ((9, 3), (80, 80)),
        ((32, 8), (128, 128)),
        ((16, 8), (256, 256)),
        ((4, 2), (64, 24)),
        ((2, 7), (6, 4)),
    ],
)
def test_values_and_gradients_on_a_gpu_without_a_sync(heads, dims, interleaved, dtype):
    q, k, cos, sin, ids = make(129, *heads, *dims, dtype)

    def run(op, q, k, cos, sin, ids, **more):
        q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
        out = op(q, k, cos, sin, ids, interleaved=interleaved, **more)
        gradients = (q.detach().flip(0), k.detach().flip(0))
        return [x.detach() for x in (*out, *torch.autograd.grad(out, (q, k), gradients))]

    low = run(reference.apply_rope, q, k, cos, sin, ids)
    high = run(reference.apply_rope, q.double(), k.double(), cos, sin, ids)
    arguments = on_cuda(q, k, cos, sin, ids)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = run(apply_rope, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b, c in zip(actual, low, high, strict=True):
        assert_within_reference_error(a.cpu(), b, c)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_hf_numerics_on_a_gpu_are_bit_equal_to_transformers(dtype):
    q, k, cos, sin, ids = on_cuda(*make(129, 9, 3, 128, 128, dtype))

    def run(op):
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        out = op(*leaves)
        return *out, *torch.autograd.grad(out, leaves, (q.flip(0), k.flip(0)))

    ours = run(lambda q, k: apply_rope(q, k, cos, sin, ids, numerics="hf", impl="triton"))
    theirs = run(lambda q, k: eager_hf(q, k, cos, sin, ids))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@needs_cuda
def test_in_place_on_a_gpu_equals_out_of_place():
    q, k, cos, sin, ids = on_cuda(*make(129, 9, 3, 80, 32, torch.bfloat16))
    expected = apply_rope(q, k, cos, sin, ids, impl="triton")
    q, k = apply_rope_(q.clone(), k.clone(), cos, sin, ids, impl="triton")
    assert torch.equal(q, expected[0]) and torch.equal(k, expected[1])
