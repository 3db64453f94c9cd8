"""Norms and SwiGLU of a Hugging Face model's blocks, in packs: one pass over memory each.

HF computes them by chains of eager operations, each of which reads and writes all rows and keeps
some for the backward. What a module computes is found out by trying, not by its name; one that
computes something else stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, wraps
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_sft import reference
from varlen_sft.integrations.hf_call import shared_call
from varlen_sft.integrations.instance import forward_of
from varlen_sft.ops.elementwise import FUSED_ON, rms_norm, silu_mul

__all__ = ["block_forwards", "in_pack"]

_CHECKPOINT = "_gradient_checkpointing_func"  # HF's, on a block while it checkpoints
Forwards = list[tuple[nn.Module, MethodType]]


def block_forwards(layers: Iterable[Any], forwards: Forwards) -> Forwards:
    """Forwards of the norms, the MLPs, and the blocks around them; changes nothing.

    Args:
        layers: the blocks.
        forwards: what will be put in place besides.

    Returns:
        None at all where neither the C++ extension nor Triton is there.
    """
    if not FUSED_ON:
        return []
    others = dict(forwards)
    made: Forwards = []
    for layer in layers:
        parts = _parts(layer)
        made += parts
        if parts:
            inner = forward_of(layer, others.get(layer))
            made.append((layer, MethodType(_block_forward(inner), layer)))
    return made


def _parts(layer: nn.Module) -> Forwards:
    found: Forwards = []
    for module in layer.modules():
        if "forward" in vars(module):
            continue  # somebody else's
        for holds, forward in ((_is_llama_norm, _norm_forward), (_is_swiglu, _swiglu_forward)):
            if holds(module):
                found.append((module, MethodType(forward(forward_of(module)), module)))
    return found


# --------------------------------------------------------------------- forwards


@contextmanager
def in_pack(layer: nn.Module, call: Mapping[str, Any]) -> Iterator[None]:
    """While a block computes a pack its norms and MLP are ours."""
    shared = shared_call(layer)
    if shared is None or call.get("packed") is None:
        yield
        return
    before, shared.in_block = shared.in_block, True
    try:
        yield
    finally:
        shared.in_block = before


def _block_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)  # and what pruning says of its forward
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("packed") is None:
            return original(self, *args, **kwargs)
        with in_pack(self, kwargs), _again_in_pack(self, kwargs):
            return original(self, *args, **kwargs)

    return forward


@contextmanager
def _again_in_pack(layer: Any, call: Mapping[str, Any]) -> Iterator[None]:
    """HF's checkpointing begins inside a block's forward: what it computes a second time, long
    after this call, has to be computed the same way."""
    checkpoint = vars(layer).get(_CHECKPOINT)
    if checkpoint is None:
        yield
        return

    def ours(function: Callable[..., Any], *args: Any) -> Any:
        def packed(*inputs: Any) -> Any:
            with in_pack(layer, call):
                return function(*inputs)

        return checkpoint(packed, *args)

    setattr(layer, _CHECKPOINT, ours)
    try:
        yield
    finally:
        setattr(layer, _CHECKPOINT, checkpoint)


def _is_ours(module: nn.Module, x: Tensor) -> bool:
    shared = shared_call(module)
    return shared is not None and shared.in_block and x.device.type in FUSED_ON


def _norm_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _is_ours(self, hidden_states) or hidden_states.dtype != self.weight.dtype:
            return original(self, hidden_states)
        rows = hidden_states.flatten(0, -2)
        return rms_norm(rows, self.weight, self.variance_epsilon).view_as(hidden_states)

    return forward


def _swiglu_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not _is_ours(self, x):
            return original(self, x)
        gate, up = self.gate_proj(x), self.up_proj(x)
        if gate.dtype != up.dtype:  # of adapters
            return self.down_proj(self.act_fn(gate) * up)
        product = silu_mul(gate.flatten(0, -2), up.flatten(0, -2))
        return self.down_proj(product.view_as(gate))

    return forward


# -------------------------------------------------------- what a module computes


def _is_llama_norm(module: nn.Module) -> bool:
    kind: Any = type(module)
    return hasattr(module, "variance_epsilon") and _has_llama_formula(kind)


@lru_cache(maxsize=64)
def _has_llama_formula(kind: Any) -> bool:
    """Whether norms of this class are ``reference.rms_norm``, rounding included."""
    try:
        with torch.device("cpu"), torch.no_grad():
            norm = kind(32, eps=1e-3).bfloat16()
            norm.weight.copy_(torch.linspace(-2, 3, 32))
            x = torch.linspace(-5, 4, 96).view(3, 32).bfloat16()
            return torch.equal(norm(x), reference.rms_norm(x, norm.weight, 1e-3))
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False


def _is_swiglu(module: Any) -> bool:
    names = {name for name, _ in module.named_children()}
    return names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and (
        _is_silu(module.act_fn) and _has_swiglu_formula(type(module).forward)
    )


def _is_silu(function: Callable[[Tensor], Tensor]) -> bool:
    x = torch.linspace(-4, 4, 9, device="cpu")
    return torch.equal(function(x), F.silu(x))


@lru_cache(maxsize=64)
def _has_swiglu_formula(forward: Callable[..., Any]) -> bool:
    """Whether it computes down(act(gate(x)) * up(x)), tried with other functions for the four."""
    parts = SimpleNamespace(
        gate_proj=lambda x: x + 1,
        up_proj=lambda x: 3 * x,
        down_proj=lambda x: x - 7,
        act_fn=torch.sin,
    )
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, device="cpu")
    try:
        return torch.equal(forward(parts, x), torch.sin(x + 1) * (3 * x) - 7)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
