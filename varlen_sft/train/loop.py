"""The training loop: steps in, one optimiser update each, a record of every step out.

Nothing in it waits for a device: the sums of a step are reduced, used and kept on the device, and
read while the next step is under way. So records come one step late, and what has to be known at
once, that a step must not move weights, is decided on the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from varlen_sft.data.stream_step import Step
from varlen_sft.errors import RunError
from varlen_sft.train.flops import Rates, StepWork
from varlen_sft.train.memory import peak_memory
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel, evaluate_steps
from varlen_sft.train.state import StepRecord, TrainState
from varlen_sft.train.sums import MICRO_BATCH, StepSums, host_sums, micro_batch_sums
from varlen_sft.types import LossOutput

__all__ = ["Ended", "Loop", "NotFinite", "evaluate_steps", "mean_loss"]

Ended = Literal["finished", "asked", "no more steps"]
"""Why a run ended: its options say so, somebody asked for it, or the steps ran out."""


class NotFinite(RunError):
    """The loss or the gradient became NaN or infinite; weights are those before the step."""


class _Launched(NamedTuple):
    """A step whose work is done or under way, and whose numbers nobody has read."""

    number: int
    epoch: int
    lr: float
    packs: int
    numbers: Tensor  # (n,) fp64 on the host, once ``ready``: of StepSums, and the gradient's norm
    ready: torch.cuda.Event | None
    step_time_s: float


class Loop:
    """Steps of one run, on one of its ranks.

    Args:
        parallel: the model, and the ranks that share it.
        optimizer: of that model.
        options: length of the run, learning rate, clipping.
        capacity: tokens that the packs of a step can hold, of all ranks, for ``fill``.
        state: where the run is; the loop keeps it up to date.
        work: of the steps, for TFLOP/s; None: not known.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: MasterAdamW,
        options: TrainOptions,
        *,
        capacity: int,
        state: TrainState | None = None,
        work: StepWork | None = None,
    ) -> None:
        self.state, self._work = state or TrainState(), work
        self._parallel, self._optimizer, self._options = parallel, optimizer, options
        self._world, self._capacity = parallel.world, capacity
        self._launched = self.state.step
        self._seconds = self._agreed_seconds = self.state.seconds
        self._steps_before, self._seconds_before = self.state.step, self.state.seconds
        self._began, self._stopped = 0.0, False
        self._bad = torch.zeros((), dtype=torch.bool, device=self._world.device)
        parallel.reduce_with(optimizer.sums)

    def run(
        self,
        steps: Iterable[Step],
        *,
        on_step: Callable[[StepRecord], None] = lambda record: None,
        every: Sequence[tuple[int, Callable[[TrainState], None]]] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> Ended:
        """Train until the options say stop, somebody asks for it, or the steps end.

        Args:
            steps: this rank's part of each step; ``PackStream`` is one. A step is asked for only
                when all before it are counted, so its position is right whenever ``every`` runs.
            on_step: called with the record of each step, one step late, on every rank.
            every: (n, action): after each n-th step of the run an action gets the state, on all
                ranks, with every step read and its record given out.
            stop: asked in every step, on every rank, and never waited for. If one rank says yes,
                all end after the same step, the next one.

        Raises:
            NotFinite: the loss or the gradient is NaN or infinite, on every rank. No weight has
                moved in that step, nor after it.
            RankLost: a rank does not answer on GPUs; on CPUs it is ``world()`` that says so.
        """
        self._stopped, pending, each = False, None, iter(steps)
        self._parallel.model.train()
        self._began = asked = time.perf_counter()
        while (ended := self._ended()) is None:
            step = next(each, None)
            if step is None:
                ended = "no more steps"
                break
            launched = self._launch(step, stop(), time.perf_counter() - asked)
            self._read(pending, on_step)
            pending = launched
            due = [action for n, action in every if launched.number % n == 0]
            if due:
                self._read(pending, on_step)
                pending = None
                self._act(due)
            asked = time.perf_counter()
        self._read(pending, on_step)
        return ended

    def _ended(self) -> Ended | None:
        """From numbers that are the same on all ranks."""
        if self._options.progress(self._launched, self._agreed_seconds) >= 1:
            return "finished"
        return "asked" if self._stopped else None

    def _act(self, actions: Sequence[Callable[[TrainState], None]]) -> None:
        for action in actions:
            action(self.state)
        self._parallel.model.train()
        self._began = time.perf_counter()  # their time is no step's

    def _launch(self, step: Step, stop: bool, stall_s: float) -> _Launched:
        options = self._options
        lr = options.rate(options.progress(self._launched, self._agreed_seconds))
        sums = self._reduced(step, self._backward(step), stop, stall_s)
        self._bad = self._bad | ~torch.isfinite(sums[0])
        norm = self._optimizer.step(lr, options.max_grad_norm, divisor=sums[1], skip=self._bad)
        self._bad = self._bad | ~torch.isfinite(norm)
        numbers, ready = _to_host(torch.cat([sums, norm.double()[None]]))
        self._launched += 1
        spent = time.perf_counter() - self._began
        self._began += spent
        self._seconds += spent
        return _Launched(
            self._launched, step.epoch, lr, len(step.packs), numbers, ready, spent
        )  # fmt: skip

    def _backward(self, step: Step) -> Tensor:
        """Leave the gradients of the step, and add up ``micro_batch_sums`` of this rank."""
        sums = torch.zeros(MICRO_BATCH, dtype=torch.float64, device=self._world.device)
        for number, given in enumerate(step.batches, 1):
            last, batch = number == len(step.batches), self._parallel.here(given)
            with self._parallel.micro_batch(last=last):
                output = self._parallel.loss(batch)
                output.loss_sum.backward()
            if not last:
                self._optimizer.sums.add(self._optimizer.parameters)
            sums += micro_batch_sums(output, batch)
        return sums

    def _reduced(self, step: Step, sums: Tensor, stop: bool, stall_s: float) -> Tensor:
        """``StepSums`` of the step as numbers, (n,) fp64: the one reduction."""
        here = self._world
        known = host_sums(
            step.counts,
            seconds=self._seconds + time.perf_counter() - self._began if here.is_first else 0.0,
            stop=stop,
            own=(stall_s, peak_memory(here.device)),
            rank=here.rank,
            ranks=here.size,
        )
        if sums.is_cuda:
            known = known.pin_memory()
        return here.sum(torch.cat([sums, known.to(sums.device, non_blocking=True)]))

    def _read(self, launched: _Launched | None, on_step: Callable[[StepRecord], None]) -> None:
        """Wait for the numbers of a step, and make them known."""
        if launched is None:
            return
        if launched.ready is not None:
            self._world.wait(launched.ready)
        *values, norm = launched.numbers.tolist()
        sums = StepSums.of(values)
        if not (math.isfinite(sums.mean) and math.isfinite(norm)):
            raise NotFinite(
                f"step {launched.number}: the loss is {sums.mean} and the gradient's norm {norm}; "
                "weights are those before the step"
            )
        self._agreed_seconds, self._stopped = sums.seconds, self._stopped or sums.stop > 0
        record = self._record(launched, sums, norm)
        self.state.add(record)
        on_step(record)

    def _record(self, launched: _Launched, sums: StepSums, norm: float) -> StepRecord:
        per_step = (self._seconds - self._seconds_before) / (self._launched - self._steps_before)
        return StepRecord(
            step=launched.number,
            loss=sums.mean,
            grad_norm=norm,
            lr=launched.lr,
            real_tokens=sums.tokens,
            supervised_tokens=sums.supervised,
            fill=sums.tokens / self._capacity,
            step_time_s=launched.step_time_s,
            seconds_left=self._options.seconds_left(launched.number, sums.seconds, per_step),
            epoch=launched.epoch,
            sequences=sums.sequences,
            squares=sums.squares,
            weight=sums.weight,
            updated=sums.weight > 0,
            stall_s=sums.stall_s,
            role_loss=sums.role_loss,
            stop_loss=sums.stop_loss,
            peak_memory=sums.peak_memory,
            **self._rates(launched, sums)._asdict(),
        )

    def _rates(self, launched: _Launched, sums: StepSums) -> Rates:
        if self._work is None:
            return Rates()
        return self._work.rates(
            launched.step_time_s,
            tokens=sums.tokens,
            squares=sums.squares,
            supervised=sums.supervised,
            pairs=sums.pairs,
            packs=launched.packs,
        )


def mean_loss(outputs: Sequence[LossOutput]) -> Tensor:
    """Weighted mean over all micro-batches: the sum of sums over the sum of weights, () fp32.

    Never a mean of means, in which a token of a sparsely supervised micro-batch would count more.
    Without any weight it is 0.
    """
    loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
    weight_sum = torch.stack([output.weight_sum for output in outputs]).sum()
    return loss_sum / weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny)


def _to_host(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and what to wait for before it is read."""
    if not numbers.is_cuda:
        return numbers, None
    host = torch.empty_like(numbers, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready
