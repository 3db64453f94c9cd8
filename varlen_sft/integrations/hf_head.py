"""The head of a Hugging Face model: its weight as it takes part in this step, or a clear word."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Head", "check_head", "head_of"]

_ELSE = "(else varlen_sft.patch(model, loss=False))"


class Head(NamedTuple):
    """Weight and bias of an ordinary linear head."""

    weight: Tensor  # (V, C)
    bias: Tensor | None  # (V,)

    def read(self, hidden: Tensor) -> tuple[Tensor, Head]:
        """hidden and head in the dtype in which a linear layer would multiply them now.

        Autocast lowers the inputs of torch's own products; an op of ours has to do it itself.
        """
        device = hidden.device.type
        if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
            return hidden, self
        dtype = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(dtype)
        return hidden.to(dtype), Head(self.weight.to(dtype), bias)


def check_head(model: Any) -> None:
    """Whether ``head_of`` will know this model's head.

    Raises:
        ValueError: it will not; the message says what the head is.
    """
    _require_linear(_active(model))


def head_of(model: Any) -> Head:
    """The head as it is now, gathered where FSDP2 keeps it in shards.

    Raises:
        ValueError: a head with adapters, quantised, sharded by something else, or not loaded.
    """
    head = _active(model)
    _require_linear(head)
    if hasattr(head, "unshard"):  # a group of its own under FSDP2: its forward would gather it
        head.unshard()
    weight, bias = head.weight, head.bias
    _require_whole(weight)
    return Head(weight, bias)


def _active(model: Any) -> Any:
    """``lm_head``, or the copy of it that PEFT trains (``modules_to_save``)."""
    head = model.get_output_embeddings()
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return head
    active = [] if head.disable_adapters else [x for x in head.active_adapters if x in copies]
    return copies[active[0]] if active else head.original_module


def _require_linear(head: Any) -> None:
    if head is None:
        raise ValueError(f"the model must have a head (get_output_embeddings) {_ELSE}")
    kind = type(head).__name__
    if hasattr(head, "lora_A") or hasattr(head, "base_layer"):
        raise ValueError(
            f"the head must have no adapter, got {kind} of PEFT: its weight alone would be the "
            f"wrong one {_ELSE}"
        )
    if type(head).forward is not nn.Linear.forward:
        raise ValueError(f"the head must be an ordinary nn.Linear, got {kind} {_ELSE}")
    if not head.weight.is_floating_point():
        raise ValueError(f"the head must not be quantised, got weights of {head.weight.dtype}")


def _require_whole(weight: Tensor) -> None:
    from torch.distributed.tensor import DTensor

    if hasattr(weight, "ds_id"):
        raise ValueError(f"a head that DeepSpeed ZeRO-3 shards is not supported {_ELSE}")
    if isinstance(weight, DTensor):
        raise ValueError(f"a head in shards is not supported, other than FSDP2's {_ELSE}")
    if weight.is_meta:
        raise ValueError(f"a head that is offloaded to the meta device is not supported {_ELSE}")
