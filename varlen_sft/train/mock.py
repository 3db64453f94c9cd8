"""``--mock-data``: the steps of a run on batches that are there already: what does loading cost?

Lengths and weights are those of the prepared sets, where there are any, and packs and steps follow
from lengths alone: step for step it computes what the run would compute, on made-up tokens. No
file, tokenizer or thread is in its way. Nothing is saved, and of the run's folder only the log of
the mock run is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property, partial
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from varlen_sft.data.prepare_plan import vocabulary_size
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.store import Store
from varlen_sft.data.stream import Source, Step
from varlen_sft.train.bare import bare, to_all
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_out import flat
from varlen_sft.train.distributed import World
from varlen_sft.train.header import device_name
from varlen_sft.train.journal import Journal
from varlen_sft.train.loader_verdict import verdict
from varlen_sft.train.loop import Ended
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.setup import Sets, open_stream
from varlen_sft.train.signals import StopRequest
from varlen_sft.train.state import StepRecord

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["MOCK_LOG", "MOCK_STEPS", "Drawn", "HeldSteps", "MockTokens", "held_steps", "run_mock"]

MOCK_LOG = "mock.jsonl"
"""In the run's folder; its schema is that of the run's own log."""
MOCK_STEPS = 50
"""Where the configuration does not say ``run.steps``."""
HELD_TOKENS = 1 << 22
"""Of a rank's batches in memory: about 120 MB. After them they come again from the first on."""
MEDIAN, SIGMA = 400, 1.0
"""Of the log-normal lengths that stand for a set that is not there: those of common chat sets."""


class MockTokens:
    """The samples of a source with other tokens: as long, as much supervised, nothing to learn.

    Args:
        source: whose lengths, weights and roles are taken.
        vocab_size: V; tokens are drawn evenly from it.
    """

    fingerprint = "mock"

    def __init__(self, source: Source, vocab_size: int) -> None:
        self._source, self._vocab_size = source, vocab_size
        self.lengths = source.lengths

    @property
    def supervised(self) -> np.ndarray:
        """(N,) integers, targets of each sample."""
        return self._source.supervised

    def sample(self, i: int) -> Sample:
        """Sample i, the same whenever it is asked for."""
        like = self._source.sample(i)
        ids = np.random.default_rng(i).integers(self._vocab_size, size=len(like), dtype=np.int32)
        return replace(like, input_ids=ids)


class Drawn:
    """Samples of log-normal lengths, the last half of each an answer, where no set is known.

    Args:
        tokens: about so many in all.
        max_tokens: the most rows of a sample.
        seed: of the lengths.
    """

    fingerprint = "drawn"

    def __init__(self, tokens: int, max_tokens: int, seed: int) -> None:
        mean = min(MEDIAN * np.exp(SIGMA**2 / 2), max_tokens)  # at most: lengths are cut to fit
        draw = np.random.default_rng(seed)
        rows = draw.lognormal(np.log(MEDIAN), SIGMA, size=max(1, round(2 * tokens / mean)))
        rows = np.clip(rows, min(8, max_tokens), max_tokens).astype(np.int32)
        enough = int(np.searchsorted(np.cumsum(rows, dtype=np.int64), tokens)) + 1
        self.lengths = rows[:enough] + 1

    @cached_property
    def supervised(self) -> np.ndarray:
        """(N,) integers, targets of each sample."""
        return self.lengths // 2

    def sample(self, i: int) -> Sample:
        """Sample i; its tokens are all 0."""
        length, answer = int(self.lengths[i]), int(self.supervised[i])
        weights = np.zeros(length, np.float32)
        weights[length - answer :] = 1
        roles = np.where(weights > 0, ROLES.index("assistant"), ROLES.index("user"))
        return Sample(np.zeros(length, np.int32), weights, roles.astype(np.uint8))


class HeldSteps:
    """Steps in memory, given out again and again without end."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = tuple(steps)

    def __iter__(self) -> Iterator[Step]:
        return cycle(self.steps)


def held_steps(config: TrainConfig, sets: Sets, folder: Path, steps: int, here: World) -> HeldSteps:
    """The first steps of a run as this rank sees them, with made-up tokens, made now.

    Args:
        config: of the run.
        sets: as ``prepare_sets`` found them; lengths are drawn for what is not in it.
        folder: of the model.
        steps: of the mock run: no more are made, and no more than memory should hold.

    Raises:
        InputError: see ``PackStream``.
    """
    if not config.data.train and not config.stages:
        config = replace(config, data=replace(config.data, train=("mock",)))
    step_tokens = config.stream.packs_per_step * config.stream.max_tokens
    count = max(1, min(steps, HELD_TOKENS * here.size // step_tokens))
    drawn = partial(Drawn, count * step_tokens, config.stream.max_tokens, config.run.seed)
    vocab_size = vocabulary_size(folder) or 1  # a folder without sizes has no model to load either

    def source(prefix: str) -> Source:
        return MockTokens(Store(prefix) if prefix else drawn(), vocab_size)

    known = {text: sets.get(text, "") for stage in config.all_stages for text in stage.train}
    stream = open_stream(config, known, folder, here.rank, here.size, source)
    begun: Any = iter(stream)
    with closing(begun) as made:  # ends the threads that read ahead
        return HeldSteps(list(islice(made, count)))


def run_mock(config: TrainConfig, folder: Path, sets: Sets, here: World, console: Console) -> Ended:
    """Run the steps, and say in one sentence whether the loader is what slows the real run down.

    Every rank calls it. SIGTERM or Ctrl-C ends after the step, and what is known is said.

    Args:
        folder: of the model.
        sets: see ``held_steps``.
        console: of rank 0; other ranks say nothing.

    Raises:
        InputError: see ``load_model`` and ``PackStream``.
        RunError: the loss is not finite, a rank is gone.
    """
    steps = config.run.steps or MOCK_STEPS
    data = held_steps(config, sets, folder, steps, here)
    loop, _, options = bare(config, folder, steps, here)
    header = {
        "config": flat(config), "ranks": here.size, "steps": steps, "device": device_name(here),
    }  # fmt: skip
    records: list[StepRecord] = []
    with _journal(config, header, options, console if here.is_first else None) as journal:
        journal.say(_said(config, sets, len(data.steps), steps))
        with StopRequest(saves=False) as asked, journal.live():
            ended = loop.run(data, on_step=to_all(records.append, journal.step), stop=asked)
        if records and here.is_first:
            journal.say(verdict(records, header, config.run.out, held=len(data.steps)))
    return ended


def _journal(
    config: TrainConfig, header: dict[str, Any], options: TrainOptions, console: Console | None
) -> Journal:
    """Of this mock run alone: an earlier one's log is overwritten."""
    path = config.run.out / MOCK_LOG
    if console is not None:
        path.unlink(missing_ok=True)
    share = lambda record: options.progress(record.step, 0.0)  # noqa: E731
    return Journal(console, path, header, share, config.log.every_s)


def _said(config: TrainConfig, sets: Sets, held: int, steps: int) -> str:
    """What the steps are made of."""
    texts = [text for stage in config.all_stages for text in stage.train]
    drawn = [text for text in texts if text not in sets]
    lengths = "lengths and weights of the prepared data"
    if drawn or not texts:
        lengths = f"log-normal lengths (median {MEDIAN} tokens), since nothing is prepared"
        lengths += f" of {', '.join(drawn)}" * bool(drawn)
    again = f", the first {held} again and again" if held < steps else ""
    return f"mock data: {steps} steps in memory{again}; {lengths}; nothing is saved"
