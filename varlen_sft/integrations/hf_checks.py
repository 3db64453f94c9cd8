"""What ``patch`` refuses, and why, before it changes anything.

transformers is probed by its features, never by its version.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

from varlen_sft.integrations.families import Family, family_of
from varlen_sft.integrations.hf_rope import check_rotation

__all__ = ["check_attention", "check_model", "check_rope", "inner_model"]


def inner_model(model: Any) -> Any:
    """The transformers model itself, also inside a PEFT model.

    Raises:
        TypeError: neither of the two.
    """
    from transformers import PreTrainedModel

    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inside, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel or a PEFT model around one (patch comes "
            f"before any other wrapper), got {type(inside).__name__}"
        )
    return inside


def check_model(model: Any) -> Family:
    """What must hold whatever is patched: a known family in an ordinary shape, with weights.

    Raises:
        ValueError: anything else, by name.
    """
    family = family_of(model.config)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"weights must be loaded before patch, got {name} on the meta device")
    _refuse_tensor_parallel(model)
    base = model.base_model
    for part in ("embed_tokens", "layers", "rotary_emb", "norm"):
        if not hasattr(base, part):
            raise ValueError(f"{type(base).__name__} must have {part}, as {family.title} has")
    kinds = {type(base)} | {type(x) for layer in base.layers for x in (layer, layer.self_attn)}
    for kind in kinds:
        _require_keywords(kind)
    return family


def _refuse_tensor_parallel(model: Any) -> None:
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(f"tensor-parallel models are not supported, got tp_size={model._tp_size}")
    if "torch.distributed.tensor" not in sys.modules:
        return  # then no parameter is a DTensor; importing it takes long
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            dims = parameter.device_mesh.mesh_dim_names or ()
            if not by_fsdp or "tp" in dims:
                raise ValueError(f"tensor-parallel models are not supported, got {name} sharded")


def _require_keywords(kind: Any) -> None:
    """Metadata reaches attention as a keyword that every forward on the way hands down."""
    parameters = inspect.signature(kind.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(
            f"{kind.__name__}.forward must hand unknown keywords down: it does in transformers 5.x"
        )


def check_attention(layers: Iterable[nn.Module]) -> None:
    """Each attention layer asks transformers' attention interface and is causal, without dropout.

    Raises:
        ValueError: a layer that does not, or transformers has no such interface.
    """
    import transformers

    for interface in ("AttentionInterface", "AttentionMaskInterface"):
        if not hasattr(transformers, interface):
            raise ValueError(f"transformers must have {interface} (5.x has; else attention=False)")
    for index, layer in enumerate(layers):
        where = f"attention of layer {index}"
        forward = inspect.unwrap(type(layer).forward)
        names = forward.__code__.co_names if isinstance(forward, FunctionType) else ()
        if "ALL_ATTENTION_FUNCTIONS" not in names or (
            "eager_attention_forward" not in forward.__globals__
        ):
            raise ValueError(f"{where} must use ALL_ATTENTION_FUNCTIONS (else attention=False)")
        dropout = getattr(layer, "attention_dropout", 0.0)
        if dropout:
            raise ValueError(f"{where} must have attention_dropout 0, got {dropout}")
        if not getattr(layer, "is_causal", True):
            raise ValueError(f"{where} must be causal, got is_causal=False")


def check_rope(layers: Iterable[nn.Module]) -> None:
    """Each attention layer rotates as our op does, and by code that can be bound anew.

    Raises:
        ValueError: a layer that does not, or whose forward somebody else has replaced.
    """
    seen: set[type] = set()
    for index, layer in enumerate(layers):
        if "forward" in vars(layer):
            raise ValueError(
                f"attention of layer {index} must have the forward of {type(layer).__name__}, "
                "got one that was replaced (else rope=False)"
            )
        if type(layer) not in seen:
            check_rotation(layer)
            seen.add(type(layer))
