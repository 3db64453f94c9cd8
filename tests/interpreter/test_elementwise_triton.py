"""The Triton norms and SwiGLU, interpreted: values, fences, order of programs, addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from tests.helpers import assert_within_reference_error
from varlen_sft import reference
from varlen_sft.ops import elementwise_triton as kernels
from varlen_sft.ops.elementwise import add_rms_norm, rms_norm, silu_mul

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CANARY, GUARD = 77.0, 64
EPS = 1e-5

ROWS = st.sampled_from([0, 1, 33])
COLUMNS = st.sampled_from([1, 16, 33, 576, 1024])
SEEDS = st.integers(0, 99)


class Fenced:
    """What launchers allocate: NaN until it is written, with a guard on both sides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[tuple[Tensor, Tensor]] = []
        monkeypatch.setattr(kernels, "_empty", self.empty)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        shape = shape or like.shape
        inner = torch.Size(shape).numel()
        buffer = torch.full((inner + 2 * GUARD,), CANARY, dtype=dtype or like.dtype)
        view = buffer[GUARD : GUARD + inner].fill_(torch.nan).view(shape)
        self.made.append((buffer, view))
        return view

    def check(self) -> None:
        """All of it was written, and nothing beside it."""
        assert self.made
        for buffer, view in self.made:
            assert not view.isnan().any()
            assert (buffer[:GUARD] == CANARY).all() and (buffer[-GUARD:] == CANARY).all()
        self.made.clear()


@pytest.fixture(scope="module", autouse=True)
def fences() -> Iterator[Fenced]:
    """In every test, for every launch."""
    with pytest.MonkeyPatch.context() as patch:
        yield Fenced(patch)


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values at an offset of a wider buffer where the seed is odd: rows of another stride."""
    generator = torch.Generator().manual_seed(seed)
    left = (0, 3, 0, 16)[seed % 4]
    wide = torch.randn(rows, columns + 2 * left, generator=generator).to(dtype)
    return wide[:, left : left + columns]


def run(op: Callable, tensors: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
    """Outputs, and gradients of the inputs for the incoming ones that are given."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = op(*leaves)
    out = (out,) if isinstance(out, Tensor) else out
    flowing = [(y, g.to(y.dtype)) for y, g in zip(out, grads, strict=True) if g is not None]
    ends, given = ([pair[i] for pair in flowing] for i in (0, 1))
    return [*(y.detach() for y in out), *torch.autograd.grad(ends, leaves, given)]


def compare(op: Callable, spec: Callable, tensors, grads, fences: Fenced) -> list[Tensor]:
    fences.made.clear()
    actual = run(op, tensors, grads)
    fences.check()
    low = run(spec, tensors, grads)
    high = run(spec, [x.double() for x in tensors], grads)
    for a, b, c in zip(actual, low, high, strict=True):
        assert a.dtype == tensors[0].dtype
        if tensors[0].shape[1] > 1:
            assert_within_reference_error(a, b, c)
        else:  # the error of one number is chance
            bound = 32 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), c, rtol=bound, atol=bound)
    return actual


def norm_inputs(rows: int, columns: int, dtype: torch.dtype, seed: int) -> tuple:
    """x, residual, weight, two gradients, and eps: rows of one value need a large one."""
    tensors = [drawn(rows, columns, dtype, seed + i) for i in range(4)]
    weight = drawn(1, columns, dtype, 2 * seed)[0].contiguous()
    return *tensors[:2], weight, tensors[2:], 0.1 if columns == 1 else 1e-5


@settings(max_examples=40, deadline=None)
@given(ROWS, COLUMNS, st.sampled_from(DTYPES), SEEDS)
def test_rms_norm(fences, rows, columns, dtype, seed):
    x, _, weight, grads, eps = norm_inputs(rows, columns, dtype, seed)
    compare(
        lambda x, w: rms_norm(x, w, eps, impl="triton"),
        lambda x, w: reference.rms_norm(x, w, eps),
        [x, weight], grads[:1], fences,
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(ROWS, COLUMNS, st.sampled_from(DTYPES), st.sampled_from(["both", "norm", "sum"]), SEEDS)
def test_add_rms_norm(fences, rows, columns, dtype, flows, seed):
    x, residual, weight, grads, eps = norm_inputs(rows, columns, dtype, seed)
    if flows == "sum":
        leaves = [x.requires_grad_() for x in (x, residual, weight)]
        fences.made.clear()
        total = add_rms_norm(*leaves, eps, impl="triton")[1]
        dx, dresidual, dweight = torch.autograd.grad(total, leaves, grads[1], allow_unused=True)
        fences.check()
        assert torch.equal(dx, grads[1]) and torch.equal(dresidual, grads[1]) and dweight is None
        return
    actual = compare(
        lambda x, r, w: add_rms_norm(x, r, w, eps, impl="triton"),
        lambda x, r, w: reference.add_rms_norm(x, r, w, eps),
        [x, residual, weight], [grads[0], grads[1] if flows == "both" else None], fences,
    )  # fmt: skip
    assert torch.equal(actual[1], x + residual)
    assert torch.equal(actual[2], actual[3])
    assert torch.equal(actual[0], rms_norm(actual[1], weight, eps, impl="triton"))


@settings(max_examples=40, deadline=None)
@given(ROWS, COLUMNS, st.sampled_from(DTYPES), SEEDS)
def test_silu_mul(fences, rows, columns, dtype, seed):
    fused, grad = drawn(rows, 2 * columns, dtype, seed), drawn(rows, columns, dtype, seed + 1)

    def ours(*halves):
        return silu_mul(*halves, impl="triton")

    whole = compare(ours, reference.silu_mul, [fused], [grad], fences)
    apart = compare(ours, reference.silu_mul, list(fused.chunk(2, dim=-1)), [grad], fences)
    assert torch.equal(whole[0], apart[0])
    assert torch.equal(whole[1], torch.cat(apart[1:], dim=-1))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_overflow_an_exponential(dtype, fences):
    gate = torch.tensor([[0.0, -0.0, 1e-6, 88.0, -88.0, 104.0, -104.0, 4e4, -4e4]]).to(dtype)
    up, grad = torch.full_like(gate, 0.5), torch.full_like(gate, 1.5)
    compare(lambda g, u: silu_mul(g, u, impl="triton"), reference.silu_mul, [gate, up], [grad],
            fences)  # fmt: skip
    infinite = torch.tensor([[torch.inf, torch.nan]], dtype=dtype)
    out = silu_mul(infinite, torch.ones_like(infinite), impl="triton")
    assert torch.equal(out.isnan(), infinite.isnan()) and out[0, 0] == torch.inf


def test_rounding_is_that_of_the_reference():
    """Outputs in 16 bits differ where the sum of squares, or an exponential, is one fp32 rounding
    off and falls on the other side of a 16-bit one: hardly anywhere."""
    x, residual, weight, _, eps = norm_inputs(33, 1024, torch.bfloat16, 8)
    ours = add_rms_norm(x, residual, weight, eps, impl="triton")
    theirs = reference.add_rms_norm(x, residual, weight, eps)
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] != theirs[0]).float().mean() < 1e-3
    product = silu_mul(x, residual, impl="triton")
    assert (product != reference.silu_mul(x, residual)).float().mean() < 1e-3


# ------------------------------------------------------------------- bit-stability


@pytest.mark.parametrize("columns", [16, 576])
def test_nothing_depends_on_the_order_of_programs(columns, monkeypatch):
    x, residual, weight, grads, eps = norm_inputs(700, columns, torch.float32, 4)

    def both():
        return run(
            lambda *t: add_rms_norm(*t, eps, impl="triton"), [x, residual, weight], grads
        ) + run(lambda *t: silu_mul(*t, impl="triton"), [x, residual], grads[:1])

    forward, launches = both(), []
    set_index = interpreter.InterpreterBuilder.set_grid_idx

    def backwards(builder, first, *rest):
        launches.append(builder.grid_dim[0])
        set_index(builder, builder.grid_dim[0] - 1 - first, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", backwards)
    for a, b in zip(forward, both(), strict=True):
        assert torch.equal(a, b)
    assert max(launches) > 20


def test_programs_follow_from_sizes_alone():
    sizes = (0, 1, 8, 9, 2048, 10**6)
    assert [kernels._programs(rows, 2) for rows in sizes] == [0, 1, 1, 2, 256, 256]


def test_a_row_s_result_is_bitwise_the_same_in_any_company():
    x, residual, weight, grads, eps = norm_inputs(33, 33, torch.bfloat16, 1)

    def rows(part: slice) -> list[Tensor]:
        tensors, flows = [x[part], residual[part], weight], [g[part] for g in grads]
        return run(lambda *t: add_rms_norm(*t, eps, impl="triton"), tensors, flows)[:4]

    together = rows(slice(None))
    for part in (slice(0, 1), slice(1, 20), slice(32, 33)):
        for a, b in zip(rows(part), together, strict=True):
            assert torch.equal(a, b[part])


# ----------------------------------------------------------------- layouts, limits


def test_gradients_may_be_expanded_and_strided(fences):
    x, residual, weight, _, eps = norm_inputs(33, 16, torch.bfloat16, 0)
    for grad in (torch.ones((), dtype=x.dtype).expand(33, 16), drawn(16, 33, x.dtype, 3).T):
        assert not grad.is_contiguous()
        compare(lambda *t: add_rms_norm(*t, eps, impl="triton"),
                lambda *t: reference.add_rms_norm(*t, eps), [x, residual, weight], [grad, grad],
                fences)  # fmt: skip
        compare(lambda *t: silu_mul(*t, impl="triton"), reference.silu_mul, [x, residual], [grad],
                fences)  # fmt: skip


def test_a_frozen_weight_costs_no_gradient(fences, monkeypatch):
    x, _, weight, grads, eps = norm_inputs(33, 576, torch.bfloat16, 2)
    dx = run(lambda x, w: rms_norm(x, w, eps, impl="triton"), [x, weight], grads[:1])[1]
    monkeypatch.setattr(kernels, "_DWEIGHT", None)  # it cannot be launched
    alone = run(lambda x: rms_norm(x, weight, eps, impl="triton"), [x], grads[:1])[1]
    assert torch.equal(dx, alone)


def test_addresses_past_two_to_the_31_elements():
    """Three rows 2^30 + 32 elements apart: reserved as address space, a few pages are touched."""
    step = 2**30 + 32
    wide = torch.empty(2 * step + 64, dtype=torch.bfloat16).as_strided((3, 32), (step, 1))
    x, residual, weight, grads, eps = norm_inputs(3, 32, torch.bfloat16, 0)
    wide.copy_(x)
    for op, more, flows in (
        (lambda *t: add_rms_norm(*t, eps, impl="triton"), [residual, weight], grads),
        (lambda *t: add_rms_norm(*t[1::-1], *t[2:], eps, impl="triton"), [residual, weight], grads),
        (lambda *t: silu_mul(*t, impl="triton"), [residual], grads[:1]),
        (lambda *t: silu_mul(*t[::-1], impl="triton"), [residual], grads[:1]),
    ):
        for a, b in zip(run(op, [wide, *more], flows), run(op, [x, *more], flows), strict=True):
            assert torch.equal(a, b)
    for grad in (0, 1):
        given = [wide if i == grad else g for i, g in enumerate(grads)]
        near = [x if i == grad else g for i, g in enumerate(grads)]
        made = (run(lambda *t: add_rms_norm(*t, eps, impl="triton"), [x, residual, weight], flow)
                for flow in (given, near))  # fmt: skip
        for a, b in zip(*made, strict=True):
            assert torch.equal(a, b)


def test_what_the_kernels_do_not_take():
    x, weight = torch.randn(3, 8), torch.ones(8)
    with pytest.raises(TypeError, match="'triton' takes float32, bfloat16 or float16, got float64"):
        rms_norm(x.double(), weight.double(), 1e-5, impl="triton")
    with pytest.raises(TypeError, match="got float64"):
        silu_mul(x.double(), impl="triton")
    long = torch.ones(1, 2**13 + 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="rows of 1 to 8192 values, got 8193"):
        rms_norm(long, long[0], 1e-5, impl="triton")
    with pytest.raises(ValueError, match="rows of 1 to 4096 values, got 0"):
        rms_norm(x[:, :0], weight[:0], 1e-5, impl="triton")
    with pytest.raises(ValueError, match="weight must be contiguous on its last axis"):
        rms_norm(x, torch.ones(16)[::2], 1e-5, impl="triton")
    with pytest.raises(ValueError, match="up must be contiguous on its last axis"):
        silu_mul(x, torch.ones(3, 16)[:, ::2], impl="triton")


def test_a_second_derivative_raises():
    x = torch.randn(3, 8, requires_grad=True)
    for out in (silu_mul(x, impl="triton"), rms_norm(x, torch.ones(8), 1e-5, impl="triton")):
        (dx,) = torch.autograd.grad(out, x, out, create_graph=True)  # it depends on x twice
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_checkpointing_computes_the_same_again():
    x, residual, weight, grads, eps = norm_inputs(33, 16, torch.bfloat16, 0)

    def block(x, residual, weight):
        normed, total = add_rms_norm(x, residual, weight, eps, impl="triton")
        return silu_mul(normed, total, impl="triton"), total

    def again(*tensors):
        return torch.utils.checkpoint.checkpoint(block, *tensors, use_reentrant=False)

    both = (run(op, [x, residual, weight], grads) for op in (block, again))
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)
