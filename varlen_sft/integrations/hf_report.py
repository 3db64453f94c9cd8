"""What ``patch`` replaced, in data and in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from varlen_sft.integrations.families import Family
from varlen_sft.integrations.hf_rope import has_rope
from varlen_sft.integrations.saving import Saving
from varlen_sft.ops.elementwise import FUSED_ON
from varlen_sft.types import Numerics

__all__ = ["LayerReport", "PatchReport", "layer_reports"]


@dataclass(frozen=True)
class LayerReport:
    """What was replaced in one layer."""

    index: int
    attention: bool
    window_size: int | None
    rope: str
    """"table" or HF's layer type whose table it is; "none" for a layer without positions; "hf"
    where nothing was replaced."""


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` replaced; ``str()`` tells it in a few lines."""

    model: str
    family: str
    layers: tuple[LayerReport, ...]
    attention_before: str | None
    """The attention that calls without a pack still go to."""
    numerics: Numerics
    loss: bool
    elementwise: tuple[tuple[str, int], ...]
    """HF's classes whose work is one pass over memory in packs on a CPU, and how many there are."""
    prune_last_layer: bool
    notes: tuple[str, ...] = ()
    saving: Saving | None = None
    """What pruning spares of a step, counted for ordinary sequences; None without it."""

    def __str__(self) -> str:
        lines = [f"varlen_sft: {self.model} ({self.family})"]
        if any(layer.attention for layer in self.layers):
            lines.append(f"  attention   {_attention(self.layers)}")
            lines.append(f"              calls without a pack: {self.attention_before}")
        if any(layer.rope != "hf" for layer in self.layers):
            lines.append(f"  rope        {_rope(self.layers)}; numerics {self.numerics}")
        if self.loss:
            lines.append("  loss        head and cross-entropy on supervised rows only")
        if self.elementwise:
            parts = ", ".join(f"{count} {name}" for name, count in self.elementwise)
            where = " and ".join(FUSED_ON)
            lines.append(f"  elementwise {parts}: one pass over memory each, on {where}")
        if self.prune_last_layer:
            lines.append("  last layer  supervised rows only, but for K and V")
            lines.append(f"              {self.saving}")
        lines += [f"  note        {note}" for note in self.notes]
        return "\n".join(lines)


def layer_reports(
    family: Family, layers: Iterable[Any], attention: bool, tables: Collection[str | None]
) -> tuple[LayerReport, ...]:
    """Of each attention layer.

    Args:
        attention: whether it was replaced.
        tables: layer types that have a RoPE table of ours; None where one serves all layers.
    """
    reports = []
    for index, layer in enumerate(layers):
        table = "table" if None in tables else str(getattr(layer, "layer_type", None))
        rope = "hf" if not tables else table if has_rope(layer) else "none"
        reports.append(LayerReport(index, attention, family.window_size(layer), rope))
    return tuple(reports)


def _attention(layers: Iterable[LayerReport]) -> str:
    return _runs(
        (layer.index, f"window {layer.window_size}" if layer.window_size else "full")
        for layer in layers
    )


def _rope(layers: Iterable[LayerReport]) -> str:
    return _runs((layer.index, layer.rope) for layer in layers)


def _runs(named: Iterable[tuple[int, str]]) -> str:
    """Each word once, with the layers it stands for: ``table: 0-2, 4-6; none: 3, 7``."""
    by_word: dict[str, list[int]] = {}
    for index, word in named:
        by_word.setdefault(word, []).append(index)
    return "; ".join(f"{word}: {_ranges(indices)}" for word, indices in by_word.items())


def _ranges(indices: list[int]) -> str:
    runs = []
    for _, group in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        run = [index for _, index in group]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ", ".join(runs)
