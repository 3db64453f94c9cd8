"""Attention of a patched Hugging Face model: packs by our op, every other call as it was before.

Registering the name "varlen_sft" with transformers is the one global effect of this package; it
adds a name and changes none. A model's config then carries an ``AttentionName``, which is that
name and remembers the one it replaced.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.integrations.packed import Packed
from varlen_sft.ops.attention import varlen_attention

__all__ = ["NAME", "AttentionName", "attend", "causal_mask", "register", "rename", "restore"]

NAME = "varlen_sft"


class AttentionName(str):
    """``"varlen_sft"``, with the name of the attention that was set before.

    A string, so that it travels wherever HF copies a config, and is left out where HF saves one.
    """

    before: str | None

    def __new__(cls, before: str | None) -> AttentionName:
        name = super().__new__(cls, NAME)
        name.before = before
        return name


def register() -> None:
    """Tell transformers of our attention and its mask, under one name.

    Without the mask HF would make none at all, and padding would be ignored.

    Raises:
        ValueError: somebody else has registered the name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    pairs = ((AttentionInterface, attend), (AttentionMaskInterface, causal_mask))
    for interface, function in pairs:
        known = interface._global_mapping.get(NAME)
        if known not in (None, function):
            raise ValueError(f"{NAME!r} is already registered in {interface.__name__}: {known}")
    for interface, function in pairs:
        interface.register(NAME, function)


def rename(model: nn.Module, config: Any) -> Any:
    """Give every module that holds ``config`` a copy of it that names our attention.

    The config itself may belong to another model too, and stays as it is.
    """
    renamed = copy.copy(config)
    renamed._attn_implementation_internal = AttentionName(config._attn_implementation)
    for module in model.modules():
        if module.__dict__.get("config") is config:
            module.config = renamed
    return renamed


def restore(config: Any) -> None:
    """Put the attention that was set before back into a config that ``rename`` made."""
    if isinstance(config._attn_implementation, AttentionName):
        config._attn_implementation_internal = config._attn_implementation.before


def attend(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    packed: Packed | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What HF's attention modules call: (1, T, H, D) and no attention weights.

    Without ``packed`` the call goes to the attention that was set before. ``q_sequences`` and
    ``k_sequences`` stand for the pack's where only some of its rows are queried.

    Raises:
        ValueError: no attention was set before, or a pack comes with dropout or without causality.
    """
    if packed is None:
        function, view = _before(module)
        return function(view, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError(f"attention dropout must be 0 in a pack, got {kwargs['dropout']}")
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal must not be False in a pack")
    q, k, v = (x.transpose(1, 2)[0] for x in _autocast(query, key, value))
    out = varlen_attention(
        q, k, v, kwargs.get("q_sequences", packed.sequences),
        k_sequences=kwargs.get("k_sequences"), softmax_scale=kwargs.get("scaling"),
        window_size=kwargs.get("sliding_window"), softcap=kwargs.get("softcap"),
    )  # fmt: skip
    return out[None], None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Autocast lowers what comes into torch's own attention; an op of ours has to do it itself."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def causal_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """The mask that the attention set before needs; calls with a pack never ask for one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    make = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.get(_name_before(config))
    return None if make is None else make(*args, config=config, **kwargs)


def _before(module: nn.Module) -> tuple[Callable[..., Any], Any]:
    """The attention function that was set before, and the module as that function knew it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _name_before(module.config)
    eager = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    config = _Overlay(module.config, "_attn_implementation", name)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager), _Overlay(module, "config", config)


def _name_before(config: Any) -> str | None:
    name = config._attn_implementation
    if not isinstance(name, AttentionName):
        raise ValueError(
            f"attn_implementation={NAME!r} must be set by varlen_sft.patch(model), "
            "which remembers what to call where there is no pack"
        )
    return name.before


class _Overlay:
    """An object with one attribute changed; all others, also when set, are those of the object."""

    def __init__(self, target: Any, name: str, value: Any) -> None:
        self.__dict__.update({"_target": target, name: value})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)
