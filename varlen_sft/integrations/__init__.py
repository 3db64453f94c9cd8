"""How the package meets other people's trainers. Names are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "Collator": "varlen_sft.integrations.collator",
    "WeightedTrainerMixin": "varlen_sft.integrations.trainer",
    "denominator": "varlen_sft.integrations.trainer",
    "keep_exact": "varlen_sft.integrations.exact",
}
__all__ = ["Collator", "WeightedTrainerMixin", "denominator", "keep_exact"]

if TYPE_CHECKING:
    from varlen_sft.integrations.collator import Collator
    from varlen_sft.integrations.exact import keep_exact
    from varlen_sft.integrations.trainer import WeightedTrainerMixin, denominator


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'varlen_sft.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
