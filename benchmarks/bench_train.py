"""Training: whole steps beside other trainers, the loop's cost, ranks, checkpoints, starting."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import bench_checkpoint
import script
import torch
import train_loop
import train_ranks
import train_start
import train_step
from op_groups import Goal
from rich.console import Console
from rich.table import Table

from varlen_sft.errors import InputError, RunError
from varlen_sft.tools.environment import environment
from varlen_sft.tools.step_table import WIDE_SPREAD

HELP = """\
Five tables, each measured in a process of its own, on SmolLM2-135M in bf16:

  step        a whole step with clipping and optimiser: Loop with LlamaForSFT and fp32 weights in
              AdamW, beside transformers' Trainer (padded, micro-batches of 4) and TRL packed with
              the fused AdamW that Trainer makes. Batches of those two are collated beforehand,
              ours in the step. All have the same first loss, or nothing is timed
  loop        where the time of Loop's steps goes, with stream, accumulation, log and live line.
              Adding up gradients over micro-batches is part of torch's backward, in bf16; ours,
              in fp32, is a row of its own, and counts as backward, too
  ranks       two ranks of one core each, by ddp and by fsdp, beside one rank of one core on the
              same steps with the same number of micro-batches; and two runs that know nothing of
              each other (in the first round alone): what an exchange of gradients cannot beat
  checkpoint  what a save holds up, and what it costs the next step (bench_checkpoint.py has more)
  start       import varlen_sft, and varlen-sft --help

Rounds are interleaved, figures are medians. Real tokens count no padding. A section that is not
asked for stays in the file of --json as it was.
"""
EPILOG = """\
examples:
  python benchmarks/bench_train.py                                  all, about 18 minutes
  python benchmarks/bench_train.py --sections loop start            two of them; no file is written
  python benchmarks/bench_train.py --model FOLDER --tokens 4096     your own Llama
"""
RESULTS = Path(__file__).parent / "results" / "bench_train.json"
PROCESSES = 5  # fresh ones for each round, in the section "start"


class Asked(NamedTuple):
    """What a section is to measure on."""

    model: Path
    tokens: int
    rounds: int
    seed: int


class Section(NamedTuple):
    """A table: its numbers, how they are shown, and what was promised of them."""

    measure: Callable[[Asked], dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    goals: Callable[[dict[str, Any]], list[Goal]]
    tokens: int  # of a step, where nothing else is asked for


def checkpoint(asked: Asked) -> dict[str, Any]:
    from varlen_sft.train.memory import keep_freed_memory

    keep_freed_memory()
    sizes = json.loads((asked.model / "config.json").read_text())
    run = bench_checkpoint.Run(asked.tokens, asked.seed, sizes)
    with tempfile.TemporaryDirectory() as folder:
        found = bench_checkpoint.measure(run, Path(folder), asked.rounds, ("torch.save",))
    size = sum(tensor.nbytes for tensor in run.tensors().values())
    return {"bytes": size, "tokens": asked.tokens, **bench_checkpoint.summary(found)}


def table_of_checkpoint(found: dict[str, Any]) -> Table:
    shown = bench_checkpoint.table(found)
    shown.title = (
        f"Saving {found['bytes'] / 1e9:.2f} GB beside steps of {found['step_s']:.2f} s, CPU"
    )
    return shown


def goals_of_checkpoint(found: dict[str, Any]) -> list[Goal]:
    ours = found["Checkpointer"]
    return [
        Goal("copies of the state that a save takes", ours["of_one_copy"], bench_checkpoint.STALL),
        Goal("next step, times one without a save", ours["next_step"], bench_checkpoint.SLOWER),
    ]


SECTIONS = {
    "step": Section(
        lambda asked: train_step.measure_steps(*asked),
        train_step.table_of_steps, train_step.goals_of_steps, 4096,
    ),
    "loop": Section(
        lambda asked: train_loop.measure_loop(*asked),
        train_loop.table_of_loop, train_loop.goals_of_loop, 8192,
    ),
    "ranks": Section(
        lambda asked: train_ranks.measure_ranks(*asked),
        train_ranks.table_of_ranks, train_ranks.goals_of_ranks, 16384,
    ),
    "checkpoint": Section(checkpoint, table_of_checkpoint, goals_of_checkpoint, 8192),
    "start": Section(
        lambda asked: train_start.measure_start(PROCESSES * asked.rounds),
        train_start.table_of_start, train_start.goals_of_start, 0,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------- processes


def alone(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a section finds in a process of its own: no other's memory, threads or imports.

    Raises:
        RunError: it failed; it told why.
    """
    file = folder / f"{name}.json"
    options = {"model": args.model, "rounds": args.rounds, "seed": args.seed}
    options |= {"threads": args.threads, "json": file, "child": name}
    if args.tokens is not None:
        options["tokens"] = args.tokens
    words = [f"--{key}={value}" for key, value in options.items()]
    if subprocess.run([sys.executable, __file__, *words]).returncode:
        raise RunError(f"section {name} failed")
    return json.loads(file.read_text())


def child(args: argparse.Namespace) -> int:
    """Measure a section here, and leave its numbers in the file."""
    section = SECTIONS[args.child]
    asked = Asked(args.model, args.tokens or section.tokens, args.rounds, args.seed)
    try:
        args.json.write_text(json.dumps(section.measure(asked)))
    except (RunError, InputError) as error:
        print(f"{args.child}: {error}", file=sys.stderr)
        return 1
    return 0


def others(file: Path) -> dict[str, Any]:
    """Sections that are in the file, each with what it was measured on."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    return {
        name: {"environment": kept["environment"]} | kept[name] for name in SECTIONS if name in kept
    }


# ---------------------------------------------------------------------- what is shown


def show(console: Console, section: Section, found: dict[str, Any]) -> list[Goal]:
    """The table, and a line for each goal."""
    console.print(section.table(found))
    if wide := list(disturbed(found)):
        names = ", ".join(wide)
        console.print(f"[red]Disturbed: max > {WIDE_SPREAD} min of {names}. Quote no ratio[/red]")
    goals = section.goals(found)
    for goal in goals:
        console.print(f"[{'green' if goal.met else 'red'}]{goal.words()}[/]", highlight=False)
    return goals


def disturbed(found: dict[str, Any]) -> Iterator[str]:
    """Rows whose rounds are too far apart to believe a ratio of them."""
    for name, row in found.get("rows", {}).items():
        if "rounds" in row and max(row["rounds"]) > WIDE_SPREAD * min(row["rounds"]):
            yield name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    add("--model", type=Path, metavar="FOLDER", help="a HF Llama (default: SmolLM2-135M)")
    add("--tokens", type=int, metavar="N", help="of a step (default: each section's own)")
    add("--rounds", type=int, default=3, metavar="N", help="that are timed (default: 3)")
    add("--seed", type=int, default=0, metavar="N", help="draws lengths and tokens (default: 0)")
    add("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    add("--json", type=Path, metavar="FILE",
        help="all figures; results/bench_train.json if all sections run, else none")  # fmt: skip
    add("--child", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, got {args.rounds} and "
                     f"{args.threads}")  # fmt: skip
    if args.model is None:
        from varlen_sft.tools.demo_model import smollm2_folder

        args.model = smollm2_folder()
    if args.json is None and args.sections == list(SECTIONS):
        args.json = RESULTS
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.child:
        return child(args)
    console, stamped, began = script.console(), environment(), time.perf_counter()
    results: dict[str, Any] = {}
    goals: list[Goal] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.sections:
            print(f"{time.perf_counter() - began:5.0f} s: {name} ...", file=sys.stderr, flush=True)
            try:
                results[name] = alone(name, args, Path(folder))
            except RunError as error:
                failed.append(str(error))
                continue
            found = show(console, SECTIONS[name], results[name])
            results[name]["goals"] = [goal._asdict() | {"met": goal.met} for goal in found]
            goals += found
    console.print(f"{sum(goal.met for goal in goals)} of {len(goals)} goals met", *failed, sep="; ")
    if args.json is None or failed:
        console.print("No file was written")
        return 1 if failed else 0
    for found in results.values():
        found["environment"] = stamped
    return script.finish(console, args.json, stamped, {**others(args.json), **results})


if __name__ == "__main__":
    sys.exit(main())
