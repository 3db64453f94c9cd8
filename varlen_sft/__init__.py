"""Padding-free supervised fine-tuning of Llama-like models.

Names are imported when they are first used: ``import varlen_sft`` itself loads nothing, not even
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Collator": "varlen_sft.integrations.collator",
    "IGNORE_INDEX": "varlen_sft.types",
    "LlamaForSFT": "varlen_sft.models.llama",
    "LossOptions": "varlen_sft.types",
    "LossOutput": "varlen_sft.types",
    "PackedBatch": "varlen_sft.data.batch",
    "RotaryEmbedding": "varlen_sft.modules",
    "Sample": "varlen_sft.data.sample",
    "Sequences": "varlen_sft.types",
    "VarlenAttention": "varlen_sft.modules",
    "apply_rope": "varlen_sft.ops.rope",
    "apply_rope_": "varlen_sft.ops.rope",
    "backends": "varlen_sft.ops.backends",
    "collate": "varlen_sft.data.batch",
    "cu_seqlens_from_position_ids": "varlen_sft.ops.sequences",
    "linear_cross_entropy": "varlen_sft.ops.cross_entropy",
    "masked_cross_entropy": "varlen_sft.ops.cross_entropy",
    "patch": "varlen_sft.integrations.hf",
    "rope_table": "varlen_sft.ops.rope",
    "sequences_from_lengths": "varlen_sft.ops.sequences",
    "sequences_from_position_ids": "varlen_sft.ops.sequences",
    "unpatch": "varlen_sft.integrations.hf",
    "varlen_attention": "varlen_sft.ops.attention",
}
__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from varlen_sft.data.batch import PackedBatch, collate
    from varlen_sft.data.sample import Sample
    from varlen_sft.integrations.collator import Collator
    from varlen_sft.integrations.hf import patch, unpatch
    from varlen_sft.models.llama import LlamaForSFT
    from varlen_sft.modules import RotaryEmbedding, VarlenAttention
    from varlen_sft.ops.attention import varlen_attention
    from varlen_sft.ops.backends import backends
    from varlen_sft.ops.cross_entropy import linear_cross_entropy, masked_cross_entropy
    from varlen_sft.ops.rope import apply_rope, apply_rope_, rope_table
    from varlen_sft.ops.sequences import (
        cu_seqlens_from_position_ids,
        sequences_from_lengths,
        sequences_from_position_ids,
    )
    from varlen_sft.types import IGNORE_INDEX, LossOptions, LossOutput, Sequences


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'varlen_sft' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
