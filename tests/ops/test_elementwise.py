from __future__ import annotations

import pytest
import torch

from tests.helpers import FLOATS, assert_within_reference_error
from varlen_sft import _extension, reference
from varlen_sft.ops import backends
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul

needs_extension = pytest.mark.skipif(not _extension.load(), reason=_extension.status())
SIZES = [(1, 5), (3, 17), (130, 576)]


def run(op, *tensors, **kwargs):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = op(*leaves, **kwargs)
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.double).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)]


def compare(op, spec, tensors, **kwargs):
    actual = run(op, *tensors, impl="cpp", **kwargs)
    low = run(spec, *tensors, **kwargs)
    high = run(spec, *(x.double() for x in tensors), **kwargs)
    for a, b, c in zip(actual, low, high, strict=True):
        assert a.dtype == tensors[0].dtype
        assert_within_reference_error(a, b, c)


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator).to(dtype)
    weight = torch.randn(size[1], generator=generator).to(dtype)
    compare(rms_norm, reference.rms_norm, (x, weight), eps=1e-5)


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(size, dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(size[1], generator=generator).to(dtype)

    def joined(spec):  # both outputs, so that both gradients flow
        return lambda *tensors, **kwargs: torch.cat(spec(*tensors, **kwargs))

    tensors = (x, residual, weight)
    compare(joined(add_rms_norm), joined(reference.add_rms_norm), tensors, eps=1e-5)
    assert torch.equal(add_rms_norm(*tensors, 1e-5, impl="cpp")[1], x + residual)
    alone = run(lambda *t: add_rms_norm(*t, 1e-5, impl="cpp")[0], *tensors)
    of_sum = run(lambda *t: rms_norm(*t, 1e-5, impl="cpp"), x + residual, weight)
    assert torch.equal(alone[0], of_sum[0]) and torch.equal(alone[1], of_sum[1])
    assert torch.equal(alone[1], alone[2])
    only_sum = add_rms_norm(*(t.requires_grad_() for t in tensors), 1e-5, impl="cpp")[1]
    ones = torch.autograd.grad(only_sum.sum(), tensors, allow_unused=True)
    assert (ones[0] == 1).all() and (ones[1] == 1).all() and ones[2] is None


@needs_extension
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(size, dtype):
    gate_up = torch.randn(size[0], 2 * size[1], generator=torch.Generator().manual_seed(0))
    compare(silu_mul, reference.silu_mul, (gate_up.to(dtype),))
    halves = [half.to(dtype) for half in gate_up.chunk(2, dim=-1)]
    compare(silu_mul, reference.silu_mul, halves)
    fused = run(silu_mul, gate_up.to(dtype), impl="cpp")
    apart = run(silu_mul, *halves, impl="cpp")
    assert torch.equal(fused[0], apart[0]) and torch.equal(fused[1], torch.cat(apart[1:], -1))


@needs_extension
def test_strided_rows_are_read_where_they_lie():
    buffer = torch.randn(9, 80, dtype=torch.double)
    weight = torch.randn(32, dtype=torch.double)
    view = buffer[:, 7:39]
    torch.testing.assert_close(
        rms_norm(view, weight, 1e-5, impl="cpp"), reference.rms_norm(view, weight, 1e-5)
    )
    torch.testing.assert_close(silu_mul(view, impl="cpp"), reference.silu_mul(view))
    gate, up = buffer[:, :32], buffer[:, 41:73]
    torch.testing.assert_close(silu_mul(gate, up, impl="cpp"), reference.silu_mul(gate, up))


def test_rms_norm_is_that_of_transformers_bit_for_bit_in_bf16():
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(64, eps=1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(50, 64).bfloat16()
    assert torch.equal(reference.rms_norm(x, norm.weight, 1e-5), norm(x))


def test_errors_name_the_argument_and_what_came():
    with pytest.raises(ValueError, match="gate_up must have an even number of columns, got 3"):
        silu_mul(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"up must have shape \(T=2, I=3\), got \(2, 4\)"):
        silu_mul(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeError, match="weight must be float32, got float64"):
        rms_norm(torch.zeros(2, 3), torch.zeros(3).double(), 1e-5)
    with pytest.raises(ValueError, match=r"weight must have shape \(C=3\), got \(4,\)"):
        rms_norm(torch.zeros(2, 3), torch.zeros(4), 1e-5)
    with pytest.raises(ValueError, match=r"residual must have shape \(T=2, C=3\), got \(1, 3\)"):
        add_rms_norm(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(3), 1e-5)


@needs_extension
def test_op_registration():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.varlen_sft.rms_norm_cpu, (x, weight, 1e-5))
    residual = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.varlen_sft.add_rms_norm_cpu, (x, residual, weight, 1e-5))
    torch.library.opcheck(torch.ops.varlen_sft.silu_mul_fused_cpu, (x,))
    torch.library.opcheck(torch.ops.varlen_sft.silu_mul_cpu, (x, residual))


def test_a_compiler_gets_the_formulas_where_kernels_would_be_launched(monkeypatch):
    here = backends.TRITON._replace(device_types=("cpu",), missing="")
    monkeypatch.setitem(backends.BACKENDS, "elementwise", (here, backends.REFERENCE))
    tensors = [torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)]

    def block(x, residual, weight):
        normed, total = add_rms_norm(rms_norm(x, weight, 1e-5), residual, weight, 1e-5)
        return torch.cat((silu_mul(normed, total), silu_mul(total).repeat(1, 2)))

    def formulas(x, residual, weight):
        normed, total = reference.add_rms_norm(
            reference.rms_norm(x, weight, 1e-5), residual, weight, 1e-5
        )
        halves = reference.silu_mul(total).repeat(1, 2)
        return torch.cat((reference.silu_mul(normed, total), halves))

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, *tensors), run(formulas, *tensors), strict=True):
        torch.testing.assert_close(a, b)
