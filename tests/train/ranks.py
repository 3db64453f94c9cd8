"""Runs a function on several ranks, each a process on this machine, joined by gloo."""

from __future__ import annotations

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "tests.train.runs"]


def on_ranks(size: int, work: Callable[..., Any], *args: Any, wait_s: float = 90) -> list[Any]:
    """What ``work(*args)`` returned on each rank: None where the rank died without a word.

    An exception comes back as a pair of its class's name and its text.
    """
    context = multiprocessing.get_context("forkserver")  # torch is imported once for all
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, rank, size, port, work, args))
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results = [_result(ours, wait_s) for _, ours in ranks]
    for process, _ in ranks:
        process.join(10)
        process.kill()
    return results


def _result(pipe: Connection, wait_s: float) -> Any:
    if not pipe.poll(wait_s):
        return ("Hung", f"no result within {wait_s} s")
    try:
        return torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
    except EOFError:
        return None


def _rank(
    pipe: Connection, rank: int, size: int, port: int, work: Callable[..., Any], args: tuple
) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        result = work(*args)
    except Exception as error:
        traceback.print_exc()
        result = (type(error).__name__, str(error))
    buffer = io.BytesIO()
    torch.save(result, buffer)
    pipe.send_bytes(buffer.getvalue())
