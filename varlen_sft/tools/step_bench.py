"""Time, memory and loss of one training step, candidate beside candidate from one run.

``python -m varlen_sft.tools.step_bench --probe NAME ...`` is one candidate's step in a process of
its own, for its peak memory; ``benchmarks/bench_step.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from varlen_sft.errors import RunError
from varlen_sft.tools.step_candidates import (
    CANDIDATES,
    Candidate,
    Floor,
    HFPacked,
    HFPadded,
    Load,
    Ours,
    chat_like_lengths,
    chat_like_samples,
)
from varlen_sft.train.memory import keep_freed_memory

__all__ = ["CANDIDATES", "Candidate", "Floor", "HFPacked", "HFPadded", "Load", "Ours"]
__all__ += ["LossesDisagree", "chat_like_lengths", "chat_like_samples", "check_losses"]
__all__ += ["first_losses", "fp32_loss", "interleaved", "peak_memory", "probe"]
__all__ += ["summary"]

Progress = Callable[[str], None]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FP32_RELATIVE = 1e-5
"""What the package promises of fp32, see DESIGN.md."""


class LossesDisagree(RunError):
    """Candidates computed different losses: their times are not those of the same work."""


def first_losses(candidates: Mapping[str, Candidate], progress: Progress) -> dict[str, float]:
    """Loss of one step of each candidate that has one. It warms all of them up as well."""
    losses = {}
    for name, candidate in candidates.items():
        progress(f"first step: {name}")
        losses[name] = candidate.step()
    return {name: loss for name, loss in losses.items() if loss is not None}


def fp32_loss(load: Load) -> float:
    """The loss of HF padded in fp32, whatever the load's dtype: what others are judged against."""
    return HFPadded(replace(load, dtype=torch.float32)).loss_only()


def check_losses(losses: Mapping[str, float], truth: float, dtype: torch.dtype) -> float:
    """Refuse to compare candidates that did not compute the same loss.

    The bound on ``|loss - truth|``, where truth is HF padded in fp32:
    - fp32: 1e-5 of the truth, the package's promise.
    - other dtypes: twice the error that HF padded has in the same dtype, and one rounding to it
      (half an epsilon of the truth): errors of a mean can cancel, so HF's own may be 0 by luck.
      HF's own error counts up to four epsilons: a truth of other work must not widen the bound.

    Returns:
        The bound.

    Raises:
        LossesDisagree: with all losses and the bound.
    """
    if dtype == torch.float32:
        bound = FP32_RELATIVE * abs(truth)
    else:
        eps = torch.finfo(dtype).eps
        own_error = min(abs(losses["hf padded"] - truth), 4 * eps * max(1.0, abs(truth)))
        bound = 2 * own_error + eps / 2 * abs(truth)
    # "not <=" rather than ">": a NaN has to fail.
    wrong = [name for name, loss in losses.items() if not abs(loss - truth) <= bound]
    if wrong:
        table = ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items())
        raise LossesDisagree(
            f"{' and '.join(wrong)} must be within {bound:.2e} of {truth:.7f}, got {table}"
        )
    return bound


def interleaved(
    candidates: Mapping[str, Candidate],
    rounds: int,
    warmup: int = 1,
    progress: Progress = lambda text: None,
    settle: int = 0,
) -> dict[str, list[float]]:
    """Seconds of every step: round by round, each candidate timed once per round.

    Whatever else the machine does then falls on all of them; each round starts with another one, so
    that none always follows the same neighbour. Freed memory is kept for all of them alike.

    Args:
        warmup: rounds that are not timed, before all others.
        settle: untimed steps right before each timed one. In training a step follows its like and
            finds its memory mapped and its weights in the cache; here it would follow a stranger.
    """
    keep_freed_memory()
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            done = turn - warmup + 1
            progress(f"round {done} of {rounds}: {name}" if done > 0 else f"warm-up: {name}")
            gc.collect()
            for _ in range(settle if done > 0 else 0):
                candidates[name].step()
            start = time.perf_counter()
            candidates[name].step()
            if done > 0:
                times[name].append(time.perf_counter() - start)
    return times


def summary(
    candidates: Mapping[str, Candidate],
    losses: Mapping[str, float],
    times: Mapping[str, Sequence[float]],
    real_tokens: int,
) -> list[dict[str, Any]]:
    """One row per candidate: seconds, real tokens/s, its ratios to the floor and to HF padded."""
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {
            "candidate": name,
            "loss": losses.get(name),
            "tokens_computed": candidates[name].tokens,
            "seconds_median": median[name],
            "seconds_min": min(times[name]),
            "seconds_max": max(times[name]),
            "times_floor": median[name] / median["floor"],
            "real_tokens_per_second": real_tokens / median[name],
            "speedup_over_padded": median["hf padded"] / median[name],
        }
        for name in times
    ]


# -------------------------------------------------------------------- memory


def peak_memory(
    name: str,
    load: Load,
    threads: int,
    program: Sequence[str] = ("-m", "varlen_sft.tools.step_bench"),
) -> dict[str, Any]:
    """Peak memory of one step in a fresh process, its start and the loading of the model included.

    Args:
        name: a candidate that ``program`` knows.
        program: what Python runs; it must pass ``--probe`` and what follows to ``probe``.

    Returns:
        What ``probe`` returns.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    dtype = next(key for key, value in DTYPES.items() if value == load.dtype)
    options = {"probe": name, "model": load.model, "dtype": dtype, "tokens": load.tokens}
    options |= {"seed": load.seed, "threads": threads}
    if load.data is not None:
        options["data"] = load.data
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run([sys.executable, *program, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the memory probe of {name!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def probe(candidate: type[Candidate], load: Load) -> dict[str, Any]:
    """Make a candidate and run one step of it in this process.

    Returns:
        loss; before_bytes, resident before the step; peak_bytes, the most this process ever held.
    """
    made = candidate(load)
    before = _resident("VmRSS")
    loss = made.step()
    return {"loss": loss, "before_bytes": before, "peak_bytes": _resident("VmHWM")}


def _resident(field: str) -> int:
    """Bytes. getrusage's ru_maxrss would not do: a child inherits the peak of its parent there."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise RuntimeError("peak memory is read from /proc/self/status, which only Linux has")
    return int(status.read_text().split(f"{field}:")[1].split()[0]) * 1024


# --------------------------------------------------------------- environment


def main(candidates: Mapping[str, type[Candidate]] = CANDIDATES) -> None:
    """Print one JSON line: the step of one candidate, alone in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--probe", required=True, choices=candidates)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--data", type=Path)
    for name, default in (("tokens", 4096), ("seed", 0), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = Load(args.model, DTYPES[args.dtype], args.tokens, args.seed, args.data)
    print(json.dumps({"candidate": args.probe, **probe(candidates[args.probe], load)}))


if __name__ == "__main__":
    main()
