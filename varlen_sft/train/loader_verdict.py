"""Whether a run waits for its loader: its log against a mock run of the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.train.bare import WARM_UP, Speed, speed, warm
from varlen_sft.train.run_log import RunLog, read_run_log
from varlen_sft.train.state import StepRecord
from varlen_sft.words import listed

__all__ = ["verdict"]

LOG = "log.jsonl"
NEAR = 0.95
"""Of the speed of mock data: above it a loader costs less than two runs differ by themselves."""
_COMMON = 5
"""Steps that both runs have and that are enough to compare them alone: they hold the same packs."""
_FREE = (
    "data.mock", "data.valid", "data.cache", "data.processes", "data.on_error", "stream.threads",
    "stream.weights",
)  # fmt: skip
"""Keys of these groups that change no step's shapes, or are what a loader may be mended by."""
_GROUPS = ("model.", "data.", "stream.", "dist.strategy", "stages")


def verdict(mock: Sequence[StepRecord], header: Mapping[str, Any], out: Path, *, held: int) -> str:
    """One sentence: both speeds, how long the real run waited, and what slows it down if anything.

    Args:
        mock: records of the mock run, at least one.
        header: of its log: ``config`` by path, ``ranks`` and ``device``.
        out: folder of the run, whose log is read if it is there.
        held: steps of the mock run that hold the packs of the run's steps of the same numbers.

    Raises:
        InputError: there is a file of that name that is no log of a run.
    """
    used = warm(mock)
    alone = _speed(used)
    begins = f"mock data {alone.tokens_per_s:,.0f} real tokens/s"
    log = _log(out / LOG)
    real = {} if log is None else _newest(log)
    if log is None or not real or _differences(header, log.header):
        return f"{begins}; {_missing(header, out / LOG, log)}"
    both = [record for record in used if record.step in real and record.step <= held]
    if len(both) >= _COMMON:
        return f"{begins}, {_compared(_speed(both), _logged([real[r.step] for r in both]))}"
    return f"{begins}, {_compared(alone, _logged(list(real.values())))}"


def _compared(mock: Speed, real: Speed) -> str:
    share = real.tokens_per_s / mock.tokens_per_s
    told = (
        f"the run's own data {real.tokens_per_s:,.0f} ({share:.0%}), of whose time the loader was "
        f"waited for {real.stall:.1%}: "
    )
    if share * NEAR > 1:
        return told + "no loader makes a run faster, so other work disturbed one of the two: repeat"
    if share >= NEAR:
        return told + "the loader is not the bottleneck"
    if real.stall >= (1 - share) / 2:
        return told + "the loader is the bottleneck; stream.threads or a faster disk would help"
    return told + (
        "the run is slower, but not by waiting for its loader; threads that load, or other work, "
        "may take its processor's time"
    )


def _missing(header: Mapping[str, Any], path: Path, log: RunLog | None) -> str:
    """Why there is nothing to compare with."""
    if log is None:
        return f"{path} has no run to compare it with: train some steps, then do this again"
    if names := _differences(header, log.header):
        return f"the run in {path} is not compared, since it had other {listed(names)}"
    return f"{path} has too few steps of the run to compare it with"


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What decides the work of a step, or who does it, and is not the same."""
    ours, theirs = one["config"], other.get("config", {})
    keys = [key for key in ours if key.startswith(_GROUPS) and key not in _FREE]
    found = [key for key in keys if ours[key] != theirs.get(key)]
    return found + [name for name in ("ranks", "device") if one[name] != other.get(name)]


def _log(path: Path) -> RunLog | None:
    """None where there is none."""
    return read_run_log(path) if path.is_file() else None


def _newest(log: RunLog) -> dict[int, Mapping[str, Any]]:
    """Steps by number, of the last sitting that has some after its first ones."""
    ends: float = math.inf
    for begins in reversed([0, *log.went_on]):
        steps = [step for step in log.steps if begins + WARM_UP < step["step"] <= ends]
        if steps:
            return {step["step"]: step for step in steps}
        ends = begins
    return {}


def _speed(records: Sequence[StepRecord]) -> Speed:
    return speed(
        [record.real_tokens for record in records],
        [record.step_time_s for record in records],
        [record.stall_s for record in records],
    )


def _logged(steps: Sequence[Mapping[str, Any]]) -> Speed:
    names = ("real_tokens", "step_time_s", "stall_s")
    return speed(*([step[name] for step in steps] for name in names))
