"""Small runs of the loop that tests start on one rank or several."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.helpers import random_samples, tiny_hf_config, tiny_model
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.stream import Counts, OrderOptions, PackStream, Step, StreamOptions
from varlen_sft.data.stream_step import idle
from varlen_sft.errors import InputError
from varlen_sft.train.distributed import World, world
from varlen_sft.train.loop import Loop, NotFinite
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel, evaluate_steps, shard
from varlen_sft.train.state import StepRecord
from varlen_sft.types import LossOutput

LENGTHS = np.random.default_rng(3).integers(2, 34, 29).tolist()
"""Three steps of four packs of 32 rows each epoch, and a last one in which a rank has nothing."""
EPS = 1e-4
"""Of AdamW: where |g| is far below it an update is lr * g / eps, so rounding of g is not blown up
to a whole lr, as it is for a g that is nothing but rounding."""


class InMemory:
    """A source of samples, some weights of which are fractions."""

    fingerprint = "in memory"

    def __init__(self, samples: list[Sample]) -> None:
        self.samples = samples
        self.lengths = np.array([len(sample) for sample in samples], np.int32)
        self.supervised = np.array([int((s.token_weights[1:] > 0).sum()) for s in samples])

    def sample(self, i: int) -> Sample:
        return self.samples[i]


def stream(here: World, accumulate: int, lengths: list[int] = LENGTHS) -> PackStream:
    """This rank's part of steps of four packs."""
    return PackStream(
        [InMemory([spoken(sample) for sample in random_samples(lengths)])],
        OrderOptions(max_tokens=32, packs_per_step=4, balance_steps=2),
        StreamOptions(rank=here.rank, ranks=here.size, accumulate=accumulate, workers=0),
    )


def spoken(sample: Sample) -> Sample:
    """The same, said by user and assistant in turns of four tokens."""
    turns = np.repeat([ROLES.index("user"), ROLES.index("assistant")], 4)
    return replace(sample, roles=np.resize(turns, len(sample)).astype(np.uint8))


def build(
    here: World, strategy: str, dtype: torch.dtype, options: TrainOptions, score: Any = None
) -> Loop:
    """A tiny tied Llama, the same on every rank."""
    llama = tiny_model(tiny_hf_config(tie_word_embeddings=True), dtype).to(here.device)
    shard(llama, here, strategy)
    optimizer = MasterAdamW(llama, weight_decay=0.1, eps=EPS)
    return Loop(Parallel(llama, here, strategy, score=score), optimizer, options, capacity=128)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().clone()


def train(
    here: World,
    strategy: str,
    accumulate: int,
    dtype: torch.dtype = torch.float64,
    *,
    steps: int = 5,
    max_norm: float = 1e9,
    blank: int = 0,
    act: Callable[[], None] = lambda: None,
    act_before: int = 0,
    **run: Any,
) -> dict[str, Any]:
    """Records, weights and moments of a run; its error's class and text if it ends with one.

    Args:
        blank: number of the step in which nothing is supervised.
        act, act_before: something that is done before a step.
        run: of ``Loop.run``, and ``score`` of ``Parallel``.
    """
    options = TrainOptions(max_steps=steps, lr=1e-2, max_grad_norm=max_norm)
    loop = build(here, strategy, dtype, options, run.pop("score", None))
    records: list[StepRecord] = []
    data = stream(here, accumulate)
    try:
        ended: Any = loop.run(changed(data, blank, act, act_before), on_step=records.append, **run)
    except NotFinite as error:
        ended = type(error).__name__, str(error)
    state = loop._optimizer.state_dict()
    return {
        "ended": ended,
        "records": records,
        "state": loop.state,
        "position": data.state_dict(),
        "valid": evaluate_steps(loop._parallel, [data.step(0), data.step(3)]),
        "weights": {n: whole(p) for n, p in loop._parallel.model.state_dict().items()},
        "masters": {n: whole(p) for n, p in state["masters"].items()},
        "exp_avg": {n: whole(p) for n, p in state["exp_avg"].items()},
        "updates": state["updates"],
    }


def many(cases: list[tuple[tuple, dict]], timeout_s: float = 30) -> list[dict[str, Any]]:
    """Several runs in the same processes."""
    with world(timeout_s) as here:
        return [train(here, *args, **kwargs) for args, kwargs in cases]


def changed(
    steps: Iterable[Step], blank: int, act: Callable[[], None], act_before: int
) -> Iterator[Step]:
    for number, step in enumerate(steps, 1):
        if number == act_before:
            act()
        if number == blank:
            nothing = collate([idle(StreamOptions())])
            count = len(step.batches)
            step = replace(step, batches=(nothing,) * count, counts=(Counts(),) * count)
        yield step


def on_rank(rank: int, act: Callable[[], None]) -> None:
    if os.environ.get("RANK", "0") == str(rank):
        act()


def die() -> None:
    os.kill(os.getpid(), 9)


def hang() -> None:
    time.sleep(9)
    die()


def fail() -> None:
    raise InputError("no such row", file="chats.jsonl", row=7)


class NanOnRank1:
    """The loss of the second rank's third step is NaN."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: torch.nn.Module, batch: PackedBatch) -> LossOutput:
        output = module(batch)
        if not torch.is_grad_enabled():
            return output
        self.calls += 1
        spoil = self.calls == 5 and os.environ.get("RANK") == "1"
        return output._replace(loss_sum=output.loss_sum * (torch.nan if spoil else 1.0))


class AskedOnRank1:
    """Somebody asks the second rank to stop, in one of its steps."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self) -> bool:
        self.calls += 1
        return self.calls == self.step and os.environ.get("RANK") == "1"


class OneWeight(torch.nn.Module):
    """loss = weight * x."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False)])

    def forward(self, batch: Any) -> LossOutput:
        zero = torch.zeros(1)
        loss = self.layers[0](batch.input_ids).sum()
        return LossOutput(loss, torch.ones(()), zero, zero, zero.bool(), zero)


def summed(strategy: str, xs: list[list[float]]) -> float:
    """The gradient's norm after micro-batches of these x on each rank, in bf16."""
    with world(timeout_s=30) as here:
        model = OneWeight().bfloat16()
        shard(model, here, strategy)
        optimizer = MasterAdamW(model)
        parallel = Parallel(model, here, strategy)
        parallel.reduce_with(optimizer.sums)
        for at, x in enumerate(xs[here.rank]):
            last = at == len(xs[here.rank]) - 1
            with parallel.micro_batch(last=last):
                batch = SimpleNamespace(input_ids=torch.tensor([x], dtype=torch.bfloat16))
                parallel.loss(batch).loss_sum.backward()
            if not last:
                optimizer.sums.add(optimizer.parameters)
        return float(optimizer.step(1e-3, 1e9))


def whole_blocks(strategy: str) -> list[bool]:
    """Whether this rank holds a block's weights whole, at points of a step and after it."""
    from torch.distributed.tensor import DTensor

    with world() as here:
        model = tiny_model(tiny_hf_config(), torch.float32)
        shard(model, here, strategy)
        parallel, batch = Parallel(model, here, strategy), collate(random_samples([5, 9]))
        block = model.layers[0].mlp.down_proj

        def is_whole() -> bool:
            return not isinstance(block.weight, DTensor)

        found = []
        for last in (False, True):
            with parallel.micro_batch(last=last):
                loss = parallel.loss(batch).loss_sum
                found.append(is_whole())
                loss.backward()
                found.append(is_whole())
        parallel.evaluate(batch)
        return [*found, is_whole()]
