"""The record that later machine code is held against, and what is wrong with a kernel."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varlen_sft.ops.launch import KernelVariant
from varlen_sft.tools.sass import GUARDED, Figures

__all__ = ["Record", "problems"]


@dataclass(frozen=True)
class Record:
    """Figures kept under benchmarks/results, and the triton whose ptxas they are of."""

    triton: str
    figures: dict[tuple[str, int], Figures]
    """By name and capability."""

    @property
    def is_comparable(self) -> bool:
        """Whether the triton here is the record's: counts of another ptxas are no measure."""
        import triton

        return self.triton == triton.__version__

    def of(self, figures: Figures) -> Figures | None:
        """What is recorded of the same variant and target, if that can be compared."""
        found = self.figures.get((figures.name, figures.capability))
        return found if self.is_comparable else None

    def write(self, path: Path, stamp: dict[str, Any]) -> None:
        """Whole or not at all, ``stamp`` in front, a line for each kernel and target."""
        head = json.dumps(stamp | {"triton": self.triton}, indent=1).removesuffix("\n}")
        rows = ",\n".join(json.dumps(asdict(figures)) for figures in self.figures.values())
        scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        scratch.write_text(f'{head},\n "kernels": [\n{rows}\n]}}\n', encoding="utf-8")
        os.replace(scratch, path)

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read what ``write`` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        figures = {}
        for row in content["kernels"]:
            for access in ("loads", "stores"):  # JSON has no integer keys
                row[access] = {int(width): n for width, n in row[access].items()}
            figures[row["name"], row["capability"]] = Figures(**row)
        return cls(content["triton"], figures)


def problems(figures: Figures, variant: KernelVariant, recorded: Figures | None) -> list[str]:
    """Everything that is wrong with a compiled kernel, in words; empty when it is good.

    Args:
        figures: of ``variant``.
        recorded: ``Record.of(figures)``; with None only what must hold anywhere is judged.
    """
    found = []
    if figures.spill_stores or figures.spill_loads:
        found.append(f"{figures.spill_stores} spill stores, {figures.spill_loads} spill loads")
    if figures.stack_bytes:
        found.append(f"{figures.stack_bytes} bytes of local stack")
    if figures.hot_width < variant.narrowest_access:
        found.append(
            f"{figures.hot_width}-bit accesses in the hot path, where the layout allows "
            f"{variant.narrowest_access}"
        )
    if figures.fused and not variant.enable_fp_fusion:
        found.append(f"{figures.fused} fused multiply-adds, where each product has to be rounded")
    for count in GUARDED if recorded else ():
        now, before = getattr(figures, count), getattr(recorded, count)
        if now > before:
            found.append(f"{now} {count.replace('_', ' ')}, recorded {before}")
    return [f"{figures.name}, {figures.target}: {text}" for text in found]
