"""``varlen-sft show``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.commands.arguments import ROLES, adder, console, new_command, positive
from varlen_sft.commands.data_options import (
    SOURCE,
    SOURCES,
    add_mask_options,
    add_source_options,
    mask_options,
)
from varlen_sft.commands.plan import BALANCES, METHODS

if TYPE_CHECKING:
    from varlen_sft.data.order import OrderOptions

DESCRIPTION = f"""\
See what a row of a data file trains, token by token.

Prints the text with what is trained in brackets, then a line per token: its text with white space
made visible, id, role, and what the model learns when it reads it (the label, after the shift by
one) with its weight. With several rows, or --pack, also where sequences begin (cu_seqlens) and
which tokens see each other.

With --step, a pack of a training step of a run over prepared sets: what a spike of the loss was
trained on. Which samples a step has follows from the sets and from options that the run's --state
holds; without it, give --max-tokens, --packs-per-step and whatever else the run was told.

Rows are tokenised, packed and collated as for training. Exits with 2 and the reason if one cannot
be used.

{SOURCES}"""
EXAMPLES = """\
examples:
  varlen-sft show chats.jsonl                       the first row, with SmolLM2's template
  varlen-sft show chats.jsonl --row 7 --model DIR   row 7, with your own model's
  varlen-sft show chats.jsonl --row 7 --role user   only the user's tokens
  varlen-sft show chats.jsonl --row 7 --row 2       a pack of two rows
  varlen-sft show chats.jsonl --pack --max-tokens 512 --html pack.html
  varlen-sft show chats.jsonl --supervision-mode last_assistant
  varlen-sft show data/chats --step 12345 --state stream.json --model DIR
  varlen-sft show data/chats --step 12345 --max-tokens 4096 --packs-per-step 32 --seed 1 --model DIR
"""


def add_parser(commands: Any) -> None:
    """Add ``show`` and its options."""
    show = new_command(
        commands,
        "show",
        run,
        help="see what a row of a data file trains, token by token",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add = adder(show)
    show.add_argument("file", metavar="FILE", help=SOURCE)
    show.add_argument(
        "--row",
        dest="rows",
        action="append",
        type=positive(int),
        metavar="N",
        help="which row, from 1; several are shown as a pack (default: 1)",
    )
    add("--model", "folder with tokenizer and chat template, instead of SmolLM2's", Path, None,
        "DIR")  # fmt: skip
    show.add_argument(
        "--role",
        dest="roles",
        action="append",
        choices=ROLES,
        help="only tokens of this role, and rows that learn one; give it again for another",
    )
    add("--html", "write a page, instead of text and tokens on the screen", Path, None, "OUT")
    _add_pack_options(show)
    _add_step_options(show)
    add_source_options(show)
    add_mask_options(show)


def _add_pack_options(show: argparse.ArgumentParser) -> None:
    show.add_argument(
        "--pack",
        action="store_true",
        help="the pack that holds the row, when the rows from it on are packed",
    )
    add = adder(show)
    add("--pack-rows", "how many rows --pack packs, 256 if not said", positive(int), None, "N")
    add("--max-tokens", "capacity of a pack; 2048 for --pack, else without bound", positive(int),
        None, "T")  # fmt: skip


def _add_step_options(show: argparse.ArgumentParser) -> None:
    group = show.add_argument_group("steps of a run; FILE is a prepared set's prefix")
    add = adder(group)
    add("--step", "which step, from 1 as a run counts them; lists its packs and shows one",
        positive(int), None, "N")  # fmt: skip
    add("--step-pack", "which pack of the step is shown, from 1", positive(int), 1, "K")
    add("--state", "any state of that run's stream: JSON, of save_state()", Path, None, "STATE")
    add("--packs-per-step", "of the run, with --max-tokens instead of --state", positive(int),
        None, "P")  # fmt: skip
    add("--seed", "of the run; 0 if not said", int, None, "SEED")
    group.add_argument("--packing", choices=METHODS, help="of the run; planned if not said")
    add("--window", "of the run, for --packing streaming; 64 if not said", positive(int), None, "W")
    group.add_argument("--balance", choices=BALANCES, help="of the run; window if not said")
    add("--cost-a", "a of the run's costs a*T + sum l^2; only tokens count if not said",
        positive(int), None, "A")  # fmt: skip
    group.add_argument(
        "--source",
        dest="sources",
        action="append",
        metavar="PREFIX",
        help="a prepared set that the run has after FILE; give it again for another",
    )


def run(args: argparse.Namespace) -> int:
    """Show the rows; 0."""
    from varlen_sft.tools import show
    from varlen_sft.tools.demo_model import smollm2_folder

    masks = mask_options(args)  # what can be told at once is not told after a conversion
    order = _order(args)
    names = (
        "file", "html", "pack", "pack_rows", "sample_processor", "state", "step", "step_pack",
    )  # fmt: skip
    options = show.ShowOptions(
        model=args.model or smollm2_folder(),
        rows=tuple(args.rows or (1,)),
        roles=tuple(args.roles or ()),
        mask_token_ids=tuple(args.mask_token_ids or ()),
        masks=masks,
        max_tokens=args.max_tokens if order is None else None,
        order=order,
        sources=tuple(args.sources or ()),
        **{name: getattr(args, name) for name in names},
    )
    show.run(options, console())
    return 0


def _order(args: argparse.Namespace) -> OrderOptions | None:
    """What the run was told, if it was said here."""
    flags = {"packs_per_step": args.packs_per_step, "seed": args.seed, "method": args.packing,
             "window": args.window, "balance": args.balance, "cost_a": args.cost_a}  # fmt: skip
    said = {name: value for name, value in flags.items() if value is not None}
    if not said:
        return None
    from varlen_sft.data.order import OrderOptions
    from varlen_sft.errors import InputError

    if args.max_tokens is None or args.packs_per_step is None:
        raise InputError("a run's steps need both --max-tokens and --packs-per-step, or --state")
    return OrderOptions(max_tokens=args.max_tokens, **said)
