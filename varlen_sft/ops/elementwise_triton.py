"""RMSNorm and SwiGLU on the GPU, each one pass over memory: launches of the Triton kernels.

The letters are those of ``varlen_sft.ops``, and I columns of a SwiGLU. A thread moves 16 bytes at a
time where the layout allows it. Sums are fp32; values are rounded where HF's modules round them in
the forward, and once in the backward.

The gradient of a norm's weight is a sum over tokens. A program walks every P-th tile of rows with a
partial sum in registers, P following from sizes alone, and a second kernel adds the P partial sums
in their order: no atomics, and the same bits every time.

Outputs differ from eager torch's where a row's sum of squares, added in another order, or an
exponential, which is the hardware's, is an fp32 rounding off: of 16-bit results about one in 10^4.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from varlen_sft.ops.elementwise_triton_kernels import (
    rms_norm_backward_kernel,
    rms_norm_dweight_kernel,
    rms_norm_kernel,
    silu_mul_backward_kernel,
    silu_mul_kernel,
)
from varlen_sft.ops.launch import KernelVariant, Launcher

__all__ = ["fits", "fits_norm", "rms_norm", "rms_norm_backward", "silu_mul", "silu_mul_backward"]
__all__ += ["variants"]

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# Bytes of a norm's row, up to -> warps of a program. Rows are taken together up to 8 kB: two of the
# backward's programs on an SM then have 32 kB of reads under way, and 48 kB with a residual, while
# they work on as many, and the barriers of a sum over a row count once for several rows. A thread
# holds 16 values of 16 bits or 8 of 32: with the next ones, the weight and a partial sum up to 128
# registers. Longer rows would spill, and there are hardly any: C = 16384 is that of Llama 3 405B.
_WARPS = {8192: 8, 16384: 16}
_MOST_BYTES = max(_WARPS)
_TILE_BYTES = 8192
_MOST_ROWS = 32  # of a tile: norms of single heads
_PROGRAMS = 256  # of the backward: two per SM of today's GPUs, whose partial sums cost 2 % more
_LEAST_ROWS = 8  # of such a program, before there are as many: or partial sums cost more than rows

# A SwiGLU's programs take 2, or 3 in the backward, 128-bit loads per thread and block of columns.
_BLOCK_BYTES = 4096
_BLOCK_WARPS = 4


def fits(rows: Tensor) -> bool:
    """Whether the kernels take this dtype."""
    return rows.dtype in _NAMES


def fits_norm(rows: Tensor) -> bool:
    """Whether a norm's kernels take rows of this dtype and length."""
    return rows.dtype in _NAMES and 0 < rows.shape[1] * rows.element_size() <= _MOST_BYTES


@cache
def _norm_constants(channels: int, dtype: torch.dtype) -> dict[str, int]:
    """What a launch takes from sizes alone.

    Raises:
        TypeError: a dtype that the kernels do not take.
        ValueError: rows that do not fit into a program.
    """
    _require(dtype)
    if not 0 < channels * dtype.itemsize <= _MOST_BYTES:
        most = _MOST_BYTES // dtype.itemsize
        raise ValueError(f"impl='triton' takes rows of 1 to {most} values, got {channels}")
    width = triton.next_power_of_2(channels)
    size = width * dtype.itemsize
    return {
        "C": channels,
        "BLOCK_T": min(_MOST_ROWS, max(1, _TILE_BYTES // size)),
        "BLOCK_C": width,
        "num_warps": next(warps for most, warps in _WARPS.items() if size <= most),
        "num_stages": 1,
    }


@cache
def _silu_constants(columns: int, dtype: torch.dtype) -> dict[str, int]:
    _require(dtype)
    block = min(_BLOCK_BYTES // dtype.itemsize, triton.next_power_of_2(columns))
    while columns % block and block * dtype.itemsize > 1024:
        block //= 2  # 1536 as three times 512, which leaves no thread without work
    return {
        "COLS": columns,
        "BLOCK": block,
        "BLOCKS": triton.cdiv(columns, block),
        "num_warps": max(1, block * dtype.itemsize * _BLOCK_WARPS // _BLOCK_BYTES),
        "num_stages": 1,
    }


def _require(dtype: torch.dtype) -> None:
    if dtype not in _NAMES:
        name = str(dtype).removeprefix("torch.")
        raise TypeError(f"impl='triton' takes float32, bfloat16 or float16, got {name}")


def _programs(rows: int, block: int) -> int:
    """Programs of a norm's backward. Of no device's properties: its bits depend on sizes alone."""
    return min(_PROGRAMS, triton.cdiv(rows, max(_LEAST_ROWS, block)))


# 64 partial rows of 128 bytes: four 128-bit loads per thread, and programs enough for 2 MB of L2.
_DWEIGHT = {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}

_NORM = {"forward": rms_norm_kernel, "backward": rms_norm_backward_kernel}
_SILU = {"forward": silu_mul_kernel, "backward": silu_mul_backward_kernel}


@cache
def _norm(way: str, channels: int, dtype: torch.dtype) -> Launcher:
    if way == "dweight":
        return Launcher(rms_norm_dweight_kernel, {"C": channels, **_DWEIGHT})
    return Launcher(_NORM[way], _norm_constants(channels, dtype))


@cache
def _silu(way: str, columns: int, dtype: torch.dtype) -> Launcher:
    return Launcher(_SILU[way], _silu_constants(columns, dtype))


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous, of like's own shape if none is given."""
    if shape:
        return like.new_empty(shape, dtype=dtype)
    # Half the time of new_empty, but with like's strides where it leaves no gaps.
    return torch.empty_like(like) if like.is_contiguous() else like.new_empty(like.shape)


def rms_norm(
    x: Tensor,  # (T, C) fp32, bf16 or fp16, rows of any stride
    weight: Tensor,  # (C,) contiguous
    eps: float,
    residual: Tensor | None = None,  # (T, C)
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The norm of x, or of x + residual, that sum, and 1 / rms of each row in fp32: one launch."""
    rows, channels = x.shape
    launch = _norm("forward", channels, x.dtype)
    out, rstd = _empty(x), _empty(x, rows, dtype=torch.float32)
    total = None if residual is None else _empty(x)
    strides = x.stride(0), 0 if residual is None else residual.stride(0)
    if rows:
        tensors = out, total, rstd, x, residual, weight
        programs = -(-rows // launch.constants["BLOCK_T"])
        launch(programs, tensors, (rows, *strides, eps), math.gcd(8, *strides))
    return out, total, rstd


def rms_norm_backward(
    dout: Tensor,  # (T, C), last axis contiguous
    x: Tensor,  # (T, C), what was normed
    weight: Tensor,
    rstd: Tensor,
    dtotal: Tensor | None,  # (T, C): what else flows into x
    with_dweight: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """dx, to which dtotal is added where it is given, and dweight: two launches, or one."""
    rows, channels = x.shape
    launch = _norm("backward", channels, x.dtype)
    programs = _programs(rows, launch.constants["BLOCK_T"])
    dx, dweight, partial = _empty(x), None, None
    if with_dweight:
        partial = _empty(x, programs, channels, dtype=torch.float32)
    strides = dout.stride(0), x.stride(0), 0 if dtotal is None else dtotal.stride(0)
    if rows:
        tensors = dx, partial, dout, x, weight, rstd, dtotal
        launch(programs, tensors, (rows, *strides), math.gcd(8, *strides))
    if partial is not None:
        dweight = _empty(x, channels)
        reduce = _norm("dweight", channels, x.dtype)
        reduce(-(-channels // _DWEIGHT["BLOCK_C"]), (dweight, partial), (programs,))
    return dx, dweight


def silu_mul(gate: Tensor, up: Tensor | None) -> Tensor:
    """silu(gate) * up, (T, I); up None: gate is (T, 2 I) and up its second half. One launch."""
    rows, columns = gate.shape
    columns = columns // 2 if up is None else columns
    out = _empty(gate, rows, columns)
    strides = gate.stride(0), (gate if up is None else up).stride(0)
    if rows and columns:
        launch = _silu("forward", columns, gate.dtype)
        launch(rows * launch.constants["BLOCKS"], (out, gate, up), strides, math.gcd(8, *strides))
    return out


def silu_mul_backward(
    dout: Tensor,  # (T, I), last axis contiguous
    gate: Tensor,
    up: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate and up; up None: of both halves in one (T, 2 I). One launch."""
    rows, columns = dout.shape
    dgate = _empty(gate)
    dup = None if up is None else _empty(gate)
    strides = dout.stride(0), gate.stride(0), (gate if up is None else up).stride(0)
    if rows and columns:
        launch = _silu("backward", columns, gate.dtype)
        tensors = dgate, dup, dout, gate, up
        launch(rows * launch.constants["BLOCKS"], tensors, strides, math.gcd(8, *strides))
    return dgate, dup


# ------------------------------------------------------------------ compilations


def variants() -> list[KernelVariant]:
    """Norms and SwiGLUs of SmolLM2, Llama 3.2 1B and Llama 3 8B, there and back."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (576, 2048, 4096):
            found += [_norm_variant(way, channels, dtype, "residual") for way in _NORM]
        for columns in (1536, 8192, 14336):
            found += [_silu_variant(way, columns, dtype, "fused") for way in _SILU]
        found.append(_norm_variant("dweight", 2048, dtype))
    found += [_norm_variant(way, 2048, torch.bfloat16) for way in _NORM]
    found.append(_norm_variant("backward", 2048, torch.bfloat16, "frozen"))
    found += [_silu_variant(way, 8192, torch.bfloat16, "apart") for way in _SILU]
    return found


def _norm_variant(way: str, channels: int, dtype: torch.dtype, mode: str = "") -> KernelVariant:
    """``mode``: "residual", with a second input; "frozen", without a gradient of the weight."""
    name = f"rms_norm {way} {_NAMES[dtype]} C={channels} {mode}".strip()
    if way == "dweight":
        return _variant(name, rms_norm_dweight_kernel, dtype, {"C": channels, **_DWEIGHT}, [])
    absent = [] if mode == "residual" else ["residual", "total", "dtotal"]
    absent += ["partial"] if mode == "frozen" else []
    constants = _norm_constants(channels, dtype) | {"VEC": 8}
    return _variant(name, _NORM[way], dtype, constants, absent)


def _silu_variant(way: str, columns: int, dtype: torch.dtype, mode: str) -> KernelVariant:
    name = f"silu_mul {way} {_NAMES[dtype]} I={columns} {mode}"
    constants = _silu_constants(columns, dtype) | {"VEC": 8}
    return _variant(name, _SILU[way], dtype, constants, ["up", "dup"] if mode == "fused" else [])


def _variant(
    name: str, kernel: Any, dtype: torch.dtype, constants: dict[str, int], absent: list[str]
) -> KernelVariant:
    constexprs: dict[str, Any] = dict(constants)
    options = {key: constexprs.pop(key) for key in ("num_warps", "num_stages")}
    constexprs |= {key: None for key in absent if key in kernel.arg_names}
    types = {"rstd": "*fp32", "partial": "*fp32", "eps": "fp32", "num_partials": "i32"}
    types |= {key: "i64" for key in kernel.arg_names if key.endswith(("_stride", "num_rows"))}
    types |= dict.fromkeys(constexprs, "constexpr")
    signature = {key: types.get(key, f"*{_NAMES[dtype]}") for key in kernel.arg_names}
    return KernelVariant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=tuple(key for key, type_ in signature.items() if type_.startswith("*")),
        **options,
    )
