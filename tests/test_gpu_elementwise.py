"""On a CUDA device (make gpu): the Triton norms and SwiGLU, picked there, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers import random_samples, tiny_hf_config, tiny_model
from tests.test_gpu import LOW, assert_like_reference, drawn, no_wait, with_gradients
from varlen_sft import reference
from varlen_sft.data.batch import collate
from varlen_sft.ops import elementwise
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device (make gpu)"),
]

TOKENS = (0, 1, 33, 5000)
COLUMNS = (1, 33, 576, 1024, 2048, 4096, 8192)


def one(op):
    """An op of one output as the helpers take it."""
    return lambda *tensors: (op(*tensors),)


def norm_inputs(tokens: int, columns: int, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """x, residual, weight; and eps, large for rows of one value, whose gradient cancels."""
    x, residual = (drawn(tokens, columns, dtype=dtype, seed=i) for i in range(2))
    return [x, residual, drawn(columns, dtype=dtype, seed=3)], 0.1 if columns == 1 else 1e-5


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norms_equal_the_reference(tokens, columns, dtype):
    tensors, eps = norm_inputs(tokens, columns, dtype)
    assert_like_reference(
        one(lambda x, w: rms_norm(x, w, eps)),
        one(lambda x, w: reference.rms_norm(x, w, eps)),
        tensors[::2],
    )
    for outputs in (slice(2), slice(1)):  # with a gradient of the sum, and without
        assert_like_reference(
            lambda *t, which=outputs: add_rms_norm(*t, eps)[which],
            lambda *t, which=outputs: reference.add_rms_norm(*t, eps)[which],
            tensors,
        )
    assert torch.equal(add_rms_norm(*tensors, eps)[1], tensors[0] + tensors[1])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("columns", [*COLUMNS, 14336])
@pytest.mark.parametrize("tokens", TOKENS)
def test_swiglu_equals_the_reference(tokens, columns, dtype):
    fused = drawn(tokens, 2 * columns, dtype=dtype)
    for tensors in ([fused], list(fused.chunk(2, dim=-1))):
        ours = one(lambda *t: silu_mul(*t, impl="triton"))
        assert_like_reference(ours, one(reference.silu_mul), tensors)


@pytest.mark.parametrize("dtype", LOW)
def test_rows_lie_where_they_lie(dtype):
    """Rows of a wider buffer, at an odd offset too, where no access is wide."""
    buffer, weight = drawn(130, 700, dtype=dtype), drawn(576, dtype=dtype)
    for left in (0, 8, 3):
        x, residual = buffer[:65, left : left + 576], buffer[65:, left : left + 576]
        ours = with_gradients(lambda *t: add_rms_norm(*t, 1e-5), [x, residual, weight])
        dense = [x.contiguous(), residual.contiguous(), weight]
        for a, b in zip(
            ours, with_gradients(lambda *t: add_rms_norm(*t, 1e-5), dense), strict=True
        ):
            assert torch.equal(a, b)
        product = with_gradients(one(silu_mul), [x, residual])
        for a, b in zip(product, with_gradients(one(silu_mul), dense[:2]), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [576, 2048, 8192])
def test_the_same_bits_every_time(columns):
    tensors, eps = norm_inputs(5000, columns, torch.bfloat16)
    first, *others = (with_gradients(lambda *t: add_rms_norm(*t, eps), tensors) for _ in range(5))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_16_bit_results_are_eager_torch_s_but_for_a_few():
    """A sum or an exponential that is one fp32 rounding off may fall on the other side."""
    tensors, eps = norm_inputs(5000, 2048, torch.bfloat16)
    normed, expected = add_rms_norm(*tensors, eps)[0], reference.add_rms_norm(*tensors, eps)[0]
    assert (normed != expected).float().mean() < 1e-3
    assert (silu_mul(*tensors[:2]) != reference.silu_mul(*tensors[:2])).float().mean() < 1e-3


def test_they_are_picked_where_they_fit(monkeypatch):
    ran = []
    for name in ("_RMSNorm", "_AddRMSNorm", "_SiluMul"):
        kind = getattr(elementwise, name)
        noted = lambda *args, kind=kind: (ran.append(kind.__name__), kind.apply(*args))[1]  # noqa: E731
        monkeypatch.setattr(elementwise, name, type(name, (), {"apply": staticmethod(noted)}))

    def all_ops(dtype: torch.dtype, columns: int = 64) -> list[str]:
        ran.clear()
        (x, residual, weight), eps = norm_inputs(3, columns, dtype)
        rms_norm(x, weight, eps)
        add_rms_norm(x, residual, weight, eps)
        silu_mul(x, residual)
        return list(ran)

    assert all_ops(torch.bfloat16) == ["_RMSNorm", "_AddRMSNorm", "_SiluMul"]
    assert all_ops(torch.float64) == []  # the kernels compute in fp32
    assert all_ops(torch.bfloat16, 2**13 + 2) == ["_SiluMul"]  # rows too long for one program


# Inductor of torch 2.11 imports what calls it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_graphs_are_whole_and_theirs():
    """No break; what runs inside is the formula, for the compiler to fuse."""
    tensors, eps = norm_inputs(33, 64, torch.bfloat16)

    def block(x, residual, weight):
        normed, total = add_rms_norm(rms_norm(x, weight, eps), residual, weight, eps)
        return silu_mul(normed), total

    compiled = torch.compile(block, fullgraph=True)
    eager, fused = with_gradients(block, tensors), with_gradients(compiled, tensors)
    for a, b in zip(eager, fused, strict=True):
        assert (a.float() - b.float()).norm() <= 0.02 * b.float().norm()


def test_nothing_waits():
    tensors, eps = norm_inputs(33, 576, torch.bfloat16)
    x, residual, weight = (t.requires_grad_() for t in tensors)
    flows = drawn(33, 288, dtype=torch.bfloat16), drawn(33, 576, dtype=torch.bfloat16)
    for context in (torch.enable_grad, no_wait):  # the first call compiles
        with context():
            normed, total = add_rms_norm(rms_norm(x, weight, eps), residual, weight, eps)
            out = silu_mul(normed), silu_mul(normed, total)
            torch.autograd.grad(out, (x, residual, weight), flows)


def test_a_model_uses_them(monkeypatch):
    model = tiny_model(tiny_hf_config(max_position_embeddings=512), torch.bfloat16).cuda()
    batch = collate(random_samples([64, 7])).to("cuda")

    def losses() -> float:
        return float(model(batch).loss_sum.detach())

    ours = losses()
    monkeypatch.setattr(elementwise, "_pick", lambda *args, **kwargs: "reference")
    eager = losses()
    assert ours != 0 and abs(ours - eager) <= 0.02 * abs(eager)
