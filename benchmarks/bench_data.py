"""Conversations to tokens, masks and labels: ours beside TRL, N+1 renders and the bare bound."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import script
from rich.table import Table

HELP = """\
Prepares conversations of about 500 tokens: render the template, tokenise, find what is trained.

  ours     ChatTokenizer.encode_rows in batches of 1000, with a second mechanism that checks one row
           in a hundred
  TRL      SFTTrainer's own preparation with assistant_only_loss, datasets and all
  prefix   a render and a tokenisation per turn, as stacks do that mask by prefix lengths
  bound    one render, one batched call of the fast tokenizer with offsets, no masks

All render ChatML; TRL needs generation tags in its template, ours and the bound do without them.
Ours, TRL and prefix have to give the same ids and labels; nothing is printed otherwise. Once with
one thread of the tokenizer and once with all, each in a process of its own; rounds are interleaved.
"""
TAGGED_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = TAGGED_CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
TOKENS = {"eos_token": "<|im_end|>"}
GOALS = {1: (1.15, 1.6), "all": (1.15, 2.7)}  # ours / bound at most, TRL / ours at least
BATCH = 1000


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Turns made of sentences of real chats, about 500 tokens each."""
    from varlen_sft.tools.demo_data import chatterbot_conversations

    talks, _ = chatterbot_conversations()
    said = [message.content for talk in talks for message in talk.messages]
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        turns = draw.choice((1, 2, 2, 3, 4, 6))
        sentences = max(1, round(draw.lognormvariate(3.3, 0.35) / (2 * turns)))
        made.append(
            [
                {"role": role, "content": " ".join(draw.choices(said, k=sentences))}
                for _ in range(turns)
                for role in ("user", "assistant")
            ]
        )
    return made


# ------------------------------------------------------------------ candidates


def ours(folder: Path, talks: list) -> Callable[[], list]:
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.data.conversation import Conversation, Message
    from varlen_sft.data.template import ChatTemplate

    tokenizer = ChatTokenizer((folder / "tokenizer.json").read_text(), ChatTemplate(CHATML, TOKENS))

    def run() -> list:
        out = []
        for start in range(0, len(talks), BATCH):
            rows = [
                Conversation(tuple(Message(m["role"], m["content"]) for m in talk))
                for talk in talks[start : start + BATCH]
            ]
            out += tokenizer.encode_rows(rows)
            if wrong := [found for found in tokenizer.cross_check(rows[::100]) if found]:
                raise wrong[0]
        return [(s.input_ids, np.where(s.token_weights > 0, s.input_ids, -100)) for (s,) in out]

    return run


def trl(folder: Path, talks: list) -> Callable[[], list]:
    from datasets import Dataset, disable_caching, disable_progress_bars
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    disable_caching(), disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = SimpleNamespace(
        chat_template=tokenizer.chat_template,
        completion_only_loss=False,
        _tokenizer=tokenizer,
        _is_vlm=False,
    )
    args = SimpleNamespace(
        dataset_num_proc=None, assistant_only_loss=True, dataset_text_field="text",
        max_length=None, packing=False, shuffle_dataset=False,
    )  # fmt: skip

    def run() -> list:
        data = Dataset.from_list([{"messages": talk} for talk in talks])
        data = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
        return [(np.array(row["input_ids"]), np.array(row["labels"])) for row in data]

    return run


def prefix(folder: Path, talks: list) -> Callable[[], list]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(messages: list, prompt: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=prompt
        )["input_ids"]

    def run() -> list:
        out = []
        for talk in talks:
            whole = np.array(ids(talk))
            labels = np.full_like(whole, -100)
            for i in range(1, len(talk), 2):
                start = len(ids(talk[:i], True))
                end = len(ids(talk[: i + 1])) - 1  # the newline after the stop token
                labels[start:end] = whole[start:end]
            out.append((whole, labels))
        return out

    return run


def bound(folder: Path, talks: list) -> Callable[[], list]:
    from tokenizers import Tokenizer

    from varlen_sft.data.template import ChatTemplate

    encoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = ChatTemplate(CHATML, TOKENS)

    def run() -> list:
        out = []
        for start in range(0, len(talks), BATCH):
            texts = [template.render(talk) for talk in talks[start : start + BATCH]]
            encoded = encoder.encode_batch(texts, add_special_tokens=False)
            out += [(np.array(e.ids), np.array(e.offsets)) for e in encoded]
        return out

    return run


CANDIDATES = {"ours": ours, "TRL": trl, "prefix": prefix, "bound": bound}


# --------------------------------------------------------------------- measure


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each candidate, in a process whose tokenizer has so many threads."""
    from varlen_sft.tools.step_bench import interleaved

    talks = conversations(args.count, args.seed)
    runs = {name: make(args.model, talks) for name, make in CANDIDATES.items()}
    first = {name: run() for name, run in runs.items()}
    for name in ("TRL", "prefix"):
        for row, (a, b) in enumerate(zip(first["ours"], first[name], strict=True)):
            if any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True)):
                raise SystemExit(f"ours and {name} differ in conversation {row}")
    lengths = [len(ids) for ids, _ in first["ours"]]
    first.clear()
    steps = {name: SimpleNamespace(step=run, tokens=0) for name, run in runs.items()}
    times = interleaved(steps, args.rounds, warmup=0)
    return {"seconds": times, "conversations": len(talks), "mean_tokens": np.mean(lengths)}


def measure(args: argparse.Namespace, threads: str) -> dict[str, Any]:
    count = os.cpu_count() if threads == "all" else 1
    command = [sys.executable, __file__, "--worker", "--model", args.model]
    command += ["--count", args.count, "--rounds", args.rounds, "--seed", args.seed]
    environment = os.environ | {"RAYON_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{threads} threads: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"threads": count}


def table(result: dict[str, Any], goals: tuple[float, float]) -> Table:
    """A line per candidate, goals under it."""
    seconds = {name: statistics.median(values) for name, values in result["seconds"].items()}
    rows = result["conversations"]
    shown = Table(
        title=f"{rows} conversations, {result['mean_tokens']:.0f} tokens on average, "
        f"{result['threads']} thread(s) of the tokenizer"
    )
    for column in ("candidate", "conversations/s", "x bound's time", "x TRL's speed"):
        shown.add_column(column, justify="left" if column == "candidate" else "right")
    for name, value in seconds.items():
        values = (rows / value, value / seconds["bound"], seconds["TRL"] / value)
        shown.add_row(name, f"{values[0]:.0f}", f"{values[1]:.2f}", f"{values[2]:.2f}")
    over, faster = seconds["ours"] / seconds["bound"], seconds["TRL"] / seconds["ours"]
    shown.caption = "\n".join(
        [
            script.goal(over <= goals[0], f"{over:.2f}x the bound's time, at most {goals[0]}"),
            script.goal(faster >= goals[1], f"{faster:.2f}x TRL's speed, at least {goals[1]}"),
        ]
    )
    return shown


def main() -> int:
    parser = script.parser(HELP, __file__)
    parser.add_argument("--model", type=Path, help="folder of a tokenizer (default: SmolLM2)")
    parser.add_argument("--count", type=int, default=3000, help="conversations (default: 3000)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return 0
    from varlen_sft.tools.environment import environment

    console = script.console()
    with tempfile.TemporaryDirectory() as folder:
        args.model = tagged_chatml(args.model, Path(folder))
        results = {}
        for threads, goals in GOALS.items():
            results[str(threads)] = result = measure(args, str(threads))
            console.print(table(result, goals))
    return script.finish(console, args.json, environment(), {"threads": results})


def tagged_chatml(model: Path | None, folder: Path) -> Path:
    """The model's tokenizer with a template whose tags TRL can read."""
    from varlen_sft.tools.demo_model import smollm2_folder

    model = model or smollm2_folder()
    (folder / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = TAGGED_CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    sys.exit(main())
