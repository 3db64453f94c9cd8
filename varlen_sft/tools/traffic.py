"""Bytes that a call moves, counted without a GPU: its Triton kernels' and torch's around them.

Kernels run in Triton's interpreter, where every load and store passes by. The counts are those of
the program: what it asks memory for, whatever a cache then answers. They are never times.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["KernelTraffic", "Traffic", "count", "cross_entropy_least", "norm_least", "rope_least"]
__all__ += ["silu_mul_least"]

SECTOR = 32
"""Bytes that a GPU's cache fetches at once."""

GEMMS = {"mm", "addmm", "bmm", "baddbmm", "addmm_"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
OVERWRITES = {"copy_", "fill_", "zero_", "index_copy_"}
GATHERS = {"index", "index_select", "gather", "embedding"}
SCATTERS = {"index_put_", "index_add_", "index_copy_", "scatter_", "scatter_add_"}


@dataclass
class KernelTraffic:
    """Of one Triton kernel, over all its launches."""

    launches: int = 0
    loaded: int = 0
    """Bytes: active lanes times the size of an element."""
    stored: int = 0
    sectors: int = 0
    """Of 32 bytes, touched by each load or store of a block; once within it, again in the next."""

    def __add__(self, other: KernelTraffic) -> KernelTraffic:
        mine, theirs = astuple(self), astuple(other)
        return KernelTraffic(*(a + b for a, b in zip(mine, theirs, strict=True)))


@dataclass
class Traffic:
    """What was counted."""

    kernels: dict[str, KernelTraffic] = field(default_factory=dict)
    torch: Counter[str] = field(default_factory=Counter)
    """Bytes read and written by each torch op around the kernels, matrix products left out."""
    gemms: Counter[str] = field(default_factory=Counter)
    """Bytes of the matrix products, each operand read once and each result written once."""

    def __add__(self, other: Traffic) -> Traffic:
        total = Traffic(dict(self.kernels), self.torch + other.torch, self.gemms + other.gemms)
        for name, kernel in other.kernels.items():
            total.kernels[name] = total.kernels.get(name, KernelTraffic()) + kernel
        return total

    @property
    def kernel_bytes(self) -> int:
        return sum(k.loaded + k.stored for k in self.kernels.values())

    @property
    def sector_bytes(self) -> int:
        return SECTOR * sum(k.sectors for k in self.kernels.values())

    @property
    def torch_bytes(self) -> int:
        return self.torch.total()

    @property
    def gemm_bytes(self) -> int:
        return self.gemms.total()

    @property
    def total(self) -> int:
        return self.kernel_bytes + self.torch_bytes + self.gemm_bytes


@contextmanager
def count() -> Iterator[Traffic]:
    """Count what runs inside, on CPU tensors: ``with count() as traffic: apply_rope(...)``.

    Raises:
        RuntimeError: Triton does not interpret; or, inside, an op that cannot be looked into.
    """
    from triton import knobs
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    if not knobs.runtime.interpret:
        raise RuntimeError("traffic is counted in Triton's interpreter: set TRITON_INTERPRET=1")
    traffic = Traffic()
    kernels = _Kernels(traffic)
    with ExitStack() as stack:
        hooks: dict[str, Callable] = {
            "create_masked_load": kernels.load,
            "create_masked_store": kernels.store,
            "create_atomic_rmw": kernels.refuse_atomic,
            "create_atomic_cas": kernels.refuse_atomic,
        }
        for name, hook in hooks.items():
            stack.enter_context(_hooked(InterpreterBuilder, name, hook))
        stack.enter_context(_hooked(GridExecutor, "__call__", kernels.launch))
        stack.enter_context(_Ops(traffic, kernels))
        yield traffic


def _hooked(owner: type, name: str, hook: Callable) -> Any:
    """Patch a method so that hook gets it, its object and its arguments."""
    original = getattr(owner, name)
    return patch.object(owner, name, lambda *args, **kwargs: hook(original, *args, **kwargs))


# --------------------------------------------------------------------- kernels


class _Kernels:
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.running: KernelTraffic | None = None

    def launch(self, original: Callable, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self.running = self.traffic.kernels.setdefault(executor.fn.__name__, KernelTraffic())
        self.running.launches += 1
        try:
            return original(executor, *args, **kwargs)
        finally:
            self.running = None

    def load(
        self, original: Callable, builder: Any, pointers: Any, mask: Any, *rest: Any, **kwargs: Any
    ) -> Any:
        assert self.running is not None
        self.running.loaded += self._requested(pointers, mask)
        return original(builder, pointers, mask, *rest, **kwargs)

    def store(
        self, original: Callable, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        assert self.running is not None
        self.running.stored += self._requested(pointers, mask)
        return original(builder, pointers, value, mask, *rest)

    def refuse_atomic(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("atomics are not counted, and no kernel here has any")

    def _requested(self, pointers: Any, mask: Any) -> int:
        assert self.running is not None
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        self.running.sectors += len(np.unique(addresses // SECTOR))
        return addresses.size * max(8, pointers.get_element_ty().primitive_bitwidth) // 8


# ----------------------------------------------------------------------- torch


class _Ops(TorchDispatchMode):
    def __init__(self, traffic: Traffic, kernels: _Kernels) -> None:
        super().__init__()
        self.traffic, self.kernels = traffic, kernels

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.kernels.running is not None:  # the interpreter's own: it copies pointers about
            return func(*args, **kwargs)
        if func.namespace not in ("aten", "prim", "prims"):
            with self:
                return _body(func)(*args, **kwargs)
        with self:  # matmul, linear, reshape: what they are made of
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        moved = _moved(name, func, args, kwargs, result)
        if moved:
            (self.traffic.gemms if name in GEMMS else self.traffic.torch)[name] += moved
        return result


def _body(func: Any) -> Callable:
    """The Python function of a ``torch.library.custom_op``, whose torch ops are to be seen."""
    from torch._library.custom_ops import OPDEFS

    if func._schema.name not in OPDEFS:
        raise RuntimeError(f"{func} moves bytes that cannot be counted")
    return OPDEFS[func._schema.name]._init_fn


def _moved(name: str, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that one aten op reads and writes; a view moves none."""
    read, written = [], []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        mutated = argument.alias_info is not None and argument.alias_info.is_write
        if mutated:
            written += _tensors(value)
        if not mutated or not (argument.kwarg_only or name in OVERWRITES):
            read += _tensors(value)
    if name in SCATTERS:  # only the rows that go in are touched
        values, adds = read[-1], name not in OVERWRITES
        return sum(map(_nbytes, read[adds:])) + (1 + adds) * _nbytes(values)
    if not func._schema.is_mutable:
        written = _tensors(result)
        held = {x.untyped_storage().data_ptr() for x in read if x.numel()}
        if name in ALLOCATIONS or any(x.untyped_storage().data_ptr() in held for x in written):
            return 0
    if name in FILLS:  # they take a tensor for its shape or dtype
        read = []
    if name in GATHERS:  # only the rows that come out are read
        read = [*read[1:], *written]
    return sum(map(_nbytes, read)) + sum(map(_nbytes, written))


def _tensors(value: Any) -> list[Tensor]:
    return [x for x in tree_leaves(value) if isinstance(x, Tensor)]


def _nbytes(x: Tensor) -> int:
    """Bytes of the distinct elements: an expanded axis is one element."""
    extents = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or not n)
    return math.prod(extents) * x.element_size()


# ----------------------------------------------------------------------- least


def rope_least(q: Tensor, k: Tensor, row: int, ids: int = 0) -> int:
    """Bytes that a rotation of q and k cannot do without: each read once and written once.

    Args:
        row: bytes of one token's cosines and sines, R/2 of each.
        ids: bytes of one position id, if the kernel takes any.
    """
    tokens = q.numel() // (q.shape[-1] * q.shape[-2])
    return 2 * (q.numel() + k.numel()) * q.element_size() + tokens * (row + ids)


def cross_entropy_least(logits: Tensor, supervised: int, gradient: bool) -> int:
    """Bytes that loss and gradient of rows of logits cannot do without.

    Logits of supervised rows are read once; with a gradient every row is written once, the others
    as zeros. Each row has a label (8 bytes) and a loss (4).
    """
    rows, vocabulary = logits.shape
    passes = supervised + (rows if gradient else 0)
    return passes * vocabulary * logits.element_size() + 12 * rows


def norm_least(x: Tensor, residual: bool, backward: bool) -> int:
    """Bytes that a norm of rows cannot do without, there or back; with ``residual`` the addition of
    another tensor, and back another gradient of the sum.

    Of each row 1 / rms is kept, in fp32; the weight is read, and its gradient written.
    """
    rows, channels = x.shape
    passes = (3 if backward else 2) + (1 if backward else 2) * residual
    return (passes * rows + 1 + backward) * channels * x.element_size() + 4 * rows


def silu_mul_least(product: Tensor, backward: bool) -> int:
    """Bytes that silu(gate) * up of a product's shape cannot do without, there or back."""
    return (5 if backward else 3) * product.nbytes
