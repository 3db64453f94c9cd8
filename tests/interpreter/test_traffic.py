"""The byte counter against kernels known by hand, and the bytes that our kernels may move."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from varlen_sft import reference
from varlen_sft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
from varlen_sft.ops.cross_entropy_triton import score_rows_triton
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul
from varlen_sft.ops.rope import apply_rope, apply_rope_
from varlen_sft.tools.traffic import (
    Traffic,
    count,
    cross_entropy_least,
    norm_least,
    rope_least,
    silu_mul_least,
)

# ------------------------------------------------------------------ the counter


@triton.jit
def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns * stride, mask=columns < n)
    tl.store(y_ptr + columns, x, mask=columns < n)


@triton.jit
def scale_by_scalar(x_ptr, by_ptr):
    tl.store(x_ptr, tl.load(x_ptr) * tl.load(by_ptr))


@triton.jit
def add_atomically(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def aligned(n: int, dtype: torch.dtype) -> torch.Tensor:
    """Torch's CPU memory begins at multiples of 64 bytes, on which the sectors here rely."""
    x = torch.zeros(n, dtype=dtype)
    assert x.data_ptr() % 64 == 0
    return x


def test_masked_lanes_do_not_count():
    x, y = aligned(100, torch.float16), aligned(100, torch.float16)
    with count() as traffic:
        copy[(2,)](x, y, 100, 1, BLOCK=64)
    (kernel,) = traffic.kernels.values()
    assert traffic.kernels.keys() == {"copy"}
    assert (kernel.launches, kernel.loaded, kernel.stored) == (1, 200, 200)
    assert kernel.sectors == 2 * (4 + 3)  # 128 bytes, then 72
    assert (traffic.kernel_bytes, traffic.sector_bytes) == (400, 448)
    assert traffic.total == 400  # sectors are told beside, not added


def test_strided_elements_touch_a_sector_each():
    x, y = aligned(8 * 16, torch.float16), aligned(8, torch.float16)
    with count() as traffic:
        copy[(1,)](x, y, 8, 16, BLOCK=8)
    assert traffic.kernel_bytes == 2 * 16
    assert traffic.sector_bytes == 32 * (8 + 1)


def test_scalars_and_launches_add_up():
    x, by = torch.ones(1, dtype=torch.float64), torch.full((1,), 3, dtype=torch.int64)
    with count() as traffic:
        scale_by_scalar[(1,)](x, by)
        scale_by_scalar[(2,)](x, by)
    kernel = traffic.kernels["scale_by_scalar"]
    assert x.item() == 27
    assert (kernel.launches, kernel.loaded, kernel.stored) == (2, 3 * 16, 3 * 8)


def test_traffic_adds_up():
    x = torch.ones(1, dtype=torch.float32)
    with count() as first:
        scale_by_scalar[(1,)](x, x)
    with count() as second:
        scale_by_scalar[(1,)](x, x)
        x.clone()
    both = first + second
    assert both.kernels["scale_by_scalar"].launches == 2
    assert (both.kernel_bytes, both.torch_bytes) == (24, 8)


def test_what_cannot_be_counted_is_refused(monkeypatch):
    with pytest.raises(triton.runtime.errors.InterpreterError, match="atomics are not counted"):
        with count():
            add_atomically[(1,)](torch.zeros(1))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"), count():
        pass


X = torch.arange(12.0).view(3, 4)  # 48 bytes
TORCH_OPS = {
    "a view": (lambda: X.t()[1:].unsqueeze(0).expand(5, -1, -1), {}),
    "an allocation": (lambda: X.new_empty(1000), {}),
    "contiguous of what is": (lambda: X.contiguous(), {}),
    "contiguous": (lambda: X.t().contiguous(), {"clone": 96}),
    "reshape": (lambda: X.t().reshape(12), {"clone": 96}),
    "zeros": (lambda: X.new_zeros(3, 4), {"new_zeros": 48}),
    "out of place": (lambda: X * 2, {"mul": 96}),
    "in place": (lambda: X.clone().mul_(2), {"clone": 96, "mul_": 96}),
    "overwriting": (lambda: torch.empty(3, 4).copy_(X), {"copy_": 96}),
    "an expanded operand": (lambda: X.new_zeros(1).expand(3, 4) + X, {"new_zeros": 4, "add": 100}),
    "an out argument": (lambda: torch.mul(X, 2, out=torch.empty(3, 4)), {"mul": 96}),
    "gathered rows": (lambda: X[torch.tensor([1])], {"index": 16 + 8 + 16}),
    "scattered rows": (
        lambda: X.clone().index_copy_(0, torch.tensor([1]), X[:1]),
        {"clone": 96, "index_copy_": 8 + 16 + 16},
    ),
    "added rows": (
        lambda: X.clone().index_add_(0, torch.tensor([1]), X[:1]),
        {"clone": 96, "index_add_": 8 + 16 + 32},
    ),
}


@pytest.mark.parametrize("name", TORCH_OPS)
def test_bytes_of_torch_ops(name):
    call, expected = TORCH_OPS[name]
    with count() as traffic:
        call()
    assert traffic.torch == expected
    assert not traffic.gemms and not traffic.kernels


def test_matrix_products_are_counted_apart():
    with count() as traffic:
        torch.nn.functional.linear(X, X)
        torch.matmul(X, X.T)
    assert traffic.gemms == {"mm": 2 * (48 + 48 + 36)}
    assert traffic.torch_bytes == 0


def test_ops_inside_our_own_ops_are_seen():
    q, k, (cos, sin) = torch.ones(4, 2, 8), torch.ones(4, 1, 8), table(8, 4)
    with count() as traffic:
        apply_rope(q, k, cos, sin, torch.arange(4), impl="reference")
    assert traffic.torch["mul"] > 0


# ------------------------------------------------------------------------ RoPE

T, H, K, D = 6, 8, 2, 64


def table(rotary: int, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    parameters = {"rope_type": "default", "rope_theta": 10000.0}
    return reference.rope_table(parameters, rotary, positions)


def views(layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(T, H, D) and (T, K, D) in bf16, as they lie in models."""
    if layout == "own buffers":
        return torch.ones(T, H, D).bfloat16(), torch.ones(T, K, D).bfloat16()
    if layout == "fused qkv":
        qkv = torch.ones(T, H + 2 * K, D).bfloat16()
        return qkv[:, :H], qkv[:, H : H + K]
    q, k = torch.ones(1, H, T, D).bfloat16(), torch.ones(1, K, T, D).bfloat16()
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]  # HF's (B, H, S, D), turned back


def assert_no_copies(traffic: Traffic) -> None:
    """Torch around the kernel may look at the ids and keep a flag, nothing more."""
    assert traffic.kernels.keys() == {"rope_kernel"}
    assert traffic.torch_bytes <= 16 * T, traffic.torch


@pytest.mark.parametrize("layout", ["own buffers", "fused qkv", "HF transposed"])
@pytest.mark.parametrize("rotary", [D, 32])
def test_rope_moves_the_least_and_copies_nothing(layout, rotary):
    q, k = (x.requires_grad_() for x in views(layout))
    (cos, sin), ids, grads = table(rotary, 64), torch.arange(T), views(layout)
    with count() as forward:
        out = apply_rope(q, k, cos, sin, ids, impl="triton")
    with count() as backward:
        torch.autograd.grad(out, (q, k), grads)
    least = rope_least(q, k, row=4 * rotary, ids=8)
    for traffic in (forward, backward):
        assert least <= traffic.kernel_bytes <= 1.05 * least
        assert traffic.sector_bytes <= 1.05 * least
        assert_no_copies(traffic)


def test_rope_in_place_leaves_what_is_not_rotated():
    q, k = views("fused qkv")
    (cos, sin), ids = table(32, 64), torch.arange(T)
    with count() as traffic:
        apply_rope_(q, k, cos, sin, ids, impl="triton")
    least = rope_least(q[..., :32], k[..., :32], row=4 * 32, ids=8)
    assert least <= traffic.kernel_bytes <= 1.05 * least
    assert_no_copies(traffic)


# --------------------------------------------------------------- cross-entropy

ROWS, SUPERVISED = 5, 2


def labels() -> torch.Tensor:
    return torch.tensor([-100, 3, -100, 0, -100])


@pytest.mark.parametrize("vocab", [8192, 16384, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_row_kernel_moves_the_least(vocab, dtype, gradient):
    logits, weights = torch.randn(ROWS, vocab).to(dtype), torch.ones(ROWS)
    least = cross_entropy_least(logits, SUPERVISED, gradient)
    with count() as traffic:
        score_rows_triton(logits, labels(), weights, [0.0, 1.0, 0.0, 0.0], write_grad=gradient)
    assert least <= traffic.kernel_bytes <= 1.1 * least
    assert traffic.sector_bytes <= 1.1 * least


def test_masked_cross_entropy_reads_logits_once_each_way_whatever_the_incoming_gradient():
    logits = torch.randn(ROWS, 4096).bfloat16().requires_grad_()
    with count() as forward:
        loss = masked_cross_entropy(logits, labels(), impl="triton").loss_sum
    with count() as backward:
        (0.5 * loss).backward()
    assert forward.kernel_bytes <= 1.1 * cross_entropy_least(logits, SUPERVISED, gradient=False)
    assert backward.kernel_bytes <= 1.1 * cross_entropy_least(logits, SUPERVISED, gradient=True)
    assert forward.torch_bytes + backward.torch_bytes < 0.1 * logits.nbytes


def test_ignored_rows_never_reach_the_linear_head():
    """128 of 1024 are supervised: as many as rows are padded to a multiple of."""
    hidden = torch.randn(1024, 16).bfloat16().requires_grad_()
    weight = torch.randn(1024, 16).bfloat16().requires_grad_()
    target = torch.full((1024,), -100)
    target[::8] = 7
    with count() as traffic:
        linear_cross_entropy(hidden, weight, target, impl="triton").loss_sum.backward()
    least = cross_entropy_least(weight.new_empty(128, 1024), 128, gradient=True)
    assert least <= traffic.kernel_bytes <= 1.1 * least
    # Logits, gradient of hidden, gradient of weight: three products of the same three matrices.
    assert traffic.gemms == {"mm": 3 * 2 * (128 * 16 + 1024 * 16 + 128 * 1024)}


# ------------------------------------------------------------- norms and SwiGLU


def there_and_back(op, *inputs: torch.Tensor) -> tuple[Traffic, Traffic]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    with count() as forward:
        out = op(*leaves)
    out = (out,) if isinstance(out, torch.Tensor) else out
    grads = [torch.ones_like(y) for y in out]
    with count() as backward:
        torch.autograd.grad(out, leaves, grads)
    return forward, backward


def assert_least(passes: tuple[Traffic, Traffic], least: list[int], slack: float) -> None:
    for traffic, bytes_ in zip(passes, least, strict=True):
        assert bytes_ <= traffic.kernel_bytes <= (1 + slack) * bytes_
        assert traffic.sector_bytes <= (1 + slack) * bytes_
        assert traffic.torch_bytes == 0, traffic.torch


@pytest.mark.parametrize("residual", [False, True])
def test_norms_move_the_least_but_for_256_partial_sums(residual):
    rows, channels = 16_384, 64
    x, weight = torch.randn(rows, channels).bfloat16(), torch.ones(channels).bfloat16()
    if residual:
        op = lambda x, r, w: add_rms_norm(x, r, w, 1e-5, impl="triton")  # noqa: E731
        passes = there_and_back(op, x, x.clone(), weight)
    else:
        passes = there_and_back(lambda x, w: rms_norm(x, w, 1e-5, impl="triton"), x, weight)
    least = [norm_least(x, residual, backward) for backward in (False, True)]
    partial = 2 * 4 * 256 * channels
    assert partial < 0.025 * least[1]
    # The weight is read by every program: once for 32 rows here, for 8 kB of them in general.
    assert_least(passes, least, 0.05)


def test_swiglu_moves_the_least():
    gate_up = torch.randn(9, 2 * 1536).bfloat16()
    gate, up = (half.contiguous() for half in gate_up.chunk(2, dim=-1))
    least = [silu_mul_least(gate, backward) for backward in (False, True)]
    for inputs in ((gate_up,), (gate, up)):
        assert_least(there_and_back(lambda *x: silu_mul(*x, impl="triton"), *inputs), least, 0)
