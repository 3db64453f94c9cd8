"""Numbers and lists in words."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["count", "listed"]


def count(number: float, what: str) -> str:
    """``1 row``, ``2,000 rows``, ``0 micro-batches``, ``1.5 epochs``."""
    ending = "es" if what.endswith(("tch", "sh", "ss", "x")) else "s"
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {what}{ending * (number != 1)}"


def listed(names: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
