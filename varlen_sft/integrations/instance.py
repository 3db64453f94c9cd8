"""Forwards of single modules: what one is now, putting another in its place, and who may not copy
them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any, NoReturn

from torch import nn

__all__ = ["allow_replicas", "forward_of", "refuse_replicas", "replace_forwards"]

_REPLICATE = "_replicate_for_data_parallel"


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


def refuse_replicas(module: nn.Module) -> None:
    """Make ``torch.nn.DataParallel`` raise on a model that holds ``module``.

    It copies what an instance has, the forwards among it, and these would go on computing with the
    first device's weights.
    """
    setattr(module, _REPLICATE, _refuse)


def allow_replicas(module: nn.Module) -> None:
    """Take ``refuse_replicas`` back."""
    vars(module).pop(_REPLICATE, None)


def _refuse() -> NoReturn:
    raise ValueError(
        "torch.nn.DataParallel is not supported around a patched model: it would cut packs in "
        "pieces, and its copies would run the first one's forwards. Start one process per device "
        "(torchrun), or show one device to this one (CUDA_VISIBLE_DEVICES=0)"
    )
