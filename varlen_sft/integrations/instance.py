"""Forwards of single modules: what one is now, and putting another in its place."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

from torch import nn

__all__ = ["forward_of", "replace_forwards"]


def forward_of(module: nn.Module, forward: Any = None) -> Callable[..., Any]:
    """A forward as a function of ``self`` and arguments, which a copied module can use as well.

    Args:
        module: whose it is.
        forward: the callable; None for the one in place. That of the class is looked up when it is
            called, since FSDP changes the class of a module.
    """
    forward = vars(module).get("forward") if forward is None else forward
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs)
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return forward.__func__
    return lambda self, *args, **kwargs: forward(*args, **kwargs)


def replace_forwards(pairs: Iterable[tuple[nn.Module, MethodType]]) -> Callable[[], None]:
    """Put forwards on instances.

    Returns:
        A function that puts back what was there, on the instance or on its class.
    """
    done = []
    for module, forward in pairs:
        done.append((module, vars(module).get("forward")))
        module.forward = forward

    def undo() -> None:
        for module, before in reversed(done):
            del module.forward
            if before is not None:
                module.forward = before

    return undo
