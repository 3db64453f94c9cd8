"""SIGTERM and Ctrl-C as a request: finish the step, save, end well, and say how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

__all__ = ["StopRequest", "resume_command"]

_ECHO_S = 2.0
"""A launcher sends on what the terminal has sent to all: within that time a signal is the same."""


class StopRequest:
    """While its context lasts, the first SIGTERM or Ctrl-C only sets a flag, which a call reads.

    It is this process's own: ranks agree on the step to end after in the reduction of a step, as
    ``Loop.run(stop=...)`` does. A second Ctrl-C, not right after the first, ends at once; a second
    SIGTERM changes nothing, as whoever is out of patience sends SIGKILL.

    Args:
        saves: whether the run saves before it ends, as it promises then.

    Attributes:
        signal: the one that came.

    Raises:
        ValueError: entered in another thread than the main one, which alone can get signals.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self._does = "finished and saved" if saves else "finished"
        self.signal: signal.Signals | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether somebody has asked."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopRequest must be entered in the main thread")
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._at = signal.Signals(number), now
            again = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            line = f"\n{self.signal.name}: the step is {self._does}, then the run ends{again}"
            os.write(2, f"{line}\n".encode())
        elif number == signal.SIGINT and now - self._at > _ECHO_S:
            raise KeyboardInterrupt


def resume_command(
    arguments: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What to type to start this command again, as it was started.

    Args:
        arguments: of the process, its name first; ``sys.argv`` if None.
        environment: in which torchrun leaves what it was asked for; this process's if None.

    Returns:
        A line for a shell. What torchrun was told about several machines it cannot know, and leaves
        three dots in its place.
    """
    name, *rest = sys.argv if arguments is None else arguments
    environment = os.environ if environment is None else environment
    program = [os.path.basename(name)]
    if name.endswith(".py"):
        program = ["python", "-m", "varlen_sft.cli"]
    if "TORCHELASTIC_RUN_ID" not in environment:
        return shlex.join([*program, *rest])
    launcher = ["torchrun", f"--nproc-per-node={environment['LOCAL_WORLD_SIZE']}"]
    machines = environment["GROUP_WORLD_SIZE"]
    if machines != "1":
        launcher += [f"--nnodes={machines}", "..."]
    return shlex.join([*launcher, "-m", "varlen_sft.cli", *rest])
