"""Packing by lengths beside trl.pack_dataset, and how evenly the packs of a step are dealt."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import script
from rich.console import Console
from rich.table import Table
from script import goal

HELP = """\
Packs samples of lognormal(6.1, 1.0) tokens, cut at the size of a pack, into 4,096 and 32,768.

  planned      best-fit decreasing over the length histogram
  streaming    oldest-first best fit over a window of 64 samples
  next-fit     a pack is closed when the next sample does not fit, in plain Python
  TRL whole    trl.pack_dataset, bfd, with all samples in one batch of datasets.map
  TRL default  the same in the batches of 1,000 that it makes by default

TRL packs a data set of int32 tokens and copies all of them; ours say which sample goes where, and
the tokens are read in that order later. Each run is a process of its own, round by round; seconds
are medians, memory is the most beyond what was there before. Every sample of ours, and every token
of TRL's, is found exactly once and no pack is over-full, or nothing is printed.

Ten times as many samples go to planned, next-fit and the whole of ``varlen-sft plan`` for 8 ranks,
from lengths in memory to its last figure.

Then packs of heavy-tailed lengths, lognormal(7.2, 1.3) cut at 32,768, go to 8 ranks and 4
micro-batches, at the sizes of Llama 3.2 1B: most over mean cost of the ranks in a micro-batch.
"""
SIZES = (4096, 32768)
WINDOW = 64
FASTER, SMALLER, FILL, RATE, NEXT_FIT, MIB, UNEVEN = 80, 100, 0.997, 500_000, 3, 300, 1.02
PLAN_SECONDS = 3
LLAMA_1B = dict(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64,
)  # fmt: skip


def drawn(
    count: int, max_tokens: int, seed: int, mu: float = 6.1, sigma: float = 1.0
) -> np.ndarray:
    """(count,) int32 lengths."""
    lengths = np.random.default_rng(seed).lognormal(mu, sigma, count).astype(np.int32)
    return np.clip(lengths, 1, max_tokens)


# ------------------------------------------------------------------ candidates


def ours(method: str, lengths: np.ndarray, max_tokens: int) -> Any:
    """What is timed, and what checks and counts the packs it gives."""
    from varlen_sft.data.packing import pack, packing_stats

    def check(packs: Any) -> dict[str, int]:
        if not (np.bincount(packs.ids, minlength=len(lengths)) == 1).all():
            raise SystemExit(f"{method}: a sample is missing or there twice")
        return {"packs": packing_stats(packs, lengths, max_tokens).packs}

    pack(lengths[:1000], max_tokens, method)
    return lambda: pack(lengths, max_tokens, method, window=WINDOW), check


def plan(lengths: np.ndarray, max_tokens: int) -> Any:
    from varlen_sft.data.plan import PlanOptions, make_plan

    options = PlanOptions(max_tokens=max_tokens, ranks=8)
    make_plan(lengths[:1000], lengths[:1000], options)
    run = partial(make_plan, lengths, lengths, options)
    return run, lambda plan: {"packs": plan.packing.packs}


def trl(batch: int | None, lengths: np.ndarray, max_tokens: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute
    from datasets import Dataset, disable_caching, disable_progress_bars
    from trl import pack_dataset

    disable_caching(), disable_progress_bars()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    count = int(offsets[-1])
    if count >= 2**31:
        raise SystemExit(f"TRL's tokens are counted in int32, {count:,} are too many")
    offsets, tokens = offsets.astype(np.int32), np.arange(count, dtype=np.int32)
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    data = Dataset(pa.table({"input_ids": column}))
    options = {} if batch is None else {"batch_size": batch}

    def check(packed: Any) -> dict[str, int]:
        chunks = packed.data["input_ids"].chunks
        held = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        total = sum(pa.compute.sum(chunk.flatten()).as_py() for chunk in chunks)
        if held.sum() != count or total != count * (count - 1) // 2 or held.max() > max_tokens:
            raise SystemExit("TRL: tokens were lost, or a pack is over-full")
        return {"packs": len(packed)}

    pack_dataset(data.select(range(1000)), max_tokens, "bfd", dict(options))
    return lambda: pack_dataset(data, max_tokens, "bfd", dict(options)), check


CANDIDATES: dict[str, Callable[[np.ndarray, int], Any]] = {
    "planned": lambda lengths, size: ours("planned", lengths, size),
    "streaming": lambda lengths, size: ours("streaming", lengths, size),
    "next-fit": lambda lengths, size: ours("next-fit", lengths, size),
    "TRL whole": lambda lengths, size: trl(len(lengths), lengths, size),
    "TRL default": lambda lengths, size: trl(None, lengths, size),
    "plan": plan,
}


# --------------------------------------------------------------------- measure


def worker(args: argparse.Namespace) -> dict[str, Any]:
    """One run of one candidate, alone in this process."""
    lengths = drawn(args.count, args.size, args.seed)
    run, check = CANDIDATES[args.worker](lengths, args.size)
    packed, seconds, mib = script.measured(run)
    found = check(packed)
    fill = int(lengths.sum(dtype=np.int64)) / (found["packs"] * args.size)
    return {"seconds": seconds, "mib": mib, "fill": fill} | found


def measure(args: argparse.Namespace, name: str, count: int, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--count", count, "--size", size]
    command += ["--seed", args.seed]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured(args: argparse.Namespace, console: Console, count: int, size: int) -> dict[str, Any]:
    """Medians for each candidate; TRL takes a minute, so it runs in the first rounds only."""
    names = [name for name in CANDIDATES if name != "plan"]
    if count > args.count:
        names = ["planned", "next-fit", "plan"]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with console.status("") as status:
        for turn in range(args.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if name.startswith("TRL") and len(runs[name]) >= args.trl_rounds:
                    continue
                status.update(f"{count:,} to {size:,}: {name}, round {turn + 1} of {args.rounds}")
                runs[name].append(measure(args, name, count, size))
    keys = ("seconds", "mib", "fill", "packs")
    middle = {n: {k: statistics.median(r[k] for r in of) for k in keys} for n, of in runs.items()}
    return {n: of | {"all_seconds": [r["seconds"] for r in runs[n]]} for n, of in middle.items()}


# ---------------------------------------------------------------------- tables


def goals(result: dict[str, Any], count: int) -> list[str]:
    """A line for each thing that was promised."""
    planned = result["planned"]
    if "TRL whole" not in result:
        times, whole = planned["seconds"] / result["next-fit"]["seconds"], result["plan"]
        return [
            goal(times <= NEXT_FIT, f"planned in {times:.2f}x next-fit's time, at most {NEXT_FIT}"),
            goal(planned["mib"] <= MIB, f"planned in {planned['mib']:.0f} MiB, at most {MIB}"),
            goal(
                whole["seconds"] <= PLAN_SECONDS and whole["mib"] <= MIB,
                f"plan in {whole['seconds']:.1f} s and {whole['mib']:.0f} MiB, at most "
                f"{PLAN_SECONDS} s and {MIB} MiB",
            ),
        ]
    other, stream = result["TRL whole"], result["streaming"]
    faster, smaller = other["seconds"] / planned["seconds"], other["mib"] / planned["mib"]
    fewer, rate = other["packs"] - planned["packs"], count / stream["seconds"]
    return [
        goal(faster >= FASTER, f"planned in 1/{faster:.0f} of TRL's time, 1/{FASTER} or less"),
        goal(smaller >= SMALLER, f"in 1/{smaller:.0f} of its memory, 1/{SMALLER} or less"),
        goal(fewer >= 0, f"{planned['packs']:,.0f} packs, TRL {other['packs']:,.0f}"),
        goal(stream["fill"] >= FILL, f"streaming {stream['fill']:.2%} full, at least {FILL:.1%}"),
        goal(rate >= RATE, f"streaming {rate:,.0f} samples/s, at least {RATE:,}"),
    ]


def table(result: dict[str, Any], count: int, size: int) -> Table:
    """A line per candidate, goals under it."""
    shown = Table(title=f"{count:,} samples, packs of {size:,}", caption_justify="left")
    for column in ("candidate", "s", "from", "to", "samples/s", "MiB", "packs", "fill"):
        shown.add_column(column, justify="left" if column == "candidate" else "right")
    for name, of in result.items():
        seconds = (of["seconds"], min(of["all_seconds"]), max(of["all_seconds"]))
        shown.add_row(
            name, *(f"{s:.3f}" for s in seconds), f"{count / of['seconds']:,.0f}",
            f"{of['mib']:,.0f}", f"{of['packs']:,.0f}", f"{of['fill']:.3%}",
        )  # fmt: skip
    shown.caption = "\n".join(goals(result, count))
    return shown


def balance(args: argparse.Namespace) -> tuple[dict[str, Any], Table]:
    """Most over mean cost of every micro-batch, in the full steps of an epoch."""
    from varlen_sft.data.costs import ModelSizes
    from varlen_sft.data.plan import PlanOptions, make_plan

    lengths = drawn(400_000, SIZES[-1], args.seed, 7.2, 1.3)
    shown = Table(title="most / mean cost of a micro-batch", caption_justify="left")
    for column in ("balance", "mean", "99 % below", "worst", "ranks wait"):
        shown.add_column(column, justify="left" if column == "balance" else "right")
    found = {}
    for kind in ("window", "step", "none"):
        options = PlanOptions(max_tokens=SIZES[-1], ranks=8, accumulate=4, balance=kind)
        plan = make_plan(lengths, lengths, options, ModelSizes(**LLAMA_1B))
        of = plan.imbalance
        found[kind] = {"mean": of.mean, "p99": of.p99, "worst": of.most, "waiting": plan.waiting}
        shown.add_row(
            kind, *(f"{v:.4f}" for v in (of.mean, of.p99, of.most)), f"{plan.waiting:.2%}"
        )
    worst = found["window"]["worst"]
    shown.caption = goal(worst <= UNEVEN, f"worst {worst:.4f}, at most {UNEVEN}")
    return found, shown


def main() -> int:
    parser = script.parser(HELP, __file__)
    parser.add_argument("--count", type=int, default=1_000_000, help="samples (default: 1,000,000)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--trl-rounds", type=int, default=1, help="rounds with TRL (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=CANDIDATES, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args)))
        return 0
    from varlen_sft.tools.environment import environment, version_of

    stamped = environment()
    stamped["versions"] |= {name: version_of(name) for name in ("trl", "datasets")}
    console, results = script.console(), {}
    for count in (args.count, 10 * args.count):
        for size in SIZES:
            results[f"{count} to {size}"] = result = measured(args, console, count, size)
            console.print(table(result, count, size))
    results["balance"], shown = balance(args)
    console.print(shown)
    return script.finish(console, args.json, stamped, results)


if __name__ == "__main__":
    sys.exit(main())
