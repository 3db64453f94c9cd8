"""A patched loss that TRL would pass by says so.

TRL's trainers replace ``model.forward`` and call the base model and the head themselves, so a loss
that ``patch`` put there would never run and nothing would tell. Whatever the order of ``patch`` and
the trainer, one of two things is seen: a trainer tags its model as trained by TRL when it has
prepared it, and its steps ask for TRL's head by a keyword.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["OUR_TAG", "guard", "loss_is_patched", "refuse_fused_head", "unguard"]

OUR_TAG = "varlen-sft"
"""The model tag of the trainer that does use the patched loss."""

_MESSAGE = (
    "this model was patched with loss= or prune_last_layer=, but TRL's trainers call a head of "
    "their own and the patched loss would never run: use varlen_sft.integrations.trl.SFTTrainer "
    "in place of trl.SFTTrainer, or varlen_sft.patch(model, loss=False, prune_last_layer=False)"
)


def guard(model: nn.Module) -> None:
    """Make ``model``, a ``*ForCausalLM`` whose loss was patched, refuse a stock TRL trainer.

    It raises ValueError where such a trainer is made, also around a PEFT model.
    """
    model.add_model_tags = MethodType(_add_model_tags, model)  # type: ignore[assignment]


def unguard(model: nn.Module) -> None:
    """Take ``guard`` back."""
    model.__dict__.pop("add_model_tags", None)


def loss_is_patched(model: Any) -> bool:
    """Whether the loss of ``model``, or of the one inside a PEFT model, is guarded: it is ours."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "add_model_tags" in vars(inside)


def refuse_fused_head(keywords: Mapping[str, Any]) -> None:
    """Refuse a call of the patched forward that asks for TRL's head: patched after the trainer.

    Raises:
        ValueError: ``keywords`` hold a true ``fused_lm_head``.
    """
    if keywords.get("fused_lm_head"):
        raise ValueError(_MESSAGE)


def _add_model_tags(self: Any, tags: list[str] | str) -> None:
    names = [tags] if isinstance(tags, str) else tags
    if "trl" in names and OUR_TAG not in names:
        raise ValueError(_MESSAGE)
    type(self).add_model_tags(self, tags)
