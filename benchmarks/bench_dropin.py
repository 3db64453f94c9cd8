"""One step of Hugging Face's Trainer: a patched model with our collator beside padded and TRL."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from bench_step import add_memory, write_json
from dropin_candidates import CANDIDATES
from rich.console import Console
from rich.table import Table

from varlen_sft.tools import step_bench
from varlen_sft.tools.environment import environment
from varlen_sft.tools.step_bench import Load, LossesDisagree
from varlen_sft.tools.step_table import CPU_NOTE, describe, stamp

HELP = """\
One training step (forward and backward through Trainer.training_step, no optimiser, which is the
same for all) of SmolLM2-135M on conversations of chat-like lengths, side by side:

  hf padded        transformers' Trainer and its padding collator, micro-batches of 4, SDPA
  TRL packed       TRL's SFTTrainer with padding_free=True: all samples in one row, its own head
  patched          varlen_sft.patch(model) and varlen_sft.Collator under transformers' Trainer
  patched, pruned  the same with patch(model, prune_last_layer=True), which the goals are for
  patched TRL      as "patched", under varlen_sft.integrations.trl.SFTTrainer

All compute the same loss; where one does not, nothing is printed but that. Rounds are interleaved,
with an untimed step of the same candidate before each timed one. Real tokens count no padding.
"""
RESULTS = Path(__file__).parent / "results" / "bench_dropin.json"
TOKENS = {"bf16": 4096, "fp32": 2048}
GOALS = {"bf16": (2.5, 3.0), "fp32": (1.8, 1.8)}  # over padded and over TRL, real tokens/s
MEMORY = 0.65


# ------------------------------------------------------------------- measure


def measure(load: Load, args: argparse.Namespace, say: Any) -> dict[str, Any]:
    """Losses first, then times, then memory; raises LossesDisagree before anything is timed."""
    truth = step_bench.fp32_loss(load)
    candidates = {name: made(load) for name, made in CANDIDATES.items()}
    losses = step_bench.first_losses(candidates, say)
    bound = step_bench.check_losses(losses, truth, load.dtype)
    times = step_bench.interleaved(candidates, args.rounds, 0, say, settle=1)
    real = sum(len(sample) for sample in load.samples())
    rows = [
        {
            "candidate": name,
            "loss": losses[name],
            "tokens_computed": candidates[name].tokens,
            "seconds_median": statistics.median(seconds),
            "seconds_min": min(seconds),
            "seconds_max": max(seconds),
            "real_tokens_per_second": real / statistics.median(seconds),
        }
        for name, seconds in times.items()
    ]
    candidates.clear()
    if not args.no_memory:
        add_memory(rows, load, args.threads, say, __file__)
    facts = {"loss_fp32_padded": truth, "loss_bound": bound, "rows": rows, "seconds": times}
    return facts | describe(load)


def table(result: dict[str, Any], dtype: str) -> Table:
    """A line per candidate, goals under it."""
    rows = {row["candidate"]: row for row in result["rows"]}
    shown = Table(
        title=f"One step of a Trainer in {dtype}, {result['real_tokens']} real tokens, "
        f"{len(result['lengths'])} samples, {result['supervised_share']:.0%} supervised, CPU",
        caption="\n".join(verdicts(rows, dtype)),
        caption_justify="left",
    )
    columns = ("loss", "tokens computed", "step, s", "real tokens/s", "vs padded", "vs TRL")
    shown.add_column("candidate", no_wrap=True)
    for column in (*columns, "peak MB", "memory vs padded"):
        shown.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        speed = row["real_tokens_per_second"]
        shown.add_row(
            name,
            f"{row['loss']:.6f}",
            str(row["tokens_computed"]),
            f"{row['seconds_median']:.2f} ({row['seconds_min']:.2f} to {row['seconds_max']:.2f})",
            f"{speed:.0f}",
            *(
                f"{speed / rows[other]['real_tokens_per_second']:.2f}x"
                for other in ("hf padded", "TRL packed")
            ),
            *(
                (f"{row['peak_bytes'] / 1e6:.0f}", f"{row['memory_over_padded']:.2f}x")
                if "peak_bytes" in row
                else ("", "")
            ),
        )
    return shown


def verdicts(rows: dict[str, dict[str, Any]], dtype: str) -> list[str]:
    """What was to be reached, and whether it was."""
    ours = rows["patched, pruned"]
    told = []
    for other, goal in zip(("hf padded", "TRL packed"), GOALS[dtype], strict=True):
        ratio = ours["real_tokens_per_second"] / rows[other]["real_tokens_per_second"]
        told.append(
            f"{'met' if ratio >= goal else 'NOT MET'}: {ratio:.2f}x {other}, at least {goal}"
        )
    if "memory_over_padded" in ours:
        share = ours["memory_over_padded"]
        told.append(
            f"{'met' if share <= MEMORY else 'NOT MET'}: {share:.2f}x the memory of hf padded, at "
            f"most {MEMORY}"
        )
    return told


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, metavar="FOLDER", help="a HF Llama (default: SmolLM2-135M)")
    add("--dtype", choices=(*TOKENS, "both"), default="both", help="default: both")
    add("--tokens", type=int, metavar="N", help="default: 4096 in bf16, 2048 in fp32")
    add("--rounds", type=int, default=3, metavar="N", help="timed steps of each (default: 3)")
    add("--seed", type=int, default=0, metavar="N", help="draws lengths and tokens (default: 0)")
    add("--threads", type=int, default=2, metavar="N", help="of torch (default: 2)")
    add("--no-memory", action="store_true", help="skip the memory probes")
    add("--json", type=Path, default=RESULTS, metavar="FILE")
    return parser.parse_args()


def main() -> int:
    if "--probe" in sys.argv:  # we started ourselves, to measure memory
        step_bench.main(CANDIDATES)
        return 0
    args = parse()
    if args.model is None:
        from varlen_sft.tools.demo_model import smollm2_folder

        args.model = smollm2_folder()
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 150)
    facts, results = environment(), []
    for dtype in TOKENS if args.dtype == "both" else (args.dtype,):
        load = Load(args.model, step_bench.DTYPES[dtype], args.tokens or TOKENS[dtype], args.seed)
        with console.status("") as status:
            try:
                results.append(measure(load, args, status.update))
            except LossesDisagree as error:
                console.print(f"[red]No table in {dtype}, the losses disagree:[/red] {error}")
                return 1
        console.print(table(results[-1], dtype))
    console.print(stamp(facts), highlight=False)
    write_json(args.json, {"note": CPU_NOTE, "environment": facts, "tables": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
