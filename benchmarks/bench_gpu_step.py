"""One training step of a Llama on a CUDA device: ours beside Hugging Face, Liger and the floor."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gpu_timing
import torch
from bench_gpu import made
from gpu_step_candidates import Floor, Liger, Ours, hf_packed, hf_padded, patched
from gpu_step_models import SIZES, Load, fill, hf_model, own_model
from gpu_step_timing import Alone, alone, forget, interleaved
from op_groups import Goal, Group, as_json, render
from rich.console import Console
from rich.markup import escape

from varlen_sft.errors import RunError
from varlen_sft.tools.environment import environment
from varlen_sft.tools.step_bench import check_losses
from varlen_sft.train.flops import peak_tflops

HELP = """\
One training step (forward and backward, no optimiser) of Llamas with random weights in bf16 on
conversations of chat-like lengths with about 40 % supervised tokens, side by side:

  hf padded        transformers, SDPA, micro-batches of 4 in the order drawn, padded to the longest
  hf padded, 16    the same in micro-batches of 16
  hf packed        transformers, SDPA, all samples in one row with position ids
  Liger padded     hf padded with Liger's kernels
  patched          transformers' model after varlen_sft.patch, one pack of varlen_sft.Collator
  ours             varlen_sft.models.LlamaForSFT on one pack
  compiled ours    the same, each layer through torch.compile
  floor            only the matrix products of our step

All compute the same loss; where one does not, nothing is printed but that. Peers that are not
installed, fail or run out of memory (beside one copy of the weights as Hugging Face and one as we
have them, and the floor's matrices) are named.

Times are of steps as a training loop sees them: between CUDA events at the ends of two steps of a
candidate in a row, without a wait between them, so that the host's time counts where the device
has to wait for it. Before each such pair nothing is cached of the other candidates. Rounds are
interleaved; medians with [least - most]. "host ms" is how long the host takes to queue a step, from
an idle device: where it is about the time of the step, the host is what limits it, or it waits.
Batches lie on the device beforehand. Real tokens per second count no padding. TFLOP/s and MFU count
what the step has to compute (varlen_sft.train.flops), for the floor what it computes. Peak memory
is that of a candidate alone: its weights and what its step adds, gradients included. It grows with
the rows that are under way at once: those of a micro-batch, or of the whole pack.
"""
RESULTS = Path(__file__).parent / "results" / "gpu_step.json"
FASTER = 2.8  # promised of the same comparison on a CPU
DTYPE = torch.bfloat16


# ---------------------------------------------------------------------- the table


def measure(load: Load, rounds: int, compiled: bool = True) -> tuple[Group, dict[str, Any]]:
    """The table of one model, and what its losses were judged by.

    Raises:
        LossesDisagree: before rounds are timed.
        RunError: there is no hf padded to compare with.
    """
    model = hf_model(SIZES[load.name], DTYPE, load.device)
    fill(model, load.seed)
    truth = fp32_loss(model, load)
    steps, missing = ran(makers(model, load, compiled))
    if "hf padded" not in steps:
        raise RunError(f"hf padded, which others are compared with, {missing['hf padded']}")
    first = {name: alone(step, load.device) for name, step in steps.items()}
    losses = {name: found.loss for name, found in first.items() if found.loss is not None}
    facts = {"loss_fp32_padded": truth, "loss_bound": check_losses(losses, truth, DTYPE)}
    title = f"{load.name}, a step of {load.tokens} real tokens in bf16, {load.device}"
    group = Group(title, "floor", dict(steps), missing, {n: {"loss": losses.get(n)} for n in steps})
    group.seconds = interleaved(steps, rounds, load.device)
    add_rates(group, load, steps)
    add_costs(group, first, sum(p.nbytes for p in model.parameters()))
    group.goals = goals(group)
    group.note = load.words() + " Losses are within {1:.1e} of {0:.6f}, hf padded in fp32.".format(
        *facts.values()
    )
    return group, facts


def fp32_loss(model: Any, load: Load) -> float:
    """The loss of the same weights, padded, in fp32."""
    high = hf_model(SIZES[load.name], torch.float32, load.device)
    high.load_state_dict(model.state_dict())
    return hf_padded(high, load.samples).loss_only()


def makers(model: Any, load: Load, compiled: bool) -> dict[str, Callable[[], Any]]:
    """In the order of the table."""
    own, samples, batch = own_model(load.config, model), load.samples, load.batch
    found: dict[str, Callable[[], Any]] = {
        "hf padded": lambda: hf_padded(model, samples),
        "hf padded, 16": lambda: hf_padded(model, samples, 16),
        "hf packed": lambda: hf_packed(model, samples),
        "Liger padded": lambda: Liger(model, samples),
        "patched": lambda: patched(model, samples),
        "ours": lambda: Ours(own, batch),
        "compiled ours": lambda: Ours(own, batch, compiled=True),
        "floor": lambda: Floor(load.config, batch, own.lm_head.weight),
    }
    if not compiled:
        del found["compiled ours"]
    return found


def ran(makers: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """``made`` from the last to the first: what the light ones keep is there when the heavy ones
    try whether the memory is enough."""
    steps, missing = made(dict(reversed(makers.items())))
    return {name: steps[name] for name in makers if name in steps}, missing


def add_rates(group: Group, load: Load, steps: Mapping[str, Any]) -> None:
    """Columns of speed."""
    real = sum(len(sample) for sample in load.samples)
    peak = peak_tflops(torch.cuda.get_device_name()) if load.device == "cuda" else None
    for name, step in steps.items():
        seconds = group.median(name)
        rate = (step.flops if name == "floor" else load.flops) / seconds / 1e12
        group.facts[name] |= {
            "rows": step.tokens,
            "real tokens/s": round(real / seconds),
            "vs padded": group.ratio("hf padded", name),
            "TFLOP/s": rate,
        } | ({} if peak is None else {"MFU": rate / peak})


def add_costs(group: Group, first: Mapping[str, Alone], weights: int) -> None:
    """Columns of the host's time, and of memory on a device; ``weights`` in bytes."""
    padded = first["hf padded"].extra_bytes
    for name, (_, host, extra) in first.items():
        group.facts[name]["host ms"] = host * 1e3
        if name != "floor" and padded is not None and extra is not None:
            group.facts[name] |= {
                "peak GB": (weights + extra) / 1e9,
                "over weights GB": extra / 1e9,
                "memory vs padded": (weights + extra) / (weights + padded),
            }


def goals(group: Group) -> list[Goal]:
    text = "real tokens/s of ours over hf padded (a goal set for a CPU)"
    return [Goal(text, group.ratio("hf padded", "ours"), FASTER, at_least=True)]


# --------------------------------------------------------------------------- main


def tables(args: argparse.Namespace, console: Console) -> tuple[list[dict[str, Any]], bool]:
    """Each printed as soon as it is there; and whether all are."""
    found, whole = [], True
    for name in args.sizes:
        load = Load(name, args.tokens, args.seed, args.device)
        try:
            group, facts = measure(load, args.rounds, not args.no_compile)
        except (RunError, ModuleNotFoundError) as error:
            console.print(f"[red]No table of {name}:[/red] {escape(str(error))}")
            whole = False
            continue
        console.print(render(group))
        found.append(as_json(group) | facts | {"lengths": [len(s) for s in load.samples]})
        del group
        torch.compiler.reset()  # another model's layers are other code to it
        forget(args.device)
    return found, whole


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries this script")
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES)[:2], help="default: the first two")
    add("--tokens", type=int, default=16_384, help="real tokens of a step (default: 16384)")
    add("--rounds", type=int, default=4, help="timed steps of each (default: 4)")
    add("--seed", type=int, default=0, help="draws weights, lengths and tokens (default: 0)")
    add("--no-compile", action="store_true", help="leave out what takes longest to begin")
    add("--json", type=Path, help="default: results/gpu_step.json beside this; none on a cpu")
    args = parser.parse_args()
    if args.json is None and args.device == "cuda":
        args.json = RESULTS
    return args


def main() -> int:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        version = torch.__version__
        print(f"bench_gpu_step: torch {version} finds no CUDA device: nothing was measured.")
        return 0
    start, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 170)
    about = gpu_timing.environment() if args.device == "cuda" else environment()
    found, whole = tables(args, console)
    facts = {"environment": about, "minutes": (time.perf_counter() - start) / 60}
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(facts | {"tables": found}, indent=1) + "\n"
        args.json.write_text(text, encoding="utf-8")
    console.print(f"{facts}", highlight=False)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
