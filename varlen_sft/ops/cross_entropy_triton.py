"""Cross-entropy of rows of logits on the GPU: Triton kernels, their launch table and launchers.

A row of 128k logits does not fit on chip, and the softmax needs the whole row's sum before its
first gradient. What the row kernel leaves in place of the logits is therefore the gradient up to
one factor per row, which is known at the end (``factor``): exp(x - reference), with
the label's own entry put right afterwards. The reference is the largest logit of the first block
or of the label; where a later one is 2^60 times as likely, everything so far is shrunk by a power
of two, which rounds nothing. So logits are read once and written once at any V, with one exp each,
and the factor goes into the small matrices beside the head's products.

Two cases want the sum first and sweep twice, the second time backwards, from what L2 still holds
(3 sweeps of bytes requested instead of 2): label smoothing, and fp16, whose exponents are too few.

``masked_cross_entropy`` may not touch its logits: its forward reads them once and keeps four
numbers of each row; its backward reads them once more and writes the gradient once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from varlen_sft.ops.cross_entropy_rows import sweeps_twice
from varlen_sft.ops.cross_entropy_triton_kernels import ce_backward_kernel, ce_rows_kernel
from varlen_sft.ops.launch import KernelVariant


class Launch(NamedTuple):
    """A row of the launch table."""

    size: int
    """Bytes of a logit."""
    light: bool
    """Holds only without softcap and with 128-bit access."""
    vocab: float
    """Holds up to this many logits in a row."""
    block: int
    num_warps: int


# A thread has 16 bytes under way, in one 128-bit load, while it works on as many; programs of 4
# warps are so light that every SM holds as many as it has threads for. On an H100 that took 0.69 ms
# for 3277 rows of V = 128k, where two programs of 8 warps with twice as much per thread took 0.81.
# The tanh of a softcap, and the addresses of narrow accesses, take more registers.
_LAUNCHES = (
    Launch(2, True, 2048, 512, 1),  # a warp alone needs no barriers; bytes, characters, tests
    Launch(2, False, 2048, 256, 1),
    Launch(2, True, math.inf, 1024, 4),
    Launch(2, False, math.inf, 2048, 8),
    Launch(4, False, 2048, 256, 1),
    Launch(4, False, math.inf, 2048, 8),
)


def _launch(dtype: torch.dtype, vocab: int, align: int, softcap: float) -> Launch:
    light = softcap == 0 and align * dtype.itemsize == 16
    return next(
        row
        for row in _LAUNCHES
        if row.size == dtype.itemsize and vocab <= row.vocab and (light or not row.light)
    )


def _alignment(logits: Tensor) -> int:
    """Elements, a power of two of up to 16 bytes, that divide V and the distance of rows."""
    return math.gcd(logits.shape[1], logits.stride(0), 16 // logits.element_size())


class RowSums(NamedTuple):
    """What ``rows_forward`` leaves for each of n rows; 0 where a row is not supervised."""

    loss: Tensor  # fp32, unweighted
    lse: Tensor  # fp32
    correct: Tensor  # bool
    entropy: Tensor  # fp32
    counted: Tensor  # fp32, the weight of the row's target
    targets: Tensor | None  # int64
    state: Tensor | None  # (n, 4) fp32: reference, remainder, 1 / sum, share of the others
    factor: Tensor | None  # fp32, see ``score_rows_triton``


def _constants(options: list[float]) -> dict[str, bool]:
    softcap, logit_scale, label_smoothing, z_loss = options
    return {
        "SOFTCAP": softcap != 0,
        "SCALE": logit_scale != 1,
        "SMOOTHING": label_smoothing != 0,
        "Z_LOSS": z_loss != 0,
    }


def score_rows_triton(
    logits: Tensor,  # (n, V) fp32, bf16 or fp16, contiguous on its last axis
    labels: Tensor,  # (n,) int64
    weights: Tensor,  # (n,) fp32
    options: list[float],  # softcap, logit_scale, label_smoothing, z_loss
    *,
    cu_seqlens: Tensor | None = None,  # int32: labels and weights are unshifted then
    write_grad: bool = False,
    keep_state: bool = False,
) -> RowSums:
    """Loss and metrics of each row. Nothing waits, and no row depends on another.

    Args:
        write_grad: leave the gradient in place of the logits. With ``factor``, d loss_sum /
            d logits is ``factor[:, None] * logits``; where it is None, logits are all of it.
        keep_state: make ``targets`` and ``state``, which ``rows_backward`` needs.
    """
    n, vocab = logits.shape
    loss, lse, entropy, counted = (torch.empty_like(weights) for _ in range(4))
    correct = torch.empty_like(labels, dtype=torch.bool)
    targets = torch.empty_like(labels) if keep_state else None
    state = loss.new_empty((n, 4)) if keep_state else None
    twice = write_grad and sweeps_twice(logits.dtype, options)
    factor = torch.empty_like(loss) if write_grad and not twice else None
    sums = RowSums(loss, lse, correct, entropy, counted, targets, state, factor)
    if n == 0:
        return sums
    align = _alignment(logits)
    launch = _launch(logits.dtype, vocab, align, options[0])
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        ce_rows_kernel[(n,)](
            logits, labels, weights, cu_seqlens,
            loss, lse, entropy, correct, counted, targets, state, factor,
            logits.stride(0) // align, vocab // align, n,
            0 if cu_seqlens is None else cu_seqlens.shape[0], *options,
            **_constants(options), TWO_SWEEPS=twice, ALIGN=align, BLOCK=launch.block,
            num_warps=launch.num_warps,
        )  # fmt: skip
    return sums


def rows_backward(
    logits: Tensor,  # (n, V), as they were scored
    targets: Tensor,
    counted: Tensor,
    state: Tensor,
    lse: Tensor,
    dloss: Tensor,  # () fp32
    options: list[float],
) -> Tensor:
    """dloss * d loss_sum / d logits, (n, V) contiguous, from what ``score_rows_triton`` kept."""
    n, vocab = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if dlogits.numel() == 0:
        return dlogits
    align = _alignment(logits)
    launch = _launch(logits.dtype, vocab, align, options[0])
    with torch.cuda.device_of(logits):
        ce_backward_kernel[(n, triton.cdiv(vocab, launch.block))](
            logits, dlogits, targets, counted, state, lse, dloss,
            logits.stride(0) // align, vocab // align, *options,
            **_constants(options), ALIGN=align, BLOCK=launch.block, num_warps=launch.num_warps,
        )  # fmt: skip
    return dlogits


# ------------------------------------------------------- ahead-of-time gate

_TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def variants() -> list[KernelVariant]:
    """What users launch: heads of real models, plain and with options, forward and backward."""
    plain, everything = [0.0, 1.0, 0.0, 0.0], [30.0, 0.5, 0.1, 1e-4]
    found = []
    heads = {  # bytes; Llama 3; GPT-2, whose rows are not aligned
        torch.bfloat16: (256, 128256, 50257),
        torch.float32: (256, 128256),
        torch.float16: (128256,),
    }
    for dtype, vocabs in heads.items():
        for vocab in vocabs:
            for options in (plain, everything):
                found.append(_rows_variant(dtype, vocab, options, "linear"))
                found.append(_backward_variant(dtype, vocab, options))
            found.append(_rows_variant(dtype, vocab, plain, "masked"))
        found.append(_rows_variant(dtype, 128256, plain, "loss"))
    for options in ([30.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1e-4]):  # Gemma; PaLM's z-loss
        found.append(_rows_variant(torch.bfloat16, 128256, options, "linear"))
    return found


def _rows_variant(dtype: torch.dtype, vocab: int, options: list[float], use: str) -> KernelVariant:
    """One compilation of ``ce_rows_kernel``; use: "loss", "linear" or "masked" sequences."""
    twice = use == "linear" and sweeps_twice(dtype, options)
    absent = {"factor_ptr"} if use != "linear" or twice else set()
    if use != "masked":
        absent |= {"cu_seqlens_ptr", "targets_ptr", "state_ptr"}
    types = {"logits_ptr": "*" + _TRITON_NAMES[dtype], "correct_ptr": "*i1", "stride_units": "i64"}
    types |= dict.fromkeys(("labels_ptr", "targets_ptr"), "*i64") | {"cu_seqlens_ptr": "*i32"}
    types |= dict.fromkeys(("vocab_units", "n_rows", "n_edges"), "i32")
    return _variant(ce_rows_kernel, use, dtype, vocab, options, types, absent, TWO_SWEEPS=twice)


def _backward_variant(dtype: torch.dtype, vocab: int, options: list[float]) -> KernelVariant:
    name = "*" + _TRITON_NAMES[dtype]
    types = {"logits_ptr": name, "dlogits_ptr": name, "targets_ptr": "*i64"}
    types |= {"stride_units": "i64", "vocab_units": "i32"}
    return _variant(ce_backward_kernel, "backward", dtype, vocab, options, types, set())


def _variant(kernel, use, dtype, vocab, options, types, absent, **switches) -> KernelVariant:
    align = math.gcd(vocab, 16 // dtype.itemsize)
    launch = _launch(dtype, vocab, align, options[0])
    constexprs = _constants(options) | switches | {"ALIGN": align, "BLOCK": launch.block}
    constexprs |= dict.fromkeys(absent)
    types = types | dict.fromkeys(constexprs, "constexpr")
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "fp32")
        for name in kernel.arg_names
    }
    on = " ".join(key.lower() for key, value in _constants(options).items() if value)
    return KernelVariant(
        name=f"cross_entropy {use} {_TRITON_NAMES[dtype]} V={vocab} {on or 'plain'}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        aligned=tuple(name for name, type_ in signature.items() if type_.startswith("*")),
        num_warps=launch.num_warps,
        narrowest_access=align * dtype.itemsize * 8,
    )
