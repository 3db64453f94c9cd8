"""``varlen-sft convert``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command
from varlen_sft.words import count

DESCRIPTION = """\
Write a set of tokens as JSON lines, one for each sample.

A line is {"input_ids": [...], "loss_mask": [...]}, where entry i of loss_mask is the weight of
token i as a target (not shifted). `varlen-sft prepare` reads it back, tokens and weights bit for
bit. With --decode it is the text instead: {"segments": [{"role", "weight", "text"}, ...]}, to read,
not to train.

PREFIX is a prepared set; or another of Megatron's, and then it says what is trained:
pretrain:PREFIX is text, sft:PREFIX is tokens followed by a mask of labels (entry i is for token
i + 1). Packed rows of Megatron-Bridge ('SFTB') say it themselves, and are taken apart.
"""
EXAMPLES = """\
examples:
  varlen-sft convert data/chats chats.jsonl
  varlen-sft convert data/chats chats.txt.jsonl --decode DIR
  varlen-sft convert pretrain:corpus/books books.jsonl
"""


def add_parser(commands: Any) -> None:
    """Add ``convert`` and its options."""
    convert = new_command(
        commands,
        "convert",
        run,
        help="write a prepared set as JSON lines",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    convert.add_argument("source", metavar="PREFIX", help="of the set, see above")
    convert.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    add = adder(convert)
    add("--decode", "write text, by the tokenizer in this folder", Path, None, "MODEL")


def run(args: argparse.Namespace) -> int:
    """Convert; 0."""
    from varlen_sft.data.chat import ChatTokenizer
    from varlen_sft.data.convert import convert

    tokenizer = None if args.decode is None else ChatTokenizer.from_folder(args.decode)
    samples = convert(args.source, args.out, tokenizer)
    told = f"{args.out}: {count(samples, 'sample')}"
    console().print(told, markup=False, highlight=False)
    return 0
