"""RoPE on the GPU: one Triton kernel turns q and k together, where they lie, forward and backward.

The letters are those of ``varlen_sft.ops``: T tokens, H query heads, K kv heads, D head_dim,
R rotary dims, P positions. A thread moves 16 bytes at a time where the layout allows it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from varlen_sft.ops.checks import require_dtype
from varlen_sft.ops.launch import KernelVariant

__all__ = ["rope", "rope_kernel", "variants"]

# ------------------------------------------------------------------------ kernel


@triton.jit
def _turn(x1, x2, cos, sin, HF: tl.constexpr, INVERSE: tl.constexpr):
    dtype: tl.constexpr = x1.dtype
    x1, x2 = x1.to(tl.float32), x2.to(tl.float32)
    if HF:
        # One product of two bf16 or fp16 values is exact in fp32, so that the compiler may, and
        # does, write "to fp32, multiply, round" as one packed 16-bit product.
        y1 = (x1 * cos).to(dtype).to(tl.float32) - (x2 * sin).to(dtype).to(tl.float32)
        y2 = (x2 * cos).to(dtype).to(tl.float32) + (x1 * sin).to(dtype).to(tl.float32)
        if INVERSE:  # autograd adds the zero padding of two slices, which turns -0 into +0
            y1 = y1.to(dtype).to(tl.float32) + 0.0
            y2 = y2.to(dtype).to(tl.float32) + 0.0
    else:
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return y1.to(dtype), y2.to(dtype)


@triton.jit
def _rows(base, token, head, token_stride, head_stride, VEC: tl.constexpr):
    return base + tl.multiple_of(token * token_stride + head * head_stride, [VEC, VEC, VEC])


STRIDES = [
    *("q_out_token_stride", "q_out_head_stride", "k_out_token_stride", "k_out_head_stride"),
    *("q_token_stride", "q_head_stride", "k_token_stride", "k_head_stride"),
]
SIZES = ["num_tokens", "num_positions", "position_stride"]


# Strides come with one hint, VEC, in place of Triton's own specialisation (16, 1 or neither, for
# each): a new length of HF's transposed layout, or a single token, compiles nothing anew.
@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def rope_kernel(
    q_out, k_out, q, k,  # (T, H, D) and (T, K, D); q_out and k_out may be q and k
    cos, sin,  # (P, HALF) fp32
    position_ids,  # (T,)
    in_range,  # () bool: becomes False when a position id is outside [0, P); None: nobody asks
    num_tokens: tl.int64, num_positions: tl.int64, position_stride: tl.int64,
    q_out_token_stride: tl.int64, q_out_head_stride: tl.int64,
    k_out_token_stride: tl.int64, k_out_head_stride: tl.int64,
    q_token_stride: tl.int64, q_head_stride: tl.int64,
    k_token_stride: tl.int64, k_head_stride: tl.int64,
    H: tl.constexpr, K: tl.constexpr,
    HALF: tl.constexpr,  # R/2
    REST: tl.constexpr,  # dimensions past R that are copied: D - R, or 0 in place
    WIDTH: tl.constexpr, REST_WIDTH: tl.constexpr,  # HALF and REST as powers of two
    INTERLEAVED: tl.constexpr, HF: tl.constexpr, INVERSE: tl.constexpr,
    VEC: tl.constexpr,  # divides every stride
    BLOCK_T: tl.constexpr,  # tokens of a program
    BLOCK_H: tl.constexpr,  # heads at a time, q's and then k's
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    live = token < num_tokens
    position = tl.load(position_ids + token * position_stride, mask=live, other=0).to(tl.int64)
    valid = (position >= 0) & (position < num_positions)
    col = tl.arange(0, WIDTH)[None, None, :]
    row = position * HALF + col
    known = live & valid & (col < HALF)
    c = tl.load(cos + row, mask=known, other=float("nan"))
    s = tl.load(sin + row, mask=known, other=float("nan"))
    if INVERSE:
        s = -s
    if HF:
        c = c.to(q.dtype.element_ty).to(tl.float32)
        s = s.to(q.dtype.element_ty).to(tl.float32)

    for first in range(0, H + K, BLOCK_H):
        head = first + tl.arange(0, BLOCK_H)[None, :, None].to(tl.int64)
        in_q = head < H
        here = live & (head < H + K)
        x = tl.where(
            in_q,
            _rows(q, token, head, q_token_stride, q_head_stride, VEC),
            _rows(k, token, head - H, k_token_stride, k_head_stride, VEC),
        )
        y = tl.where(
            in_q,
            _rows(q_out, token, head, q_out_token_stride, q_out_head_stride, VEC),
            _rows(k_out, token, head - H, k_out_token_stride, k_out_head_stride, VEC),
        )
        if REST > 0:  # before the stores, which no load overtakes: q_out might be q
            past = 2 * HALF + tl.arange(0, REST_WIDTH)[None, None, :]
            copied = here & (past < 2 * HALF + REST)
            rest = tl.load(x + past, mask=copied & valid, other=float("nan"))
        if INTERLEAVED:
            pair = tl.arange(0, 2 * WIDTH)[None, None, :]
            both = tl.load(x + pair, mask=here & (pair < 2 * HALF))
            x1, x2 = tl.split(tl.reshape(both, [BLOCK_T, BLOCK_H, WIDTH, 2]))
            y1, y2 = _turn(x1, x2, c, s, HF, INVERSE)
            both = tl.reshape(tl.join(y1, y2), [BLOCK_T, BLOCK_H, 2 * WIDTH])
            tl.store(y + pair, both, mask=here & (pair < 2 * HALF))
        else:
            half = here & (col < HALF)
            x1, x2 = tl.load(x + col, mask=half), tl.load(x + HALF + col, mask=half)
            y1, y2 = _turn(x1, x2, c, s, HF, INVERSE)
            tl.store(y + col, y1, mask=half)
            tl.store(y + HALF + col, y2, mask=half)
        if REST > 0:
            tl.store(y + past, rest, mask=copied)

    if in_range is not None:
        bad = live & (valid == 0)
        tl.store(in_range + tl.zeros_like(position), tl.zeros_like(bad), mask=bad)


# ------------------------------------------------------------------------ launch

# Bytes of half a rotated head (R/2 as a power of two) -> (warps of a program, heads at a time).
# Both follow from three wishes: 16 bytes of each half per thread and no idle thread; one token per
# program, so that short packs fill the GPU too; and more threads than the table row has columns,
# for then every thread reads the columns it needs straight from L1, without a trip through shared
# memory and its barriers.
LAUNCH = {
    16: (1, 32),  # R = 16 in bf16: one thread holds half a head, a warp all heads of most models
    32: (1, 16),  # R = 32 in bf16, 16 in fp32: partial rotary (Phi, GPT-NeoX)
    64: (2, 16),  # R = 64 in bf16, 32 in fp32: SmolLM2, Llama 3.2 1B; 9 + 3 heads fit at once
    128: (4, 16),  # R = 128 in bf16, 64 in fp32: most Llamas; 32 + 8 heads go in 3 steps of 5/6 use
    256: (8, 16),  # R = 256 in bf16, 128 in fp32: Gemma. 4 warps would bring shared memory back
    512: (8, 8),  # R = 256 in fp32: 16 heads would hold twice the registers
}


def _constants(heads: tuple[int, int], half: int, rest: int, itemsize: int) -> dict[str, int]:
    """What a launch takes from sizes alone."""
    width = triton.next_power_of_2(half)
    num_warps, block = LAUNCH[min(512, max(16, width * itemsize))]
    block_h = min(block, triton.next_power_of_2(sum(heads)))
    return {
        "H": heads[0],
        "K": heads[1],
        "HALF": half,
        "REST": rest,
        "WIDTH": width,
        "REST_WIDTH": triton.next_power_of_2(rest),
        "BLOCK_T": block // block_h,  # few heads: several tokens keep every thread busy
        "BLOCK_H": block_h,
        "num_warps": num_warps,
    }


def rope(
    q_out: Tensor, k_out: Tensor, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor,
    position_ids: Tensor, interleaved: bool, hf: bool, inverse: bool,
) -> None:  # fmt: skip
    """Rotate q and k into q_out and k_out, in one launch.

    Args:
        q_out, k_out: (T, H, D) and (T, K, D) of q's dtype, last axis contiguous; q and k
            themselves (then dimensions past R are not touched), or apart from them.
        q, k: fp32, bf16 or fp16, any strides with a contiguous last axis.
        cos, sin: (P, R/2) fp32, contiguous.
        position_ids: (T,) int32 or int64. One outside [0, P) makes NaN of what is written of that
            token and, unless inverse, fails ``torch._assert_async``; the host waits for nothing.
        interleaved, hf, inverse: as in ``apply_rope``; inverse turns back.

    Raises:
        TypeError: another dtype: the kernel computes in fp32.
        ValueError: a table that is not contiguous.
    """
    require_dtype("q", q, (torch.float32, torch.bfloat16, torch.float16))
    for name, table in (("cos", cos), ("sin", sin)):
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {table.stride()}")
    tokens, half = q.shape[0], cos.shape[1]
    if half == 0:
        q_out.copy_(q)
        k_out.copy_(k)
        return
    rest = 0 if q_out is q else q.shape[2] - 2 * half
    constants = _constants((q.shape[1], k.shape[1]), half, rest, q.element_size())
    strides = [stride for x in (q_out, k_out, q, k) for stride in x.stride()[:2]]
    # What is turned back was turned before, by the same ids: that is no time to ask again.
    in_range = None if inverse else torch.ones((), dtype=torch.bool, device=q.device)
    if tokens:
        with torch.cuda.device_of(q):  # Triton launches on the current device
            rope_kernel[(triton.cdiv(tokens, constants["BLOCK_T"]),)](
                q_out, k_out, q, k, cos, sin, position_ids, in_range,
                tokens, cos.shape[0], position_ids.stride(0), *strides,
                **constants, INTERLEAVED=interleaved, HF=hf, INVERSE=inverse,
                VEC=math.gcd(16, *strides), num_stages=1, enable_fp_fusion=not hf,
            )  # fmt: skip
    if in_range is not None:
        torch._assert_async(in_range, "position_ids must be in [0, P)")


# ------------------------------------------------------------------ compilations


def variants() -> list[KernelVariant]:
    """Every row of the launch table with shapes of models that use it, both ways and numerics."""
    shapes: list[tuple[tuple[int, int, int, int], tuple[str, ...], tuple[str, ...]]] = [
        ((32, 8, 128, 128), ("bf16", "fp16", "fp32"), ()),  # H, K, D, R of Llama 3, Mistral, Qwen 3
        ((32, 8, 128, 128), ("bf16", "fp32"), ("interleaved",)),  # Cohere
        ((9, 3, 64, 64), ("bf16", "fp32"), ()),  # SmolLM2
        ((16, 8, 256, 256), ("bf16", "fp32"), ()),  # Gemma 2
        ((32, 32, 96, 96), ("bf16",), ()),  # Phi 3 mini
        ((32, 8, 80, 80), ("bf16", "fp32"), ()),  # H2O Danube
        ((32, 8, 112, 112), ("bf16",), ()),
        ((32, 32, 80, 32), ("bf16",), ()),  # Phi 2
        ((32, 32, 80, 32), ("bf16",), ("in place",)),
        ((32, 32, 64, 16), ("bf16", "fp32"), ()),  # StableLM 2
        ((64, 64, 96, 24), ("bf16",), ()),  # GPT-NeoX 20B
        ((32, 2, 128, 64), ("bf16",), ("interleaved",)),  # GLM 4
        ((32, 8, 128, 128), ("bf16",), ("int32 ids",)),
    ]
    for more in (("backward",), ("hf",), ("hf", "backward")):
        shapes += [(shape, dtypes, (*modes, *more)) for shape, dtypes, modes in shapes[:2]]
    return [_variant(shape, dtype, *modes) for shape, dtypes, modes in shapes for dtype in dtypes]


def _variant(shape: tuple[int, int, int, int], dtype: str, *modes: str) -> KernelVariant:
    """``modes``: of "interleaved", "hf", "backward", "in place" and "int32 ids"."""
    heads, kv_heads, dim, rotary = shape
    itemsize = 4 if dtype == "fp32" else 2
    rest = 0 if "in place" in modes else dim - rotary
    interleaved = "interleaved" in modes
    constants = _constants((heads, kv_heads), rotary // 2, rest, itemsize)
    num_warps = constants.pop("num_warps")
    constexprs: dict[str, Any] = constants | {
        "INTERLEAVED": interleaved,
        "HF": "hf" in modes,
        "INVERSE": "backward" in modes,
        "VEC": math.gcd(16, dim),
    }
    types = dict.fromkeys(("q_out", "k_out", "q", "k"), f"*{dtype}")
    types |= dict.fromkeys(("cos", "sin"), "*fp32")
    types["position_ids"] = "*i32" if "int32 ids" in modes else "*i64"
    types["in_range"] = "*u1"
    aligned = tuple(types)
    if "backward" in modes:
        constexprs["in_range"] = None
        aligned = aligned[:-1]
    types |= dict.fromkeys((*SIZES, *STRIDES), "i64")
    return KernelVariant(
        name=" ".join(("rope", dtype, f"H={heads} K={kv_heads} D={dim} R={rotary}", *modes)),
        kernel=rope_kernel,
        signature=types | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        aligned=aligned,
        num_warps=num_warps,
        enable_fp_fusion="hf" not in modes,
        narrowest_access=8 * math.gcd(16, itemsize * (rotary if interleaved else rotary // 2)),
    )
