"""Times and memory of whole steps on a CUDA device, or by the host's clock where there is none."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gpu_timing
import torch

Step = Callable[[], Any]


class HostEvent:
    """In the place of a CUDA event where there is no device."""

    at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return (end.at - self.at) * 1e3


def _event(device: str) -> Any:
    return torch.cuda.Event(enable_timing=True) if device == "cuda" else HostEvent()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def forget(device: str) -> None:
    """Give back what freed tensors left in the allocator, so that no candidate lacks it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def interleaved(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each candidate's second step of two in a row, once per round.

    The first finds no cached memory, which no step of a training loop meets but its first; and
    nothing waits between the two, so that the second begins as steps of a loop do.
    """
    names = list(steps)
    pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start, end = _event(device), _event(device)
            forget(device)
            steps[name]()
            start.record()
            steps[name]()
            end.record()
            _wait(device)
            pairs[name].append((start, end))
    return {name: gpu_timing.seconds(found) for name, found in pairs.items()}


class Alone(NamedTuple):
    """What one step tells of itself."""

    loss: float | None
    host_s: float  # until the host has queued it, from an idle device
    extra_bytes: int | None  # added at its peak; None: not known


def alone(step: Step, device: str) -> Alone:
    """Of a step after another one; both have to leave no gradients."""
    forget(device)
    step()
    _wait(device)
    before = 0
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    loss = step()
    host = time.perf_counter() - began
    _wait(device)
    extra = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    return Alone(None if loss is None else float(loss), host, extra)
