"""How far a run has come, and what each of its steps did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from varlen_sft.errors import InputError

__all__ = ["StepRecord", "TrainState"]


@dataclass(frozen=True)
class StepRecord:
    """What one step did, over all ranks and micro-batches."""

    step: int  # from 1
    loss: float  # weighted mean over supervised tokens; 0 where nothing is supervised
    grad_norm: float  # before clipping; 0 where nothing was updated
    lr: float
    real_tokens: int
    supervised_tokens: int
    fill: float  # real tokens over the capacity of the step's packs
    step_time_s: float
    seconds_left: float
    epoch: int = 0
    sequences: int = 0
    squares: int = 0  # sum of the squares of the sequences' lengths: what attention costs
    weight: float = 0.0  # sum of the weights of supervised tokens, what the loss is divided by
    updated: bool = True  # False: nothing in the step was supervised, no weight moved
    stall_s: float = 0.0  # the longest wait of a rank for its batches, part of step_time_s
    role_loss: dict[str, float] = field(default_factory=dict)  # of the targets of each role
    stop_loss: float | None = None  # of the tokens that end an answer; None: none in the step
    tflops: float | None = None  # TFLOP/s of all ranks, see flops.step_flops; None: not known
    naive_tflops: float | None = None  # the same by flops.naive_flops
    mfu: float | None = None  # share of the devices' peak that tflops is; None: peak not known
    peak_memory: int = 0  # bytes so far, of the rank that took most; on a CPU of its process

    @property
    def real_tokens_per_s(self) -> float:
        return self.real_tokens / self.step_time_s

    @property
    def supervised_tokens_per_s(self) -> float:
        return self.supervised_tokens / self.step_time_s

    @property
    def stall(self) -> float:
        """Share of the step in which its batches were waited for."""
        return self.stall_s / self.step_time_s


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come; the same on all ranks. Part of a checkpoint (torch's Stateful)."""

    step: int = 0
    """Steps of the stream that are behind, those that updated nothing among them."""
    epoch: int = 0
    """Of the last step."""
    real_tokens: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    """Steps in which nothing was supervised: no update was made."""
    seconds: float = 0.0
    """Spent in steps, over all sittings of the run."""

    def add(self, record: StepRecord) -> None:
        """Count a step that is done."""
        self.step = record.step
        self.epoch = record.epoch
        self.real_tokens += record.real_tokens
        self.supervised_tokens += record.supervised_tokens
        self.skipped_steps += not record.updated
        self.seconds += record.step_time_s

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the numbers of ``state_dict``.

        Raises:
            InputError: a number is missing, unknown, negative, or of another type.
        """
        names = {field.name for field in fields(self)}
        if set(state) != names:
            raise InputError(
                f"the state of a run must hold {', '.join(sorted(names))}, "
                f"holds {', '.join(sorted(state)) or 'nothing'}"
            )
        for name in names:
            kind = type(getattr(TrainState, name))
            if type(state[name]) is not kind or not state[name] >= 0:
                raise InputError(
                    f"{name} of a run's state must be a {kind.__name__} of at least 0, "
                    f"is {state[name]!r}"
                )
        for name in names:
            setattr(self, name, state[name])
