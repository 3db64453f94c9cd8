"""Launches without Triton's own search for its compiled kernel: what they hand over, and when."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("triton")

from varlen_sft.ops import elementwise_triton as ops  # noqa: E402
from varlen_sft.ops.launch import Launcher  # noqa: E402


class Kernel:
    """Stands in for a ``@triton.jit`` function, and for what it compiles."""

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((grid, args, options)) or Compiled(self)


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.calls.append((grid, args, "compiled"))


def test_a_launch_like_an_earlier_one_takes_what_that_one_compiled():
    calls: list = []
    launch = Launcher(Kernel(calls), {"C": 8, "num_warps": 4, "num_stages": 1})
    x, y = torch.zeros(64), torch.zeros(64)
    options = {"num_warps": 4, "num_stages": 1}
    launch(3, (x, None), (7,), 2)
    launch(5, (y, None), (9,), 2)
    assert calls[0] == ((3,), (x, None, 7, 8, 2), options)
    assert calls[1] == ((5, 1, 1), (y, None, 9, 8, 2), "compiled")
    for tensors, hint in (((x, None), 4), ((x, y), 2), ((x[1:], None), 2), ((x[1:], None), 2)):
        launch(1, tensors, (7,), hint)
        assert calls[-1][2] == options, (
            "another hint, another tensor, an address that is no multiple"
        )
    launch(1, (x[8:], None), (7,), 2)
    assert calls[-1][2] == "compiled"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_arguments_are_those_of_the_kernels_in_their_order(dtype, monkeypatch):
    """By name: whatever is bound to a parameter is what a call by keyword would give it."""
    calls: list = []
    for table in (ops._NORM, ops._SILU):
        for way, kernel in table.items():
            monkeypatch.setitem(table, way, Bound(kernel, calls))
    monkeypatch.setattr(ops, "rms_norm_dweight_kernel", Bound(ops.rms_norm_dweight_kernel, calls))
    for made in (ops._norm, ops._silu):
        made.cache_clear()
    wide = torch.zeros(33, 96, dtype=dtype)
    x, residual, weight = wide[:, :32], wide[:, 32:64], torch.zeros(32, dtype=dtype)
    try:
        out, total, rstd = ops.rms_norm(x, weight, 1e-5, residual)
        dx, dweight = ops.rms_norm_backward(out, x, weight, rstd, residual)
        product = ops.silu_mul(wide, None)
        dgate, dup = ops.silu_mul_backward(out, x, residual)
    finally:
        for made in (ops._norm, ops._silu):
            made.cache_clear()
    forward, backward, reduce, fused, apart = calls
    norm = {"C": 32, "BLOCK_C": 32, "BLOCK_T": 32, "VEC": 8}
    assert forward == norm | {
        "out": out, "total": total, "rstd": rstd, "x": x, "residual": residual, "weight": weight,
        "num_rows": 33, "x_stride": 96, "residual_stride": 96, "eps": 1e-5,
    }  # fmt: skip
    partial = reduce["partial"]
    assert backward == norm | {
        "dx": dx, "partial": partial, "dout": out, "x": x, "weight": weight, "rstd": rstd,
        "dtotal": residual, "num_rows": 33, "dout_stride": 32, "x_stride": 96,
        "dtotal_stride": 96,
    }  # fmt: skip
    assert partial.shape == (2, 32) and partial.dtype == torch.float32
    sizes = {"num_partials": 2, "C": 32, "BLOCK_P": 64, "BLOCK_C": 32}
    assert reduce == sizes | {"dweight": dweight, "partial": partial}
    assert fused == {
        "out": product, "gate": wide, "up": None, "gate_stride": 96, "up_stride": 96,
        "COLS": 48, "BLOCK": 64, "BLOCKS": 1, "VEC": 8,
    }  # fmt: skip
    assert apart == {
        "dgate": dgate, "dup": dup, "dout": out, "gate": x, "up": residual,
        "dout_stride": 32, "gate_stride": 96, "up_stride": 96,
        "COLS": 32, "BLOCK": 32, "BLOCKS": 1, "VEC": 8,
    }  # fmt: skip


class Bound:
    """A kernel that notes what each of its parameters would be, by identity of tensors."""

    def __init__(self, kernel, calls: list) -> None:
        self.signature, self.calls = inspect.signature(kernel.fn), calls

    def __getitem__(self, grid):
        def call(*args, num_warps, num_stages):
            self.calls.append(Same(self.signature.bind(*args).arguments))

        return call


class Same(dict):
    """Compares tensors by identity."""

    def __eq__(self, other):
        return self.keys() == other.keys() and all(
            a is b if isinstance(a, torch.Tensor) else a == b
            for a, b in ((self[key], other[key]) for key in self)
        )
