"""The processes of a run: how they find each other, and what is said when one of them is gone.

One process needs no process group, and no line of this file knows a special case for it but
``World.sum``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from varlen_sft.errors import InputError, RunError

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["RankLost", "World", "start_world", "world"]

TIMEOUT_S = 50.0
"""How long a rank waits for the others; with ``_GRACE_S`` a dead one is named within a minute."""
_GRACE_S = 3.0
_WATCHDOG_S = 30.0  # later than our own error
_POLL_S = 5e-4
_SIGNS = ("gloo", "nccl", "by peer", "pair closure", "timeout", "timed out", "broken pipe",
          "connection refused", "socket")  # fmt: skip


class RankLost(RunError):
    """Another rank of the run is gone, or does not answer."""


@dataclass(frozen=True, eq=False)
class World:
    """The processes of a run, and which of them this is."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    store: Store | None = None  # shared notes; None if alone
    timeout_s: float = TIMEOUT_S

    @property
    def is_first(self) -> bool:
        """Who writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up over all ranks, in place; in stream order, the host does not wait for a GPU."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.size > 1:
            torch.distributed.barrier()

    def wait(self, ready: torch.cuda.Event) -> None:
        """Wait for what a device computes; without a device nothing has to be waited for.

        Raises:
            RankLost: it did not come within the timeout. On GPUs nothing else tells this process:
                NCCL's own watchdog would end it without an exception.
        """
        deadline = time.monotonic() + self.timeout_s
        while not ready.query():
            if self.size > 1 and time.monotonic() > deadline:
                self._note("waiting")
                late = TimeoutError(f"a step is not done after {self.timeout_s:g} s")
                raise RankLost(self._told(late))
            time.sleep(_POLL_S)

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn what a backend says when a peer is gone into RankLost, with what is known of it.

        A rank that ends with an error of its own leaves a note of it first.
        """
        try:
            yield
        except BaseException as error:
            if self.size == 1 or isinstance(error, RankLost):
                raise
            if not _is_communication(error):
                self._note(f"ended with {type(error).__name__}: {error}")
                raise
            self._note("waiting")
            raise RankLost(self._told(error)) from error

    def _note(self, text: str) -> None:
        if self.store is not None:
            with suppress(RuntimeError):  # its holder may be the one that is gone
                self.store.set(f"rank {self.rank}", text)

    def _told(self, error: BaseException) -> str:
        lost = self._lost()
        what = "; ".join(f"rank {rank} {note}" for rank, note in lost.items())
        what = what or "another rank does not answer"
        line = str(error).strip().splitlines()[-1].split(". This is ")[0]
        return f"rank {self.rank} of {self.size} cannot go on: {what} ({line})"

    def _lost(self) -> Mapping[int, str]:
        """What is known of the ranks that are not waiting as this one is."""
        deadline = time.monotonic() + _GRACE_S
        others = [rank for rank in range(self.size) if rank != self.rank]
        notes: dict[int, str] = {}
        while self.store is not None and len(notes) < len(others) and time.monotonic() < deadline:
            time.sleep(0.1)
            try:
                for rank in others:
                    if rank not in notes and self.store.check([f"rank {rank}"]):
                        notes[rank] = self.store.get(f"rank {rank}").decode()
            except RuntimeError:
                return {}
        said = {rank: notes.get(rank, "gives no sign of life") for rank in others}
        return {rank: note for rank, note in said.items() if note != "waiting"}


@contextmanager
def world(timeout_s: float = TIMEOUT_S, device: torch.device | None = None) -> Iterator[World]:
    """The world of a run, left in good order or with the rank named that is gone.

    Raises:
        InputError: of ``start_world``.
        RankLost: another rank is gone.
    """
    started = start_world(timeout_s, device)
    try:
        with started.naming_lost_ranks():
            yield started
    except BaseException:
        if started.device.type != "cuda":  # NCCL would wait for what never comes
            _leave(started)
        raise
    _leave(started)


_left: list[object] = []
"""Groups of worlds that were left. DDP's C++ side holds its group and, being the last to let go of
it, would wait for the group's threads without giving up the interpreter's lock, which such a thread
may need to drop a tensor: a deadlock. Python's own references give up the lock first."""


def _leave(started: World) -> None:
    if started.size > 1:
        _left.append(torch.distributed.group.WORLD)
        with suppress(RuntimeError):  # of peers that are gone
            torch.distributed.destroy_process_group()


def start_world(timeout_s: float = TIMEOUT_S, device: torch.device | None = None) -> World:
    """Join the ranks that torchrun started; alone without torchrun, or where it started one.

    Args:
        timeout_s: seconds to wait for other ranks, at the start and in every step. On GPUs, whose
            work the host runs ahead of, two steps have to fit.
        device: of this rank; by default the GPU of its local rank where there are GPUs, else the
            CPU. NCCL connects GPUs, gloo CPUs.

    Raises:
        InputError: the environment is none that torchrun makes, or the ranks do not come together.
    """
    size = _number("WORLD_SIZE", 1)
    device = device or _device(_number("LOCAL_RANK", 0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size == 1:
        return World(device=device)
    from torch import distributed

    rank = _number("RANK", None)
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    wait = timedelta(seconds=timeout_s + (_WATCHDOG_S if on_gpu else 0))
    try:
        store, _, _ = next(distributed.rendezvous("env://", rank, size, timeout=wait))
        shared = distributed.PrefixStore("ranks", store)
        distributed.init_process_group(
            backend, store=distributed.PrefixStore("group", store), rank=rank, world_size=size,
            timeout=wait, device_id=device if on_gpu else None,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"rank {rank} of {size} could not join the others: {reason}. Start with torchrun"
        ) from error
    shared.set_timeout(timedelta(seconds=_GRACE_S))
    return World(rank, size, device, shared, timeout_s)


def _number(name: str, default: int | None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise InputError(
            f"the environment must have {name} as torchrun sets it, a whole number, has {value!r}"
        )
    return int(value)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"rank {local_rank} of this machine needs a GPU of its own, "
            f"there are {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def _is_communication(error: BaseException) -> bool:
    """Whether a backend says that it cannot reach a peer; it says so in RuntimeErrors of many
    words, torch's own classes for it being raised in some places only."""
    from torch import distributed

    if isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return type(error) is RuntimeError and any(sign in text for sign in _SIGNS)
