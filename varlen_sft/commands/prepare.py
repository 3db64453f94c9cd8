"""``varlen-sft prepare``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive
from varlen_sft.commands.data_options import (
    SOURCE,
    SOURCES,
    add_mask_options,
    add_source_options,
    mask_options,
)
from varlen_sft.errors import InputError

# As in data.load, data.overlong and data.store, which would import numpy.
ON_ERROR = ("error", "skip")
OVERLONG = ("error", "drop", "truncate", "split")
LAYOUTS = ("sidecar", "tokens+mask")

DESCRIPTION = f"""\
Tokenise and mask rows once, in parallel, and write a data set that trains from then on.

Writes PREFIX.bin and PREFIX.idx, which Megatron reads too (int32, one document per sample), the
weights and roles of all tokens beside them, and PREFIX.manifest.json: the fingerprint of inputs,
template, tokenizer and settings, counts, and what each reader of the files would train. Megatron's
GPTDataset trains every token of them; --layout tokens+mask writes each document as its tokens and
then a mask of its labels (entry i is for token i + 1), as Megatron's readers for fine-tuning take
it.

Killed at any time and run again it goes on, from finished chunks in PREFIX.parts, and the files
come out byte for byte the same, however many worked. Run again when it is done, it does nothing;
what has another fingerprint is replaced with --force only. A bad row, or a full disk, leaves what
was there. A second run on the same PREFIX is refused while one is at work.

On a cluster, start it n times with --shard 1/n ... n/n, anywhere that sees the same folder, then
`varlen-sft merge PREFIX`.

{SOURCES}
What is on the hub is downloaded whole, into the cache of `datasets`, and its files there are hashed
and read. The PREFIX of an earlier set is an input too, with its weights.
"""
EXAMPLES = """\
examples:
  varlen-sft prepare chats.jsonl --model DIR --out data/chats
several sources; of books.bin/.idx every token is trained:
  varlen-sft prepare a.parquet sft:b.jsonl pretrain:books --model DIR --out data/mix --workers 16
cut conversations between turns where they do not fit a pack:
  varlen-sft prepare chats.jsonl --model DIR --out data/chats --max-tokens 4096 --overlong split
leave bad rows out, and list them with the reason in data/chats.rejects.jsonl:
  varlen-sft prepare chats.jsonl --model DIR --out data/chats --on-error skip
one job of eight, in any order and on any machines; after them all, merge:
  varlen-sft prepare chats.jsonl --model DIR --out data/chats --shard 3/8
  varlen-sft merge data/chats
what to do next:
  varlen-sft plan data/chats --max-tokens 4096
"""


def add_parser(commands: Any) -> None:
    """Add ``prepare`` and its options."""
    prepare = new_command(
        commands,
        "prepare",
        run,
        help="tokenise and mask data once, in parallel, for training",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    prepare.add_argument("inputs", nargs="+", metavar="INPUT", help=SOURCE)
    prepare.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with tokenizer and chat template, and config.json for the vocabulary's size",
    )
    prepare.add_argument(
        "--out", type=Path, required=True, metavar="PREFIX", help="of the files to write"
    )
    add = adder(prepare)
    add("--template", "a Jinja file instead of the folder's chat template", Path, None, "FILE")
    add("--workers", "processes; as many as there are cores if not said", positive(int), None, "N")
    add("--shard", "make the parts of shard I of N only", _shard, None, "I/N")
    prepare.add_argument(
        "--layout", choices=LAYOUTS, default=LAYOUTS[0], help="of the files (default: sidecar)"
    )
    prepare.add_argument(
        "--force", action="store_true", help="replace a set, or parts, of another fingerprint"
    )
    _add_row_options(prepare)
    add_source_options(prepare)
    add_mask_options(prepare)


def _add_row_options(prepare: argparse.ArgumentParser) -> None:
    group = prepare.add_argument_group("rows that cannot be used, or do not fit")
    add = adder(group)
    group.add_argument(
        "--on-error",
        choices=ON_ERROR,
        default="error",
        help="a row that cannot be used; those skipped are listed in PREFIX.rejects.jsonl "
        "(default: error)",
    )
    add("--max-tokens", "the most that a pack will hold; none if not said", positive(int), None,
        "T")  # fmt: skip
    group.add_argument(
        "--overlong", choices=OVERLONG, default="error", help="rows longer than it (default: error)"
    )
    add("--cross-check", "of the conversations that are placed a second way: all, none, or one in "
        "N", _cross_check, 100, "N")  # fmt: skip


def _shard(text: str) -> tuple[int, int]:
    first, _, last = text.partition("/")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return int(first), int(last)


def _cross_check(text: str) -> int | str:
    if text in ("all", "none"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be all, none, or 1 or more, got {text!r}")
    return int(text)


def _cores() -> int:
    """Those that this process may use, which a scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(args: argparse.Namespace) -> int:
    """Prepare; 0."""
    from varlen_sft.data.prepare_plan import PrepareOptions, vocabulary_size
    from varlen_sft.tools import prepare

    names = ("model", "out", "template", "shard", "layout", "force", "on_error", "max_tokens",
             "overlong", "cross_check", "sample_processor")  # fmt: skip
    try:
        options = PrepareOptions(
            inputs=tuple(args.inputs),
            masks=mask_options(args),
            workers=args.workers or _cores(),
            mask_token_ids=tuple(args.mask_token_ids or ()),
            vocab_size=vocabulary_size(args.model),
            **{name: getattr(args, name) for name in names},
        )
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(str(error)) from None
    prepare.run(options, console())
    return 0
