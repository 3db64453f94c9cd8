"""Does it learn: a tiny Llama from nothing, the same broken on purpose, a real one fine-tuned."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import learning_runs
import script
from learning_broken import BATCHES, batches_from, cheapest_first
from learning_runs import Task
from learning_table import AS_IT_IS, SECTIONS, goals, tables

HELP = """\
Dialogues with a register machine: each answer is the machine's whole state, and a dialogue counts
if every answer in it is right, character for character, with the model's own answers as its past.
None of the held-out ones is trained on.

  scratch   a Llama of 1.5M parameters, one token a character, random weights, as `varlen-sft train`
            trains it; read back and asked by transformers' generate
  broken    shorter runs, as they should be and with one thing wrong in each: what is that worth
  spread    as it should be with two other seeds: what a difference between two runs is worth
  order     the same with steps in order of cost, and with packs that nobody sorted
  finetune  SmolLM2-135M-Instruct, ten minutes; before and after

A section that is not asked for stays in the file as it was.
"""


Run = tuple[int, dict[str, Any], AbstractContextManager[Any]]
"""Its seed, what the configuration of its stream says otherwise, what is put in place meanwhile."""


def asked_runs(section: str, seeds: int) -> dict[str, Run]:
    """By name; ``seeds`` are those of scratch."""
    if section in ("scratch", "spread"):
        others = range(seeds) if section == "scratch" else (1, 2)
        return {f"seed {seed}": (seed, {}, nullcontext()) for seed in others}
    if section == "order":
        return {
            "cheapest first": (0, {}, cheapest_first()),
            "the same steps, shuffled": (0, {}, cheapest_first(shuffled=True)),
            "not sorted": (0, {"balance": "none"}, nullcontext()),
        }
    broken: dict[str, Run] = {AS_IT_IS: (0, {}, nullcontext())}
    broken |= {name: (0, {}, batches_from(make)) for name, make in BATCHES.items()}
    return broken | {"stream.isolate: false": (0, {"isolate": False}, nullcontext())}


def measure(section: str, args: argparse.Namespace, scratch: Path, say: Any) -> dict[str, Any]:
    """The runs of a section by name."""
    if section == "finetune":
        say("finetune: before and after")
        found = learning_runs.fine_tune(args.minutes * 60, args.fine_tuned, scratch)
        return {"SmolLM2-135M-Instruct": found}
    found = {}
    for number, (name, run) in enumerate(asked_runs(section, args.seeds).items()):
        seed, stream, meanwhile = run
        say(f"{section}: {name}")
        steps = args.steps if section == "scratch" else min(args.steps, args.variant_steps)
        dialogues = round(args.dialogues * steps / args.steps)
        task = Task(steps, dialogues, args.held_out, seed)
        with meanwhile:
            found[name] = learning_runs.from_scratch(task, scratch / f"{section}{number}", stream)
        say(f"  {found[name]['score']['share']:.1%} of dialogues, {found[name]['seconds']:.0f} s")
    return found


def main() -> int:
    parser = script.parser(HELP, __file__)
    add = parser.add_argument
    add("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="default: all")
    add("--seeds", type=int, default=2, help="of the runs from scratch (default: 2)")
    add("--steps", type=int, default=learning_runs.STEPS, help="of a run (default: %(default)s)")
    add("--variant-steps", type=int, default=learning_runs.VARIANT_STEPS,
        help="of a run of broken, spread and order (default: %(default)s)")  # fmt: skip
    add("--dialogues", type=int, default=learning_runs.DIALOGUES, help="default: %(default)s")
    add("--held-out", type=int, default=200, help="dialogues (default: 200)")
    add("--fine-tuned", type=int, default=50, help="held-out dialogues of finetune (default: 50)")
    add("--minutes", type=float, default=10, help="of fine-tuning (default: 10)")
    args = parser.parse_args()

    from varlen_sft.data.files import write_whole
    from varlen_sft.tools.environment import environment

    console, stamped = script.console(), environment()
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    results.pop("environment", None)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for section in args.sections:
        with tempfile.TemporaryDirectory() as folder:
            runs = measure(section, args, Path(folder), console.print)
        results[section] = {"runs": runs, "environment": stamped}
        write_whole(args.json, (json.dumps(results, indent=1) + "\n").encode())
    for table in tables(results):
        console.print(table)
    told = goals(results)
    for met, text in told:
        console.print(script.goal(met, text), highlight=False)
    results["goals"] = [{"met": met, "text": text} for met, text in told]
    return script.finish(console, args.json, stamped, results)


if __name__ == "__main__":
    sys.exit(main())
