"""A model as its ranks run it: alone, replicated by DDP, or sharded by FSDP2.

Gradients are sums over all ranks and micro-batches, never means: the loop divides them once, by the
weight of the whole step. So the mean of a step is the same however it is cut.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.stream_step import Step
from varlen_sft.train.config import Strategy
from varlen_sft.train.distributed import World
from varlen_sft.train.optimizer import GradientSums
from varlen_sft.types import LossOutput

__all__ = ["Parallel", "blocks", "evaluate_steps", "give_back", "shard"]


class Parallel:
    """Calls a model on micro-batches, so that the last backward of a step leaves its gradients.

    Args:
        model: on the world's device. Already through ``shard``, as its optimiser has to be made of
            the shards.
        world: the ranks.
        strategy: how they share the work; without other ranks there is nothing to share.
        score: the loss of a batch; ``model(batch)`` if None.

    Attributes:
        model: the bare one, whose parameters and names are as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        strategy: Strategy = "ddp",
        *,
        score: Callable[[nn.Module, PackedBatch], LossOutput] | None = None,
    ) -> None:
        self.model, self.world, self.strategy = model, world, strategy
        self._score = score or (lambda module, batch: module(batch))
        self.module = model
        if strategy == "ddp" and world.size > 1:
            ddp = nn.parallel.DistributedDataParallel
            named = inspect.signature(ddp).parameters
            sync = (
                "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
            )
            options: dict[str, Any] = {sync: False}
            self.module = ddp(model, gradient_as_bucket_view=True, **options)

    def reduce_with(self, sums: GradientSums) -> None:
        """Have the last backward of a step add what earlier micro-batches left in ``sums``."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel):
            hook = lambda sums, bucket: _sum_in_fp32(sums, bucket)  # noqa: E731
            self.module.register_comm_hook(sums, hook)

    def loss(self, batch: PackedBatch) -> LossOutput:
        """Of a micro-batch, wherever it lies."""
        return self._score(self.module, self.here(batch))

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: ranks exchange gradients in the last."""
        if self.strategy != "ddp":
            from torch.distributed.fsdp import FSDPModule

            if isinstance(self.model, FSDPModule):
                self.model.set_requires_gradient_sync(last)
                self.model.set_reshard_after_backward(last or self.strategy == "fsdp")
        if last or self.module is self.model:
            return nullcontext()
        return cast(nn.parallel.DistributedDataParallel, self.module).no_sync()

    @torch.no_grad()
    def evaluate(self, batch: PackedBatch) -> LossOutput:
        """The loss without gradients; of a sharded model all ranks call it equally often."""
        output = self._score(self.model, self.here(batch))
        if self.strategy != "ddp":
            give_back(self.model)
        return output

    def here(self, batch: PackedBatch) -> PackedBatch:
        """The batch on this rank's device, without waiting for it."""
        if batch.input_ids.device == self.world.device:
            return batch
        return batch.to(self.world.device, non_blocking=True)


def evaluate_steps(parallel: Parallel, steps: Iterable[Step]) -> float:
    """Weighted mean loss over all supervised tokens of some steps, of all ranks; 0 without any.

    Args:
        parallel: on all ranks, each with its part of the same steps.
        steps: a few, always the same ones for a curve; ``PackStream.step`` makes them.
    """
    was_training = parallel.model.training
    parallel.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=parallel.world.device)
    for step in steps:
        for batch in step.batches:
            output = parallel.evaluate(batch)
            sums += torch.stack([output.loss_sum, output.weight_sum]).double()
    parallel.model.train(was_training)
    loss, weight = parallel.world.sum(sums).tolist()
    return loss / weight if weight else 0.0


def give_back(model: nn.Module) -> None:
    """Drop the weights that a forward gathered and no backward will: the root's, and with
    "zero2" those of all blocks. A model that is not sharded has none."""
    for module in model.modules():
        drop = getattr(module, "reshard", None)
        if drop is not None:
            drop()


def shard(model: nn.Module, world: World, strategy: Strategy = "fsdp") -> None:
    """Cut the parameters in shards over all ranks, block by block (FSDP2). Alone: leave them.

    Args:
        strategy: "fsdp" gives gathered weights back after each use (ZeRO-3). "zero2" keeps them
            whole from the first forward of a step to its last backward: more memory, and weights
            are exchanged once in a step instead of twice in each micro-batch. With "ddp" nothing
            is cut.

    Raises:
        ValueError: the model has no list of blocks.
    """
    if world.size == 1 or strategy == "ddp":
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    policy = MixedPrecisionPolicy(
        reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=strategy == "fsdp")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, not means
            module.set_force_sum_reduction_for_comms(True)  # by plain sums, which gloo has, too


def blocks(model: nn.Module) -> nn.ModuleList:
    """The layers of a transformer: of the lists of modules of one class, that with most parameters.

    Raises:
        ValueError: there is none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    alike = [found for found in lists if len({type(block) for block in found}) == 1]
    if not alike:
        raise ValueError(f"{type(model).__name__} must hold its blocks in a ModuleList, has none")
    return max(alike, key=lambda found: sum(p.numel() for p in found.parameters()))


def _sum_in_fp32(
    sums: GradientSums, bucket: torch.distributed.GradBucket
) -> torch.futures.Future[Tensor]:
    """DDP's exchange of a bucket: sums over ranks, in fp32 for narrow parameters."""
    buffer = bucket.buffer()
    wide = buffer.float() if buffer.dtype in (torch.bfloat16, torch.float16) else buffer
    for parameter, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        held = sums.pop(cast(nn.Parameter, parameter), None)
        if held is not None:
            start = grad.storage_offset() - buffer.storage_offset()
            wide.as_strided(grad.size(), grad.stride(), start).add_(held)
    work = torch.distributed.all_reduce(wide, async_op=True)

    def narrow(_: torch.futures.Future[list[Tensor]]) -> Tensor:
        return buffer if wide is buffer else buffer.copy_(wide)

    return work.get_future().then(narrow)
