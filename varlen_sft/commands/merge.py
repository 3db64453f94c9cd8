"""``varlen-sft merge``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import console, new_command

DESCRIPTION = """\
Put together what `varlen-sft prepare --shard` made: the files are, byte for byte, those that one
process would have written.

The parts lie in PREFIX.parts, where shards that see the same folder leave them. Where they do not,
name the folders of all. Parts that are missing are told by their number; those of another
fingerprint are refused.
"""
EXAMPLES = """\
examples:
  varlen-sft merge data/chats
  varlen-sft merge data/chats host1/chats.parts host2/chats.parts
"""


def add_parser(commands: Any) -> None:
    """Add ``merge`` and its options."""
    merge = new_command(
        commands,
        "merge",
        run,
        help="put the shards of prepare together",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    merge.add_argument("prefix", type=Path, metavar="PREFIX", help="the --out of the shards")
    merge.add_argument(
        "folders", nargs="*", type=Path, metavar="PARTS", help="folders (default: PREFIX.parts)"
    )
    merge.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="parts that left out rows which cannot be used (default: error)",
    )
    merge.add_argument("--force", action="store_true", help="replace a set of another fingerprint")


def run(args: argparse.Namespace) -> int:
    """Merge; 0."""
    from varlen_sft.tools import prepare

    prepare.run_merge(args.prefix, args.folders, args.on_error, args.force, console())
    return 0
