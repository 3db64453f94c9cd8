"""``varlen-sft plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive
from varlen_sft.errors import InputError

DESCRIPTION = """\
What an epoch of a prepared set will be, before a GPU is rented: packs and their fill, steps, tokens
and supervised tokens per step, samples too long for a pack and what is done with them, how evenly
the ranks are loaded, and FLOPs. Lengths decide all of it; weights are read once, to be counted.

A step is --packs-per-step packs, dealt to the ranks and their micro-batches; by default one pack
for each. The load of a pack is a*T + sum l^2 over its samples, with a from the sizes in the model's
config.json; without --model only tokens count, and no FLOPs are told. Steps are those that training
runs with the same seed; epochs after the first hold other packs, of as many tokens.
"""
EXAMPLES = """\
examples:
  varlen-sft plan data/chats --max-tokens 4096
  varlen-sft plan data/chats --max-tokens 32768 --ranks 8 --accumulate 4 --model DIR --epochs 3
  varlen-sft plan data/chats --max-tokens 8192 --html plan.html --json plan.json
"""
# As in data.packing, data.balance and data.overlong, which would import numpy.
METHODS = ("planned", "streaming", "next-fit", "none")
BALANCES = ("window", "step", "none")
OVERLONG = ("error", "drop", "truncate", "split")


def add_parser(commands: Any) -> None:
    """Add ``plan`` and its options."""
    plan = new_command(
        commands,
        "plan",
        run,
        help="tell what an epoch of a prepared set will be",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    plan.add_argument("prefix", type=Path, metavar="PREFIX", help="of the prepared set")
    plan.add_argument(
        "--max-tokens", type=positive(int), required=True, metavar="T", help="most in a pack"
    )
    add = adder(plan)
    add("--packs-per-step", "ranks x accumulation if not given", positive(int), None, "P")
    add("--ranks", "processes that share a step", positive(int), 1, "R")
    add("--accumulate", "micro-batches of a rank in a step", positive(int), 1, "A")
    add("--epochs", "tells the steps for so many", positive(float), 1.0, "N")
    add("--model", "HF folder, for loads and FLOPs; its config.json is read", Path, None, "DIR")
    add("--seed", "of the order of samples", int, 0, "SEED")
    _choice(plan, "--packing", METHODS, "how samples are put into packs")
    add("--window", "samples that --packing streaming chooses from", positive(int), 64, "W")
    _choice(plan, "--balance", BALANCES, "among which packs loads are evened out")
    _choice(plan, "--overlong", OVERLONG, "what prepare would do with samples too long for a pack")
    add("--html", "write a page", Path, None, "FILE")
    add("--json", "write all figures", Path, None, "FILE")


def _choice(parser: argparse.ArgumentParser, flag: str, known: tuple[str, ...], text: str) -> None:
    shown = f"{text} (default: {known[0]})"
    parser.add_argument(flag, choices=known, default=known[0], help=shown)


def run(args: argparse.Namespace) -> int:
    """Plan and print; 0."""
    import json

    from varlen_sft.data.costs import ModelSizes
    from varlen_sft.data.packs import OverlongSample
    from varlen_sft.data.plan import PlanOptions, make_plan
    from varlen_sft.data.store import Store
    from varlen_sft.tools.plan_show import plan_page, screen

    options = PlanOptions(
        max_tokens=args.max_tokens,
        packs_per_step=args.packs_per_step,
        ranks=args.ranks,
        accumulate=args.accumulate,
        method=args.packing,
        window=args.window,
        balance=args.balance,
        overlong=args.overlong,
        epochs=args.epochs,
        seed=args.seed,
    )
    sizes = None if args.model is None else ModelSizes.from_folder(args.model)
    store = Store(args.prefix)
    try:
        plan = make_plan(_rows(store), store.supervised, options, sizes)
    except OverlongSample as error:
        raise InputError(
            f"the sample takes {error.length:,} rows of a pack, which has {args.max_tokens:,}; "
            f"too long: {error.count:,} of {len(store):,}. Take a larger --max-tokens; --overlong "
            "drop, truncate or split tells what `prepare` would come to with such a policy",
            file=store.prefix,
            row=error.sample + 1,
        ) from None
    title = f"{args.prefix}: packs of {args.max_tokens:,} tokens"
    files = {args.html: plan_page(plan, title), args.json: json.dumps(plan.to_dict(), indent=1)}
    files.pop(None, None)
    for path, text in files.items():
        _write(path, text + "\n")
    screen(console(), plan, title)
    for path in files:
        console().print(f"written: {path}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _write(path: Path, text: str) -> None:
    from varlen_sft.data.files import write_whole

    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=path) from None


def _rows(store: Any) -> Any:
    """(N,) int32: input tokens of each sample."""
    rows = store.lengths - 1
    if not rows.all():
        at = int(rows.argmin())
        raise InputError(
            "a sample must have 2 tokens or more, has 1", file=store.prefix, row=at + 1
        )
    return rows
