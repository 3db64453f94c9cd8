"""Tensors that may be cut in shards over ranks: this rank's part, the whole, norms over all of it.

A plain tensor is its own only shard, so that what is built on these works on one process, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["local", "total_norm", "whole"]


def total_norm(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, shards of other ranks included, ().

    Squares are summed over the ranks that hold other shards, in one reduction for all tensors that
    are cut alike; gradients that every rank has whole are counted once.

    Args:
        grads: this rank's shard of the gradient of each parameter; None is 0.
        parameters: whose gradients they are; on all ranks in the same order.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = {}
    for grad, parameter in zip(grads, parameters, strict=True):
        found = alike.setdefault(_shard_groups(parameter), [])
        if grad is not None:
            found.append(grad)
    total = torch.zeros((), device=local(parameters[0]).device)
    for groups, found in alike.items():
        square = torch.nn.utils.get_total_norm(found).square() if found else torch.zeros_like(total)
        for group in groups:
            torch.distributed.all_reduce(square, group=group)
        total = total + square.to(total.device)
    return total.sqrt()


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, outside of autograd, in the same memory."""
    with torch.no_grad():
        to_local = getattr(tensor, "to_local", None)
        return (tensor if to_local is None else to_local()).detach()


def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The DTensor whose shard it is, where the parameter is one."""
    if not hasattr(like, "to_local"):
        return shard
    from torch.distributed.tensor import DTensor

    assert isinstance(like, DTensor)
    return DTensor.from_local(
        shard, like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def _shard_groups(parameter: Tensor) -> tuple[Any, ...]:
    """The process groups over which a parameter is cut in shards."""
    if not hasattr(parameter, "to_local"):
        return ()
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return tuple(
        mesh.get_group(axis)
        for axis, placement in enumerate(parameter.placements)
        if placement.is_shard()
    )
