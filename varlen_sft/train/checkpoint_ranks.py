"""What the ranks of a run do together on a checkpoint. One process needs no process group."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from varlen_sft.errors import InputError, RunError
from varlen_sft.train.checkpoint_storage import Reader, Staged, StagedPlanner, Writer

__all__ = ["Ranks", "in_thread"]

Result = TypeVar("Result")

WRITE_TIMEOUT = timedelta(hours=1)
"""How long the thread of a rank waits for one whose disk is slower."""
_POLL_S = 0.2


class Ranks:
    """The ranks of a run, or this process alone.

    Args:
        group: gloo, of all ranks, used by nobody else; made if None and there are other ranks.
        timeout_s: seconds until a rank that does not answer is given up, see ``wait``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, timeout_s: float = 50.0) -> None:
        self.rank, self.size = 0, 1
        if dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if group is None and self.size > 1:
            group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT)
        self._group = group
        self._alive: dist.ProcessGroup | None = None
        if self.size > 1:
            self._alive = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What rank 0 got, on all ranks; also where it raised an error."""
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self._group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def first_of(self, value: str | None) -> str | None:
        """The value of the first rank that has one."""
        if self.size == 1:
            return value
        values: list[str | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return next((found for found in values if found is not None), None)

    def wait(self, work: Future[None]) -> None:
        """Until the work of all ranks is done; its error, if it has one.

        A disk may take as long as it takes. But all ranks are here and say so again and again: one
        that does not is an error of the process group.
        """
        here = torch.zeros(1)
        while self.size > 1:
            here.fill_(work.done())
            dist.all_reduce(here, dist.ReduceOp.MIN, group=self._alive)
            if here.item():
                break
            with suppress(TimeoutError):
                work.exception(timeout=_POLL_S)
        work.result()

    def save(self, staged: Mapping[str, Staged], writer: Writer) -> None:
        """Write a checkpoint.

        Raises:
            RunError: it failed on a rank; all ranks are told.
            RuntimeError: of the process group, where a rank is gone.
        """
        try:
            dcp.save(
                dict(staged), storage_writer=writer, planner=StagedPlanner(),
                process_group=self._group, no_dist=self.size == 1,
            )  # fmt: skip
        except CheckpointException as failed:
            told = "; ".join(self._told(rank, error) for rank, (error, _) in _failures(failed))
            raise RunError(f"{writer.folder}: the checkpoint cannot be written: {told}") from failed

    def load(self, tensors: Mapping[str, Tensor], reader: Reader) -> None:
        """Fill tensors from a checkpoint.

        Raises:
            InputError: it cannot be read, on whichever rank.
        """
        quiet()
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            dcp.load(
                dict(tensors), storage_reader=reader, planner=planner,
                process_group=self._group, no_dist=self.size == 1,
            )  # fmt: skip
        except CheckpointException as failed:
            told = "; ".join(self._told(rank, error) for rank, (error, _) in _failures(failed))
            raise InputError(f"cannot be read: {told}", file=reader.folder) from failed

    def _told(self, rank: int, error: BaseException) -> str:
        what = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        return what if self.size == 1 else f"rank {rank}: {what}"


def quiet() -> None:
    """Torch warns where a process saves or loads alone, which is as good a way as any.

    Called from the main thread, as filters belong to the process.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or unini")


def in_thread(work: Callable[[], None]) -> Future[None]:
    """Work in a thread that yields to all others, and that no exit of the process waits for."""
    done: Future[None] = Future()

    def run() -> None:
        if sys.platform == "linux":
            with suppress(OSError):  # priorities are a thread's own on Linux alone
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return done


def _failures(failed: CheckpointException) -> list[tuple[int, tuple[BaseException, object]]]:
    return sorted(failed.failures.items(), key=lambda item: item[0])
