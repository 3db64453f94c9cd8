"""``varlen-sft show``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import ROLES, adder, console, new_command, positive
from varlen_sft.commands.data_options import (
    SOURCE,
    SOURCES,
    add_mask_options,
    add_source_options,
    mask_options,
)

DESCRIPTION = f"""\
See what a row of a data file trains, token by token.

Prints the text with what is trained in brackets, then a line per token: its text with white space
made visible, id, role, and what the model learns when it reads it (the label, after the shift by
one) with its weight. With several rows, or --pack, also where sequences begin (cu_seqlens) and
which tokens see each other.

With --step, a pack of a training step of a run over a prepared set: what a spike of the loss was
trained on.

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
    add = adder(show.add_argument_group("steps of a run; FILE is the prepared set's prefix"))
    add("--step", "which step, from 1 as a run counts them; lists its packs and shows one",
        positive(int), None, "N")  # fmt: skip
    add("--step-pack", "which pack of the step is shown, from 1", positive(int), 1, "K")
    add("--state", "any state of that run's stream: the JSON of PackStream.state_dict()", Path,
        None, "STATE")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Show the rows; 0."""
    from varlen_sft.tools import show
    from varlen_sft.tools.demo_model import smollm2_folder

    masks = mask_options(args)  # what can be told at once is not told after a conversion
    names = (
        "file", "html", "max_tokens", "pack", "pack_rows", "sample_processor", "state", "step",
        "step_pack",
    )  # fmt: skip
    options = show.ShowOptions(
        model=args.model or smollm2_folder(),
        rows=tuple(args.rows or (1,)),
        roles=tuple(args.roles or ()),
        mask_token_ids=tuple(args.mask_token_ids or ()),
        masks=masks,
        **{name: getattr(args, name) for name in names},
    )
    show.run(options, console())
    return 0
