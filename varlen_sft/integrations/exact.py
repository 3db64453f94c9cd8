"""Numbers that mixed precision must not round: weights of tokens, and what a loss is divided by."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["keep_exact", "require_exact"]

_LOW = (torch.bfloat16, torch.float16)


def keep_exact(accelerator: Any) -> None:
    """Let FSDP2's mixed precision compute in 16 bits without rounding what a model is called with.

    By its default policy every floating-point argument of the model is rounded, the number of
    trained tokens and their weights among them (patched models refuse those), and so is the loss
    that comes back. Weights of the model and hidden states are of 16 bits as before. Without FSDP2,
    or without mixed precision, nothing is to be done, and nothing is.

    Args:
        accelerator: of ``accelerate``, or a Trainer's (``trainer.accelerator``), before ``prepare``
            or ``train`` is called.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or plugin.mixed_precision_policy is None:
        return
    plugin.mixed_precision_policy = replace(
        plugin.mixed_precision_policy, cast_forward_inputs=False, output_dtype=None
    )


def require_exact(name: str, value: Tensor) -> None:
    """Refuse a number that was rounded on its way into a model.

    Raises:
        TypeError: a tensor of 16 bits.
    """
    if value.dtype in _LOW:
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(
            f"{name} must not be rounded, got {got}: FSDP2's mixed precision casts what goes into "
            "a model. Call varlen_sft.integrations.keep_exact(accelerator) (a Trainer has it as "
            "trainer.accelerator) before prepare or train, or give fully_shard a "
            "MixedPrecisionPolicy(cast_forward_inputs=False)"
        )
