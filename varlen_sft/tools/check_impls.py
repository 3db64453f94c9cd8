"""Every implementation of our ops that runs here, in as few sets as have each one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from varlen_sft.ops import backends
from varlen_sft.words import listed

__all__ = ["chosen", "implementations"]

OPS = ("attention", "rope", "cross_entropy", "elementwise")


def implementations(device: torch.device) -> dict[str, dict[str, str]]:
    """As few sets of implementations as have each one that runs on a device, by a name for it.

    The first is what is picked; the second has everybody's second, and so on.
    """
    able = {
        op: [
            backend.name
            for backend in backends.BACKENDS[op]
            if device.type in backend.device_types and not backend.missing
        ]
        for op in OPS
    }
    depth = max(len(names) for names in able.values())
    sets = [
        {op: names[min(at, len(names) - 1)] for op, names in able.items()} for at in range(depth)
    ]
    return {_label(impls): impls for impls in sets}


def _label(impls: Mapping[str, str]) -> str:
    by_impl: dict[str, list[str]] = {}
    for op, impl in impls.items():
        by_impl.setdefault(impl, []).append(op)
    if len(by_impl) == 1:
        return next(iter(by_impl))
    return "; ".join(f"{listed(ops)} {impl}" for impl, ops in by_impl.items())


@contextmanager
def chosen(impls: Mapping[str, str]) -> Iterator[None]:
    """Inside, each op knows the one implementation that is named, and no other."""
    before = {op: backends.BACKENDS[op] for op in impls}
    try:
        for op, name in impls.items():
            backends.BACKENDS[op] = tuple(b for b in before[op] if b.name == name)
        yield
    finally:
        backends.BACKENDS.update(before)
