"""The runs of the learning benchmark: trained by the package's own parts, asked by transformers."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import learning_task
from learning_answers import Score, from_folder, held_out_loss, score
from rich.console import Console

from varlen_sft.data.formats import Conversation
from varlen_sft.train.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    StreamConfig,
    TrainConfig,
)

__all__ = ["DIALOGUES", "STEPS", "VARIANT_STEPS", "Task", "fine_tune", "from_scratch"]

STEPS, DIALOGUES = 5000, 22000
VARIANT_STEPS = 2500
FINE_DIALOGUES = 8000
TURNS = (2, 4)
SHORT = 0.15  # of a run: short dialogues alone, where to copy from is found sooner
SCRATCH = OptimConfig(lr=1e-3, warmup=0.02, floor=0.0)
FINE = OptimConfig(lr=2e-4, warmup=0.05, floor=0.0)
STREAM = {"max_tokens": 1024, "packs_per_step": 4, "accumulate": 1}
"""Short packs, so that those of a step can be of one cost or of several; one micro-batch."""
POINTS = 50  # of a curve


class Task(NamedTuple):
    """A run from scratch."""

    steps: int
    dialogues: int
    held_out: int
    seed: int

    def draw(self) -> learning_task.Dialogues:
        return learning_task.draw(self.dialogues, self.held_out, self.seed, *TURNS)


def from_scratch(task: Task, folder: Path, stream: Mapping[str, Any]) -> dict[str, Any]:
    """Train a tiny Llama from random weights with ``varlen_sft.train.run``, and ask its export.

    Args:
        task: see there.
        folder: for all files of the run.
        stream: what of the stream's configuration is otherwise.

    Returns:
        For the JSON: ``score``, ``held_out_loss``, ``seconds`` from rows to export, ``curve``.
    """
    from varlen_sft.train.run import LOG, MODEL, run

    dialogues = task.draw()
    start = learning_task.write_model(folder / "start")
    config = TrainConfig(
        model=ModelConfig(name=str(start), random_init=True),
        stages=_stages(dialogues, folder, task.steps),
        stream=StreamConfig(**{**STREAM, **stream}),
        optim=SCRATCH,
        run=RunConfig(out=folder / "run", steps=task.steps, seed=task.seed),
        checkpoint=CheckpointConfig(every=task.steps),
    )
    began = time.perf_counter()
    run(config, Console(file=io.StringIO()), _silent)
    seconds = time.perf_counter() - began
    lines = (folder / "run" / LOG).read_text().splitlines()
    records = [line for line in map(json.loads, lines) if line.get("event") == "step"]
    exported = folder / "run" / MODEL
    return {
        "parameters": _parameters(exported),
        "dialogues": [len(dialogues.short), len(dialogues.train)],
        "real_tokens": sum(record["real_tokens"] for record in records),
        "seconds": seconds,
        **_facts([record["loss"] for record in records]),
        "held_out_loss": held_out_loss(exported, dialogues.held_out),
        "score": score(dialogues.held_out, from_folder(exported)).facts(),
    } | _sizes(task)


def _stages(
    dialogues: learning_task.Dialogues, folder: Path, steps: int
) -> tuple[StageConfig, ...]:
    short = learning_task.write_rows(folder / "short.jsonl", dialogues.short)
    train = learning_task.write_rows(folder / "train.jsonl", dialogues.train)
    begin = 1 + max(1, round(SHORT * steps))
    return (
        StageConfig(name="short dialogues", start_training_step=1, train=(short,)),
        StageConfig(name="all", start_training_step=begin, train=(train,)),
    )


def fine_tune(seconds: float, held_out: int, folder: Path) -> dict[str, Any]:
    """SmolLM2-135M-Instruct on the same dialogues, for so long, on the CPU in bf16."""
    from varlen_sft.tools.demo_model import smollm2_folder

    model, after = smollm2_folder(), folder / "after"
    dialogues = learning_task.draw(FINE_DIALOGUES, held_out, 0, *TURNS)
    rows = learning_task.write_rows(folder / "train.jsonl", dialogues.train)
    config = TrainConfig(
        model=ModelConfig(name=str(model)),
        data=DataConfig(train=(rows,), cache=folder / "prepared"),
        stream=StreamConfig(max_tokens=2048, packs_per_step=1),
        optim=FINE,
    )
    before = _asked(model, dialogues.held_out)
    losses = _train_for(config, seconds, after)
    return {
        "seconds": seconds,
        "steps": len(losses),
        **_facts(losses),
        "before": before.facts(),
        "after": _asked(after, dialogues.held_out).facts(),
    }


def _asked(folder: Path, dialogues: Sequence[Conversation]) -> Score:
    return score(dialogues, from_folder(folder, dtype="bfloat16"))


def _train_for(config: TrainConfig, seconds: float, out: Path) -> list[float]:
    """The loop of ``varlen-sft train`` with an end by the clock; the loss of each step."""
    from varlen_sft.train import setup
    from varlen_sft.train.distributed import world
    from varlen_sft.train.loop import Loop
    from varlen_sft.train.memory import keep_freed_memory
    from varlen_sft.train.parallel import Parallel
    from varlen_sft.train.setup_model import load_model

    keep_freed_memory()
    folder, losses = Path(config.model.name), []
    sets = setup.prepare_sets(config, folder)
    options = setup.train_options(config.optim, 1)
    options = replace(options, max_steps=None, max_seconds=seconds)
    with world() as here:
        model = load_model(config.model, folder, config.run.seed)
        loop = Loop(
            Parallel(model, here), setup.make_optimizer(config.optim, model), options,
            capacity=config.stream.packs_per_step * config.stream.max_tokens,
        )  # fmt: skip
        stream = setup.open_stream(config, sets, folder)
        loop.run(stream, on_step=lambda record: losses.append(record.loss))
    model.save_pretrained(out, copy_from=folder)
    return losses


@contextmanager
def _silent() -> Iterator[Any]:
    yield lambda *_: None


def _parameters(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        return sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118


def _sizes(task: Task) -> dict[str, Any]:
    of_task = {"steps": task.steps, "seed": task.seed}
    return {**of_task, "turns": TURNS, "short": SHORT, "lr": SCRATCH.lr, **STREAM}


def _facts(losses: Sequence[float]) -> dict[str, Any]:
    """The curve as means of equal parts, and how much steps jump within a part of the last half."""
    size = max(1, len(losses) // POINTS)
    parts = [losses[k : k + size] for k in range(0, len(losses) - size + 1, size)]
    means = [sum(part) / len(part) for part in parts]
    pairs = [(loss, mean) for part, mean in zip(parts, means, strict=True) for loss in part]
    late = [(loss - mean) ** 2 for loss, mean in pairs[len(pairs) // 2 :]]
    return {"curve": means, "curve_steps": size, "jumps": (sum(late) / len(late)) ** 0.5}
