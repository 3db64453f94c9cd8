"""The whole way in one command: real weights, real conversations, packs, training, HF checkpoint.

Each step shows what it did; everything that is shown was measured in that run and is also in
``summary.json``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.formats import (
    Conversation,
    read_conversations,
    write_conversations,
)
from varlen_sft.data.load import tokenize_file
from varlen_sft.data.packing import packing_stats, plan_packs
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools import demo_show as show
from varlen_sft.tools.demo_data import hold_out, write_demo_data
from varlen_sft.tools.demo_generate import generate, prompts
from varlen_sft.tools.demo_model import smollm2_folder
from varlen_sft.tools.environment import environment
from varlen_sft.tools.padded_vs_packed import compare
from varlen_sft.tools.report import picture_pack, write_report
from varlen_sft.tools.step_bench import DTYPES
from varlen_sft.tools.step_candidates import Load
from varlen_sft.train.in_memory import endless_packs, evaluate, train
from varlen_sft.train.metrics import JsonLinesLog, LiveLine
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.state import StepRecord

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoOptions", "run"]

COMPARED_TOKENS = 4096
VALIDATION_PACKS = 8


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the user may choose; ``varlen-sft demo --help`` says it in words."""

    out: Path = Path("runs/demo")
    model: Path | None = None
    data: Path | None = None
    minutes: float = 3.0
    steps: int | None = None
    dtype: str = "bf16"
    max_tokens: int = 2048
    lr: float = 3e-4
    seed: int = 0
    rounds: int = 3

    def train_options(self) -> TrainOptions:
        return TrainOptions(
            max_steps=self.steps,
            max_seconds=None if self.steps else 60 * self.minutes,
            lr=self.lr,
        )


@dataclass(frozen=True)
class _Data:
    train_file: Path
    train: list[Sample]
    validation: list[Sample]
    prompts: list[Conversation]  # held out; the last answer is what the model has to say


def run(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run all steps.

    Returns:
        What ``summary.json`` holds.

    Raises:
        InputError: a model or data file that cannot be used.
    """
    folder = _model(options, console)
    data = _data(options, folder, console)
    options.out.mkdir(parents=True, exist_ok=True)
    model = LlamaForSFT.from_pretrained(folder, dtype=DTYPES[options.dtype])
    held_out = _packs(data.validation, options.max_tokens)[:VALIDATION_PACKS]
    before = _evaluate(model, held_out, console, "before")
    records = _train(options, model, data.train, console)
    after = _evaluate(model, held_out, console, "after")
    checkpoint = options.out / "checkpoint"
    model.save_pretrained(checkpoint, copy_from=folder)
    del model

    show.heading(console, "The same conversations, padded and packed")
    compared = _compare(options, folder, data.train_file, console)
    show.comparison(console, compared)
    show.heading(console, "Before and after")
    show.validation(console, before, after, len(held_out))
    said_before = _answers(folder, data.prompts, console, "before")
    said_after = _answers(checkpoint, data.prompts, console, "after")
    show.answers(console, data.prompts, said_before, said_after)

    summary = {
        "options": {key: str(value) for key, value in asdict(options).items()},
        "environment": environment(),
        "steps": [asdict(record) for record in records],
        "comparison": compared,
        "before": {"validation_loss": before, "answers": said_before},
        "after": {"validation_loss": after, "answers": said_after},
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    pack = next(endless_packs(data.train, options.max_tokens, options.seed))
    picture = picture_pack(pack, collate(pack), ChatTokenizer.from_folder(folder))
    write_report(options.out / "report.html", summary, picture, data.prompts)
    show.files(console, options.out, data.train_file)
    return summary


def _model(options: DemoOptions, console: Console) -> Path:
    show.heading(console, "Model")
    if options.model is None:
        with show.bar(console) as update:
            folder = smollm2_folder(update)
    else:
        folder = options.model
    show.model(console, folder, LlamaConfig.from_folder(folder))
    return folder


# ---------------------------------------------------------------------- data


def _data(options: DemoOptions, folder: Path, console: Console) -> _Data:
    show.heading(console, "Data")
    tokenizer = ChatTokenizer.from_folder(folder)
    vocab_size = LlamaConfig.from_folder(folder).vocab_size

    def tokenize(path: Path) -> list[Sample]:
        return _tokenize(path, tokenizer, vocab_size, options.max_tokens, console)

    if options.data is not None:
        tokenize(options.data)  # before it is cut in two: an error names the row of this file
    train_file, validation_file = _files(options, console)
    train_samples, validation_samples = tokenize(train_file), tokenize(validation_file)
    packs = _packs(train_samples, options.max_tokens, ids_only=True)
    stats = packing_stats(packs, [len(s) - 1 for s in train_samples], options.max_tokens)
    show.data(console, stats, train_samples, tokenizer.straddles_cut)
    asked = prompts([conversation for _, conversation in read_conversations(validation_file)])
    return _Data(train_file, train_samples, validation_samples, asked)


def _files(options: DemoOptions, console: Console) -> tuple[Path, Path]:
    """(train, validation): the demo's own, or the user's file cut in two by hash."""
    folder = options.out / "data"
    if options.data is None:
        written = write_demo_data(folder, seed=options.seed)
        show.counts(console, written.counts)
        return written.train, written.validation
    conversations = [conversation for _, conversation in read_conversations(options.data)]
    if len(conversations) < 2:
        raise InputError(
            f"two conversations or more are needed, one to hold out, got {len(conversations)}",
            file=options.data,
        )
    kept, held_out = hold_out(conversations, 0.05)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "train.jsonl", folder / "validation.jsonl"
    for path, part in zip(paths, (kept, held_out), strict=True):
        write_conversations(path, part)
    return paths


def _tokenize(
    path: Path, tokenizer: ChatTokenizer, vocab_size: int, max_tokens: int, console: Console
) -> list[Sample]:
    stream = tokenize_file(path, tokenizer, vocab_size=vocab_size, max_tokens=max_tokens)
    with open(path, "rb") as file:
        rows = sum(1 for _ in file)
    samples = []
    with show.bar(console) as update:
        for sample in stream:
            samples.append(sample)
            update(len(samples) / rows, f"tokenising {path.name}: {len(samples):,} of {rows:,}")
    return samples


def _packs(samples: Sequence[Sample], max_tokens: int, ids_only: bool = False) -> list[Any]:
    packs = plan_packs([len(sample) - 1 for sample in samples], max_tokens)
    return packs if ids_only else [[samples[i] for i in pack] for pack in packs]


# -------------------------------------------------------------------- model


def _train(
    options: DemoOptions, model: LlamaForSFT, samples: Sequence[Sample], console: Console
) -> list[StepRecord]:
    show.heading(console, f"Training in {options.dtype} on packs of {options.max_tokens:,} tokens")
    wanted = options.train_options()
    seconds = 0.0
    header = {"options": {key: str(value) for key, value in asdict(options).items()}}

    def on_step(record: StepRecord) -> None:
        nonlocal seconds
        seconds += record.step_time_s
        log.step(record)
        line.show(record)

    with (
        JsonLinesLog(options.out / "log.jsonl", header) as log,
        LiveLine(console, lambda record: wanted.progress(record.step, seconds)) as line,
    ):
        packs = endless_packs(samples, options.max_tokens, options.seed)
        records = train(model, packs, wanted, max_tokens=options.max_tokens, on_step=on_step)
    show.trained(console, records)
    return records


def _evaluate(
    model: LlamaForSFT, packs: Sequence[Sequence[Sample]], console: Console, when: str
) -> float:
    def counted(update: Any) -> Any:
        for done, pack in enumerate(packs):
            update(done / len(packs), f"validation loss {when} training")
            yield pack

    with show.bar(console) as update:
        return evaluate(model, counted(update))


def _compare(
    options: DemoOptions, folder: Path, train_file: Path, console: Console
) -> dict[str, Any]:
    load = Load(
        model=folder,
        dtype=DTYPES[options.dtype],
        tokens=COMPARED_TOKENS,
        seed=options.seed,
        data=train_file,
    )
    with show.bar(console) as update:
        return compare(load, options.rounds, torch.get_num_threads(), update)


def _answers(
    folder: Path, prompts: Sequence[Conversation], console: Console, when: str
) -> list[str]:
    with show.bar(console) as update:
        return generate(
            folder,
            [prompt.messages[:-1] for prompt in prompts],
            progress=lambda share: update(share, f"greedy answers {when} training"),
        )
