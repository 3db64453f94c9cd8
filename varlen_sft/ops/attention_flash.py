"""Attention kernels of other packages for CUDA, all with the meaning of ``varlen_attention``.

flash-attn 2, 3 and 4 and torch's own ``varlen_attn`` name the same things differently: here every
call is by keyword, causal is bottom-right, and a window counts the query's own key. Nothing waits
for the device, with one exception that ``flash_attention`` names.

Untested: flash-attn 3 and 4 never ran under these adapters; their signatures alone are checked.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_sft.ops.attention_split import (
    SCRATCH_ROWS_PER_SEQUENCE,
    cut,
    scratch_rows,
    split_plan,
)
from varlen_sft.types import Sequences

IMPLS = ("flash_attn_2", "torch_varlen", "flash_attn_3", "flash_attn_4")
MAX_HEAD_DIM = 256


def missing(impl: str) -> str:
    """Why a kernel cannot run here; "" when its package is there. Imports none of them."""
    if impl == "torch_varlen":
        if importlib.util.find_spec("torch.nn.attention.varlen") is None:
            return "this torch has no torch.nn.attention.varlen"
        built = torch.backends.cuda.is_flash_attention_available()
        return "" if built else "this torch was built without FlashAttention"
    package, file, compiled = {
        "flash_attn_2": ("flash-attn", "flash_attn_interface.py", "flash_attn_2_cuda"),
        "flash_attn_3": ("flash-attn-3", "", "flash_attn_interface"),
        "flash_attn_4": ("flash-attn-4", "cute/interface.py", "cutlass"),
    }[impl]
    # flash-attn 2 and 4 share the folder flash_attn: only their files tell which one is installed.
    spec = importlib.util.find_spec("flash_attn") if file else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = not file or any((Path(folder) / file).is_file() for folder in folders)
    there = found and importlib.util.find_spec(compiled) is not None
    return "" if there else f"{package} is not installed"


def refusal(impl: str, q: Tensor, softcap: float | None) -> Exception | None:
    """The error that a kernel answers these inputs with, or None if it takes them.

    Args:
        impl: an implementation of attention; those that are not in ``IMPLS`` refuse nothing.
        q: (T, H, D).
        softcap: as in ``varlen_attention``.
    """
    if impl not in IMPLS:
        return None
    if q.dtype not in (torch.float16, torch.bfloat16):
        got = str(q.dtype).removeprefix("torch.")
        return TypeError(f"q must be float16 or bfloat16 for impl={impl!r}, got {got}")
    head_dim = q.shape[-1]
    if head_dim > MAX_HEAD_DIM:
        return ValueError(f"head_dim must be at most 256 for impl={impl!r}, got {head_dim}")
    if head_dim % 8 and impl != "flash_attn_2":  # which pads it by itself
        return ValueError(f"head_dim must be a multiple of 8 for impl={impl!r}, got {head_dim}")
    if softcap and impl == "torch_varlen":
        return ValueError(f"softcap must be None for impl={impl!r}, got {softcap}")
    return None


def flash_attention(
    impl: str,
    q: Tensor,  # (T, H, D) fp16 or bf16
    k: Tensor,  # (T_k, K, D)
    v: Tensor,  # (T_k, K, D)
    sequences: Sequences,
    *,
    k_sequences: Sequences | None = None,
    softmax_scale: float,
    window_size: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``varlen_attention`` by one of ``IMPLS``; arguments as there.

    The backward of flash-attn 2 (and so torch's) keeps fp32 scratch of (T + 128 B) x H x D rounded
    up. Where a gradient is wanted and that bound, B taken as the capacity of ``cu_seqlens``, is not
    below 2^31 elements, the call is split at sequence edges, which changes no value. Edges are on
    the device, so this alone waits for it, once per call: it takes half a million rows at H = 32
    and D = 128, where a wait costs nothing beside the attention itself.

    Returns:
        (T, H, D). A query that sees no key gives 0.

    Raises:
        TypeError: a dtype other than fp16 and bf16; cu_seqlens that are not int32; a max_seqlen
            that is not a Python int.
        ValueError: a head_dim or softcap that this kernel does not know; cu_seqlens that are not
            contiguous, not on q's device or not as many for k as for q; one sequence alone whose
            backward overflows. Where the edges are read: sequences that do not cover T.
    """
    error = refusal(impl, q, softcap)
    if error is not None:
        raise error
    k_sequences = sequences if k_sequences is None else k_sequences
    _check_sequences(q, sequences=sequences, k_sequences=k_sequences)
    if q.shape[0] == 0 or k.shape[0] == 0:
        return torch.zeros_like(q)  # the kernels cannot launch an empty grid
    if window_size is not None and window_size >= k_sequences.max_seqlen:
        window_size = None  # reaches every key: the plain causal kernel is the faster one
    call = _Call(
        q, k, v, sequences.cu_seqlens, k_sequences.cu_seqlens,
        # An upper bound will do. With 1 flash-attn 2 takes the number of sequences, empty ones
        # counted, for the number of tokens.
        max(sequences.max_seqlen, 2), k_sequences.max_seqlen,
        softmax_scale, window_size, softcap or 0.0,
    )  # fmt: skip
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not wants_gradient or impl not in ("flash_attn_2", "torch_varlen"):
        return _ADAPTERS[impl](call)
    rows = scratch_rows(q.shape[1], q.shape[2])
    capacity = sequences.cu_seqlens.shape[0] - 1
    if q.shape[0] + SCRATCH_ROWS_PER_SEQUENCE * capacity <= rows:
        return _ADAPTERS[impl](call)
    return torch.cat([_ADAPTERS[impl](part) for part in _split(call, rows)])


class _Call(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    window_size: int | None
    softcap: float


def _check_sequences(q: Tensor, **named: Sequences) -> None:
    for name, (cu_seqlens, max_seqlen, _) in named.items():
        if not isinstance(max_seqlen, (int, torch.SymInt)):
            kind = type(max_seqlen).__name__
            raise TypeError(f"max_seqlen of {name} must be a Python int, got a {kind}")
        if cu_seqlens.dtype != torch.int32:
            got = str(cu_seqlens.dtype).removeprefix("torch.")
            raise TypeError(f"cu_seqlens of {name} must be int32, got {got}")
        if cu_seqlens.device != q.device or not cu_seqlens.is_contiguous():
            raise ValueError(
                f"cu_seqlens of {name} must be contiguous on {q.device}, "
                f"got strides {cu_seqlens.stride()} on {cu_seqlens.device}"
            )
    count, k_count = (len(sequences.cu_seqlens) - 1 for sequences in named.values())
    if count != k_count:
        raise ValueError(f"k_sequences must hold as many sequences as q's, {count}, got {k_count}")


def _split(call: _Call, rows: int) -> list[_Call]:
    edges, k_edges = torch.stack((call.cu_seqlens_q, call.cu_seqlens_k)).tolist()  # the wait
    total, end = call.q.shape[0], edges[-1]
    if end != total:
        raise ValueError(f"sequences must cover all {total} tokens, got cu_seqlens ending at {end}")
    plan = split_plan(edges, k_edges, rows)
    q = cut(call.q, [(part.start, part.end) for part in plan])
    k, v = (cut(x, [(part.k_start, part.k_end) for part in plan]) for x in (call.k, call.v))
    return [
        call._replace(
            q=q[i], k=k[i], v=v[i],
            cu_seqlens_q=call.cu_seqlens_q[part.first : part.last + 1] - part.start,
            cu_seqlens_k=call.cu_seqlens_k[part.first : part.last + 1] - part.k_start,
        )
        for i, part in enumerate(plan)
    ]  # fmt: skip


# -------------------------------------------------------------- the packages


def _flash_attn_2(call: _Call) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, call, unlimited=-1)


def _flash_attn_3(call: _Call) -> Tensor:  # untested
    from flash_attn_interface import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, call, unlimited=-1)


def _flash_attn_4(call: _Call) -> Tensor:  # untested
    from flash_attn.cute import flash_attn_varlen_func

    return _flash_attn(flash_attn_varlen_func, call, unlimited=None)


def _flash_attn(function: Callable, call: _Call, unlimited: int | None) -> Tensor:
    window = (unlimited, unlimited) if call.window_size is None else (call.window_size - 1, 0)
    arguments = {**call._asdict(), "window_size": window}
    out = function(**arguments, causal=True)
    return out[0] if isinstance(out, tuple) else out  # 4, and early builds of 3: (out, lse)


def _torch_varlen(call: _Call) -> Tensor:
    from torch.nn.attention import varlen

    function: Callable = varlen.varlen_attn
    # torch 2.11 has no word for groups of heads, and hands them to a kernel that takes them.
    groups = call.q.shape[1] != call.k.shape[1]
    asks = groups and "enable_gqa" in inspect.signature(function).parameters
    left = -1 if call.window_size is None else call.window_size - 1
    return function(
        query=call.q, key=call.k, value=call.v,
        cu_seq_q=call.cu_seqlens_q, cu_seq_k=call.cu_seqlens_k,
        max_q=call.max_seqlen_q, max_k=call.max_seqlen_k,
        scale=call.softmax_scale, window_size=(left, 0), **({"enable_gqa": True} if asks else {}),
    )  # fmt: skip


_ADAPTERS: dict[str, Callable[[_Call], Tensor]] = {
    "flash_attn_2": _flash_attn_2,
    "torch_varlen": _torch_varlen,
    "flash_attn_3": _flash_attn_3,
    "flash_attn_4": _flash_attn_4,
}
