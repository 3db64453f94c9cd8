"""RoPE of a patched Hugging Face model: our modules and op on packs, HF's own elsewhere.

Two places are replaced, both on the instance: the rotary module answers a pack with our tables,
and each attention layer's forward is the same code with one name bound to ``apply``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.integrations.families import Family
from varlen_sft.modules import RotaryEmbedding, Rotation
from varlen_sft.ops.rope import apply_rope
from varlen_sft.reference import apply_rope as apply_rope_reference
from varlen_sft.rope_frequencies import inverse_frequencies
from varlen_sft.types import Numerics

__all__ = [
    "PackRotation",
    "attention_forward",
    "attention_forwards",
    "check_rotation",
    "has_rope",
    "rotary_tables",
    "rounded_tables",
]

_APPLY = "apply_rotary_pos_emb"
_LOW = (torch.bfloat16, torch.float16)


class PackRotation:
    """What attention layers get for ``cos`` in a pack.

    No tuple and no dataclass: FSDP's mixed precision casts what it finds in those, and would round
    the tables with the hidden states.

    Args:
        rotation: tables and position ids.
        rounded_to: the dtype to which HF would round the tables, that of the hidden states.
    """

    def __init__(self, rotation: Rotation, rounded_to: torch.dtype) -> None:
        self.rotation, self.rounded_to = rotation, rounded_to

    def at(self, rows: Tensor) -> PackRotation:
        """Of these rows alone."""
        ids = self.rotation.position_ids[rows]
        return PackRotation(self.rotation._replace(position_ids=ids), self.rounded_to)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackRotation:
        """The same on another device, as Accelerate asks where layers are spread over several."""
        moved = (x.to(device, non_blocking=non_blocking) for x in self.rotation)
        return PackRotation(Rotation(*moved), self.rounded_to)


def rotary_tables(config: Any, family: Family) -> dict[str | None, RotaryEmbedding]:
    """One ``RotaryEmbedding`` for each table of a model, by layer type; by None where one serves
    all layers.

    Raises:
        ValueError: a RoPE type that is not supported.
    """
    values = config.to_dict()
    if family.rope != "table by layer type":
        return {None: RotaryEmbedding.from_config(values)}
    tables = {}
    for layer_type in sorted(set(config.layer_types)):
        own = {**values, "rope_parameters": values["rope_parameters"][layer_type]}
        tables[layer_type] = RotaryEmbedding.from_config(own)
    return tables


def rounded_tables(rotary: nn.Module, tables: Mapping[str | None, RotaryEmbedding]) -> list[str]:
    """Compare our frequencies with those of HF's rotary module.

    Returns:
        Names of buffers of HF's that were rounded with the model (``model.to(torch.bfloat16)``
        does that to them); ours are exact.

    Raises:
        ValueError: HF's frequencies are others than its config says, rounding aside.
    """
    rounded = []
    for layer_type, table in tables.items():
        name = "original_inv_freq" if layer_type is None else f"{layer_type}_original_inv_freq"
        buffer = getattr(rotary, name, None)
        if buffer is None:
            raise ValueError(f"{type(rotary).__name__} must have a buffer {name} (else rope=False)")
        theirs = buffer.detach().cpu().float()
        ours, _ = inverse_frequencies(table.rope_parameters, table.head_dim)
        if theirs.shape == ours.shape and torch.allclose(theirs, ours, rtol=1e-6, atol=0.0):
            continue
        if not any(torch.equal(theirs, ours.to(low).float()) for low in _LOW):
            raise ValueError(
                f"{name} must be what the config's rope_parameters give (else rope=False)"
            )
        rounded.append(name)
    return rounded


def check_rotation(layer: nn.Module) -> None:
    """See on four numbers that an attention layer rotates by halves, as our op does.

    Raises:
        ValueError: it calls no function that we know, or one that computes something else.
    """
    forward = type(layer).forward
    kind = type(layer).__name__
    if not isinstance(forward, FunctionType) or inspect.unwrap(forward) is not forward:
        raise ValueError(f"{kind}.forward must be a plain function (else rope=False)")
    if _APPLY not in forward.__code__.co_names or _APPLY not in forward.__globals__:
        raise ValueError(f"{kind}.forward must call {_APPLY} (else rope=False)")
    x = torch.tensor([[0.5, -1.0, 2.0, 3.0], [1.5, 0.25, -2.0, 1.0]], dtype=torch.float32)
    angles = torch.tensor([[0.3, 1.1], [0.6, 2.2]], dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()
    full = (torch.cat([table, table], -1)[None] for table in (cos, sin))
    theirs = forward.__globals__[_APPLY](x[None, None], x[None, None], *full)[0][0, 0]
    ours = apply_rope_reference(x[:, None], x[:, None], cos, sin, torch.arange(2))[0][:, 0]
    if not torch.allclose(theirs, ours, rtol=1e-5, atol=1e-6):
        raise ValueError(f"{_APPLY} of {kind} must rotate by halves (else rope=False)")


def has_rope(layer: Any) -> bool:
    """Whether an attention layer turns q and k: SmolLM3 has some without positions."""
    return bool(getattr(layer, "use_rope", True))


def attention_forwards(
    layers: list[nn.Module], numerics: Numerics
) -> list[tuple[nn.Module, MethodType]]:
    """``attention_forward`` for each attention layer that has RoPE, bound to it."""
    made: dict[FunctionType, FunctionType] = {}
    forwards = []
    for layer in filter(has_rope, layers):
        theirs: Any = type(layer).forward
        if theirs not in made:
            made[theirs] = attention_forward(theirs, numerics)
        forwards.append((layer, MethodType(made[theirs], layer)))
    return forwards


def attention_forward(forward: FunctionType, numerics: Numerics) -> FunctionType:
    """An attention layer's forward that rotates packs by our op: its code, one name bound anew.

    Args:
        forward: the forward of the layer's class, as ``check_rotation`` accepts it.
        numerics: see ``varlen_sft.apply_rope``.
    """
    names = {**forward.__globals__, _APPLY: _apply(forward.__globals__, numerics)}
    del names["__name__"]  # by which torch.compile would look names up in HF's own module
    bound = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    bound.__kwdefaults__ = forward.__kwdefaults__
    bound.__module__, bound.__qualname__ = forward.__module__, forward.__qualname__
    return bound


def _apply(names: Mapping[str, Any], numerics: Numerics) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(
        q: Tensor,  # (1, H, T, D)
        k: Tensor,  # (1, K, T, D)
        cos: Tensor | PackRotation,
        sin: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(cos, PackRotation):
            return names[_APPLY](q, k, cos, sin, *args, **kwargs)
        # Where HF rounds its tables to another dtype than q's, as under autocast, its own result is
        # the unrounded one.
        own: Numerics = numerics if cos.rounded_to == q.dtype else "fp32"
        q, k = q.transpose(1, 2)[0], k.transpose(1, 2)[0]
        turned = apply_rope(q, k, *cos.rotation, numerics=own)
        return tuple(x[None].transpose(1, 2) for x in turned)  # type: ignore[return-value]

    return apply_rotary_pos_emb
