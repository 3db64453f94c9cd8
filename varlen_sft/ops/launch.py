"""What a Triton kernel's launch table holds, in the words of the ahead-of-time compiler; and when
its launcher may be called as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KernelVariant:
    """One compilation of a Triton kernel, exactly as a launch makes it."""

    name: str
    """Kernel, dtype and layout, unique: "rope bf16 D=128 R=128 hf"."""
    kernel: Any
    """The ``@triton.jit`` function."""
    signature: dict[str, str]
    """Every argument in order: "*bf16", "*i64", "i64", "i32", "fp32", "constexpr"."""
    constexprs: dict[str, Any]
    """Values of the arguments whose type is "constexpr"."""
    aligned: tuple[str, ...]
    """Arguments that Triton would specialise as multiples of 16: pointers and strides."""
    num_warps: int
    num_stages: int = 1
    enable_fp_fusion: bool = True
    narrowest_access: int = 128
    """Bits of the narrowest global access in the hot path that this layout allows."""


def is_plain(x: Tensor) -> bool:
    """Whether nobody but autograd watches: no compiler, mode or transform, and no kind of tensor.

    A ``torch.autograd.Function`` around a launcher is then enough. A registered op, which all of
    these need, costs the host several times as much per call, and short steps wait for the host.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or type(x) not in (Tensor, torch.nn.Parameter)
    )
