"""The call of a patched model: its pack is read before the base model runs, and handed down.

Everything here is a plain function that finds its state on the module, so that a copied model
carries its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.integrations.hf_attention import AttentionName
from varlen_sft.integrations.hf_rope import PackRotation
from varlen_sft.integrations.packed import FLASH_KEYS, ROWS, Packed
from varlen_sft.modules import RotaryEmbedding

__all__ = ["Call", "call_of", "forget_call", "install_call", "rotary_forward", "share_call"]
__all__ += ["shared_call"]

_KEY = "_varlen_sft_call"


@dataclass(eq=False)
class Call:
    """What a base model and modules of it share while a call runs; one call at a time."""

    positional: tuple[str, ...]
    """Names of what the base model's forward takes, in order."""
    attention: bool
    tables: Mapping[str | None, RotaryEmbedding]
    """By layer type, or by None where one table serves all; empty where RoPE is HF's."""
    rotary_before: MethodType | None
    """The rotary module's forward if somebody had replaced it, else None."""
    packed: Packed | None = None
    in_block: bool = False
    """A block is computing a pack, see ``hf_blocks.in_pack``."""


def install_call(
    base: Any, attention: bool, tables: Mapping[str | None, RotaryEmbedding]
) -> list[Any]:
    """Put the hooks on a base model (``LlamaModel``); returns their handles."""
    names = tuple(inspect.signature(type(base).forward).parameters)[1:]
    call = Call(names, attention, tables, vars(base.rotary_emb).get("forward"))
    for module in (base, base.rotary_emb) if tables else (base,):
        setattr(module, _KEY, call)
    return [
        base.register_forward_pre_hook(_reader(), with_kwargs=True),
        base.register_forward_hook(_forget_pack, always_call=True),
    ]


def _reader() -> Any:
    """``_read_pack`` as compiled models run it, outside their graphs.

    Made when it is used: it takes a second where nobody has imported dynamo yet. It takes the
    other's name, by which pickle and copies look for a hook.
    """
    global _read_pack
    if not hasattr(_read_pack, "_torchdynamo_disable"):
        _read_pack = torch.compiler.disable(_read_pack)
    return _read_pack


def share_call(base: nn.Module, module: nn.Module) -> None:
    """Let another module of a patched base model see its state."""
    setattr(module, _KEY, call_of(base))


def shared_call(module: nn.Module) -> Call | None:
    """The state that a module was given, if it was."""
    return vars(module).get(_KEY)


def forget_call(module: nn.Module) -> None:
    """Take the state off a module."""
    vars(module).pop(_KEY, None)


def call_of(base: nn.Module) -> Call:
    """The state of a patched base model."""
    return vars(base)[_KEY]


def _read_pack(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    call = call_of(module)
    given = {**dict(zip(call.positional, args, strict=False)), **kwargs}
    call.packed = packed = Packed.from_call(given)
    if packed is None:
        return None
    _refuse_beside(module, given)
    # A pack is not decoded from; and beside a cache HF would not see the edges in position ids.
    given.update(use_cache=False, attention_mask=None, position_ids=packed.position_ids[None])
    if call.attention:
        _require_our_name(module)
        given = {key: value for key, value in given.items() if key not in (*FLASH_KEYS, ROWS)}
        # HF passes a mask of four axes on as it is: none is made, and nothing looks at this one.
        given.update(packed=packed, attention_mask=torch.empty(1, 1, 0, 0, dtype=torch.bool))
    else:
        given.pop("packed", None)
    return (), given


def _forget_pack(module: nn.Module, args: Any, output: Any) -> None:
    call_of(module).packed = None


def _refuse_beside(module: nn.Module, given: Mapping[str, Any]) -> None:
    if given.get("use_cache"):
        raise ValueError("use_cache must not be True beside a pack: it cannot be decoded from")
    config: Any = module.config
    attentions = given.get("output_attentions")
    if config.output_attentions if attentions is None else attentions:
        raise ValueError("output_attentions must be False beside a pack: no weights are made")


def _require_our_name(module: nn.Module) -> None:
    config: Any = module.config
    name = config._attn_implementation
    if not isinstance(name, AttentionName):
        raise ValueError(
            f"the attention implementation was set to {name!r} after varlen_sft.patch(model): set "
            "it before, and patch then"
        )


def rotary_forward(
    self: nn.Module, x: Tensor, *args: Any, **kwargs: Any
) -> tuple[PackRotation, None] | tuple[Tensor, Tensor]:
    """Forward of a rotary module: cos and sin as before or, in a pack, what our attention forwards
    take for them."""
    call: Call = vars(self)[_KEY]
    if call.packed is None:
        before = call.rotary_before or MethodType(type(self).forward, self)
        return before(x, *args, **kwargs)
    layer_type = args[1] if len(args) > 1 else kwargs.get("layer_type")
    packed = call.packed
    rotation = call.tables[layer_type](packed.position_ids, packed.sequences)
    return PackRotation(rotation, x.dtype), None
