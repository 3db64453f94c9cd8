"""One training step on chat-like samples: ours beside Hugging Face padded and packed, on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from varlen_sft.data.batch import collate
from varlen_sft.tools import step_bench
from varlen_sft.tools.environment import environment
from varlen_sft.tools.step_bench import Load, LossesDisagree
from varlen_sft.tools.step_candidates import CANDIDATES, SHORTEST, load_hf
from varlen_sft.tools.step_table import CPU_NOTE, describe, disturbed, render, stamp

HELP = """\
One training step (forward and backward, no optimiser) of a Llama on conversations of chat-like
lengths with about 40 % supervised tokens, side by side:

  hf padded  transformers, SDPA, micro-batches of 4 in the order drawn, padded to their longest
  hf packed  transformers, SDPA, all samples in one row with position ids
  ten lines  transformers with SDPA per sequence and the head on supervised rows only: what
             one can register oneself in ten lines
  ours       varlen_sft.models.LlamaForSFT on one pack
  floor      only the matrix products of our step, nothing else: what it cannot be faster than

All compute the same loss. Where one does not, nothing is printed but that. Rounds are interleaved,
with an untimed step of the same candidate before each timed one, as in training a step follows its
like. Times are medians with [least - most]; memory is the peak of a fresh process after one step.
Real tokens per second count no padding. Everything runs on the CPU, also where there is a GPU.
"""
EPILOG = """\
examples:
  python benchmarks/bench_step.py                              both dtypes, SmolLM2-135M
  python benchmarks/bench_step.py --dtype bf16 --rounds 3 --no-memory        a quick look
  python benchmarks/bench_step.py --model FOLDER --tokens 8192 --seed 3      your own Llama
"""
RESULTS = Path(__file__).parent / "results" / "bench_step.json"
TOKENS = {"bf16": 4096, "fp32": 2048}
FEWEST_ROUNDS = 3  # of fewer a median cannot reject one disturbed step


# ------------------------------------------------------------- the ten lines


def sdpa_per_sequence(module, query, key, value, attention_mask, *, scaling, lengths, **_):
    """An attention function of transformers: causal SDPA on each sequence of the row alone."""
    pieces = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    out = [
        F.scaled_dot_product_attention(*qkv, is_causal=True, scale=scaling, enable_gqa=True)
        for qkv in pieces
    ]
    return torch.cat(out, dim=2).transpose(1, 2), None


class Trial:
    """Transformers with SDPA per sequence, and its head on supervised rows only."""

    def __init__(self, load: Load) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register("sdpa_per_sequence", sdpa_per_sequence)
        AttentionMaskInterface.register("sdpa_per_sequence", lambda *_, **__: None)
        self.model = load_hf(load, "sdpa_per_sequence")
        self.batch = collate(load.samples())
        self.tokens = self.batch.real_tokens

    def step(self) -> float:
        self.model.zero_grad(set_to_none=True)
        batch, scored = self.batch, self.batch.labels != -100
        hidden = self.model.model(
            batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False,
            lengths=batch.sequences.lengths(),
        ).last_hidden_state[0]  # fmt: skip
        logits = self.model.lm_head(hidden[scored]).float()  # fp32 as HF's own loss has it
        loss = F.cross_entropy(logits, batch.labels[scored])
        loss.backward()
        return float(loss.detach())


def all_candidates() -> dict[str, Any]:
    """In the order of the table, the floor last."""
    before = {name: CANDIDATES[name] for name in ("hf padded", "hf packed")}
    return before | {"ten lines": Trial} | {name: CANDIDATES[name] for name in ("ours", "floor")}


# ------------------------------------------------------------------- measure


def measure(load: Load, args: argparse.Namespace, progress: Callable[[str], None]) -> dict:
    """Losses first, then times, then memory.

    Raises:
        LossesDisagree: before anything is timed.
    """
    progress("hf padded in fp32, whose loss judges the others")
    truth = step_bench.fp32_loss(load)
    candidates = {name: made(load) for name, made in all_candidates().items()}
    losses = step_bench.first_losses(candidates, progress)
    bound = step_bench.check_losses(losses, truth, load.dtype)
    times = step_bench.interleaved(candidates, args.rounds, 0, progress, settle=1)
    real = sum(len(sample) for sample in load.samples())
    rows = step_bench.summary(candidates, losses, times, real)
    candidates.clear()  # memory of the probes' own has to be there
    if not args.no_memory:
        add_memory(rows, load, args.threads, progress)
    facts = {"loss_fp32_padded": truth, "loss_bound": bound, "rows": rows}
    facts["disturbed"] = disturbed(rows)
    return facts | {"seconds": times} | describe(load)


def add_memory(
    rows: list[dict],
    load: Load,
    threads: int,
    progress: Callable[[str], None],
    program: str = __file__,
) -> None:
    """Peak memory of each candidate that computes a loss, and its share of HF padded's."""
    scored = [row for row in rows if row["loss"] is not None]
    for row in scored:
        progress(f"memory of {row['candidate']}, in a process of its own")
        row |= step_bench.peak_memory(row["candidate"], load, threads, program=[program])
    padded = next(row["peak_bytes"] for row in scored if row["candidate"] == "hf padded")
    for row in scored:
        row["memory_over_padded"] = row["peak_bytes"] / padded


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--model", type=Path, metavar="FOLDER", help="a HF Llama (default: the demo's SmolLM2-135M)"
    )
    add("--dtype", choices=(*TOKENS, "both"), default="both", help="default: both")
    add("--tokens", type=int, metavar="N", help="real tokens (default: 4096 in bf16, 2048 in fp32)")
    add(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="timed steps of each, 3 or more (default: 5)",
    )
    add("--seed", type=int, default=0, metavar="N", help="draws lengths and tokens (default: 0)")
    add("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    add("--no-memory", action="store_true", help="skip the memory probes")
    add(
        "--json",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="default: results/bench_step.json beside this script",
    )
    args = parser.parse_args()
    for name, least in (("tokens", SHORTEST), ("rounds", FEWEST_ROUNDS), ("threads", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    return args


def main() -> int:
    if "--probe" in sys.argv:  # we started ourselves, to measure memory
        step_bench.main(all_candidates())
        return 0
    args = parse()
    if args.model is None:
        from varlen_sft.tools.demo_model import smollm2_folder

        args.model = smollm2_folder()
    torch.set_num_threads(args.threads)
    # A pipe has no width; rich would fold the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 130)
    facts, results = environment(), []
    for dtype in TOKENS if args.dtype == "both" else (args.dtype,):
        tokens = args.tokens or TOKENS[dtype]
        load = Load(args.model, step_bench.DTYPES[dtype], tokens, args.seed)
        try:
            results.append(measure_with_bar(load, args))
        except LossesDisagree as error:
            console.print(f"[red]No table in {dtype}, the losses disagree:[/red] {error}")
            return 1
        console.print(render(results[-1]))
    console.print(stamp(facts), highlight=False)
    write_json(args.json, {"note": CPU_NOTE, "environment": facts, "tables": results})
    return 0


def measure_with_bar(load: Load, args: argparse.Namespace) -> dict[str, Any]:
    count = len(all_candidates())
    steps = 1 + count * (1 + args.rounds) + (0 if args.no_memory else count - 1)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On stderr, so that a table in a file is a table.
    with Progress(
        *columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        return measure(load, args, lambda text: bar.update(task, description=text, advance=1))


if __name__ == "__main__":
    sys.exit(main())
