"""What a Triton kernel's launch table holds, in the words of the ahead-of-time compiler; and when
its launcher may be called as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


class Launcher:
    """A Triton kernel with constants of its own, launched with little Python in front of it.

    The kernel's arguments are tensors, then numbers that Triton specialises on none of, then the
    constants in their order and, if there is one, the hint about strides. Triton looks for its
    compiled kernel by the type and alignment of every argument, which costs the host more than all
    else that a launch needs. A launch like an earlier one, of tensors that all begin at multiples
    of 16 bytes, takes what that one compiled.
    """

    def __init__(self, kernel: Any, constants: dict[str, int]) -> None:
        self.kernel = kernel
        self.constants = constants
        self._options = {k: constants[k] for k in ("num_warps", "num_stages")}
        self._values = tuple(v for k, v in constants.items() if k not in self._options)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[int | float, ...],
        *hint: int,
    ) -> None:
        """Launch. Dtypes have to be those of every launch of this object."""
        first, address = tensors[0], 0
        assert first is not None
        for x in tensors:
            if x is not None:
                address |= x.data_ptr()
        args = (*tensors, *numbers, *self._values, *hint)
        aligned = address % 16 == 0
        key = (first.get_device(), *hint, *[x is None for x in tensors])
        compiled = self._compiled.get(key) if aligned else None
        with _on(first):
            if compiled is not None:
                compiled[(programs, 1, 1)](*args)
                return
            made = self.kernel[(programs,)](*args, **self._options)
        if aligned and made is not None:  # the interpreter makes none
            self._compiled[key] = made


_HERE = nullcontext()


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is x's unless somebody mixes several."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device_of(x)
