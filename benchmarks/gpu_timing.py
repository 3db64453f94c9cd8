"""Times on a CUDA device, and the roofline that they are fractions of."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from varlen_sft.tools.environment import environment as host_environment

WARM_UP = 3
FLUSH_BYTES = 256 * 2**20  # five times an H100's L2
SLEEP_CYCLES = 4_000_000  # about 2 ms: the host queues a whole candidate meanwhile


def interleaved(
    steps: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each candidate, each once per round, and the bytes that each allocates at most.

    Between CUDA events, with a cold L2; the device first sleeps, so that the host's part of a
    candidate counts only where the device has to wait for it.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    memory = {name: extra_memory(step) for name, step in steps.items()}
    names = list(steps)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in names}
    for turn in range(WARM_UP + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            pair = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)
            pair[0].record()
            steps[name]()
            pair[1].record()
            events[name].append(pair)  # type: ignore[arg-type]
            torch.cuda.synchronize()
    return {name: seconds(pairs[WARM_UP:]) for name, pairs in events.items()}, memory


def seconds(pairs: Sequence[tuple[Any, Any]]) -> list[float]:
    """What CUDA events measure, in ms, as seconds."""
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def extra_memory(step: Callable[[], Any]) -> int:
    """Bytes that a step adds at its peak, after a first run has done what is done once.

    Results of the first run that the second replaces (gradients, say) are not counted.
    """
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine_limits() -> dict[str, float]:
    """Bytes/s of a copy of 1 GiB, read and written, and FLOP/s of an 8192^3 product in bf16."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    steps = {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=out)}
    times, _ = interleaved(steps, rounds=20)
    return {
        "bytes_per_second": 2 * 2**30 / statistics.median(times["copy"]),
        "flops_per_second": 2 * 8192**3 / statistics.median(times["matmul"]),
    }


# ------------------------------------------------------------------- roofline


def share(work: float, seconds: float, per_second: float) -> str:
    """Percent of what the machine can do, of bytes or FLOPs."""
    return f"{work / seconds / per_second:.0%}"


def rope_bytes(tokens: int, heads: int, head_dim: int, itemsize: int, positions: int) -> int:
    """The least of a forward and a backward: heads read and written, ids and tables read."""
    table = 2 * positions * (head_dim // 2) * 4
    return 2 * (2 * tokens * heads * head_dim * itemsize + 8 * tokens + table)


def cross_entropy_bytes(rows: int, vocab: int, itemsize: int) -> int:
    """The least: logits read, their gradient written."""
    return 2 * rows * vocab * itemsize


def head_flops(rows: int, hidden: int, vocab: int) -> int:
    """Three products: logits, gradients of the rows and of the weight."""
    return 3 * 2 * rows * hidden * vocab


def attention_flops(lengths: Sequence[int], heads: int, head_dim: int) -> int:
    """Causal, forward and backward: 2 and 5 products of half an L x L square per head."""
    return sum(7 * length * length * heads * head_dim for length in lengths)


def environment() -> dict[str, Any]:
    """What a table was measured on; no paths and no names of machines."""
    versions = {}
    for package in ("torch", "triton", "liger_kernel", "flash_attn", "trl", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    host = host_environment()
    kept = {key: host[key] for key in ("commit", "date", "cpp_extension")}
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return gpu | {"capability": torch.cuda.get_device_capability()} | kept | {"versions": versions}
