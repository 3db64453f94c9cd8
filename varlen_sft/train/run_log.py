"""A run's log read again: of each step what was made of it last.

Each line is an event, by its name:

============== ===================================================================================
``start``      config, ranks, steps, device, date, versions and data, see ``header.log_header``
``resume``     step: of the checkpoint that it goes on from
``step``       all fields of ``state.StepRecord``
``validation`` step, loss on what is held out, seconds
``samples``    step, seconds, samples: source, sample (its number there), prompt, asked (the last
               thing said in it), answer (held out), said (by the model), exact (both are one)
============== ===================================================================================

A run that was killed and went on has done some steps twice: those after its last checkpoint were
undone, and what the log says of them before the run went on does not count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from varlen_sft.errors import InputError

__all__ = ["RunLog", "read_run_log"]

_KINDS = {"step": "steps", "validation": "validations", "samples": "samples"}
"""Events that belong to a step, and where they are kept."""


@dataclass
class RunLog:
    """What counts of a log; events without their names, see ``StepRecord`` for steps.

    Args:
        header: of the newest start.
        steps: one for each step, rising.
        validations: loss and seconds, one for each step that had one.
        samples: "samples" and seconds, one for each step that had them.
        went_on: steps after which the run was gone on with.
        unreadable: lines that are no JSON object, such as the last one of a killed run.
    """

    header: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    went_on: list[int] = field(default_factory=list)
    unreadable: int = 0

    def undo(self, step: int) -> None:
        """Forget what came after a step."""
        for name in _KINDS.values():
            kept = [event for event in getattr(self, name) if event["step"] <= step]
            setattr(self, name, kept)
        self.went_on = [after for after in self.went_on if after <= step]

    def add(self, name: str, event: dict[str, Any]) -> None:
        """Take an event that belongs to a step, instead of one of the same step."""
        events = getattr(self, _KINDS[name])
        if events and events[-1]["step"] == event["step"]:
            events.pop()
        events.append(event)


def read_run_log(path: Path) -> RunLog:
    """Read ``OUT/log.jsonl``, also while the run goes on.

    Raises:
        InputError: it cannot be read, or is no log of a run.
    """
    log, begun, starts = RunLog(), False, 0
    for event in _events(path, log):
        name = event.pop("event", None)
        if name == "start":
            log.header, begun, starts = event, True, starts + 1
        elif name == "resume":
            log.undo(event["step"])
            log.went_on.append(event["step"])
            begun = False
        elif name in _KINDS:
            if begun:  # it did not go on with anything, but from the beginning
                log.undo(0)
                begun = False
            log.add(name, event)
    if not starts:
        raise InputError("is no log of a run: it has no start", file=path)
    return log


def _events(path: Path, log: RunLog) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                event = _event(line)
                if event is not None:
                    yield event
                elif line.endswith("\n"):  # else it is being written
                    log.unreadable += 1
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None


def _event(line: str) -> dict[str, Any] | None:
    """The object of a line; None if it is none, or half of one."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    known = isinstance(event, dict) and (event.get("event") not in (*_KINDS, "resume")
                                         or type(event.get("step")) is int)  # fmt: skip
    return event if known else None
