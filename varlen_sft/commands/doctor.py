"""``varlen-sft doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.commands.arguments import adder, console, new_command
from varlen_sft.commands.data_options import (
    SOURCES,
    add_mask_options,
    add_source_options,
    mask_options,
)
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.tools.doctor_data import DataOptions

DESCRIPTION = f"""\
Ask whether a chat template is fit for training: is its prompt a prefix of what is trained, where
does an answer end and is that trained, is a header in the loss, is history rewritten, do tokens
straddle an answer's start, is BOS written twice, do two ways to find answers agree? Tried on small
conversations (plain, system, several turns, thinking, tools, white space, control text), and judged
as it would be trained: a template that rewrites history fails, unless --history says what to do.

With --data it reads the file too: what is trained of each role, which rows are refused or train
nothing, the ten strangest rows and why.

With --env alone it prints what would compute each op on this machine, and why.

Exits with 0 if no question fails, 1 if one does, 2 for bad input.

{SOURCES}"""
EXAMPLES = """\
examples:
  varlen-sft doctor FOLDER                                  a model's template
  varlen-sft doctor template.jinja --tokenizer FOLDER       another template with its tokenizer
  varlen-sft doctor FOLDER --data chats.jsonl --json report.json
  varlen-sft doctor FOLDER --history per_assistant          as it would be trained then
  varlen-sft doctor --env
"""


def add_parser(commands: Any) -> None:
    """Add ``doctor`` and its options."""
    doctor = new_command(
        commands,
        "doctor",
        run,
        help="ask whether a chat template, and data with it, is fit for training",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add = adder(doctor)
    doctor.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="TEMPLATE-OR-MODEL",
        help="a folder with tokenizer and chat template, or a Jinja file",
    )
    add("--tokenizer", "of a Jinja file: the folder of a tokenizer", Path, None, "FOLDER")
    add("--data", "rows to examine too, see above", str, None, "FILE")
    add("--cross-check", "how many rows of it are placed a second way", _count, 100, "N")
    add("--json", "write everything that was found", Path, None, "OUT")
    doctor.add_argument(
        "--env",
        action="store_true",
        help="versions, and what would compute each op here; no model is needed",
    )
    add_source_options(doctor)
    add_mask_options(doctor)


def _count(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return number


def run(args: argparse.Namespace) -> int:
    """Examine; 0 if no question failed, else 1."""
    from varlen_sft.tools import doctor

    if args.env:
        if args.model is not None or args.data is not None:
            raise InputError("--env is asked alone: it is about this machine, not about a model")
        doctor.show_environment(console(), args.json)
        return 0
    if args.model is None:
        raise InputError("which TEMPLATE-OR-MODEL? (--env needs none)")
    options = doctor.DoctorOptions(
        model=args.model,
        tokenizer=args.tokenizer,
        data=_data_options(args),
        json=args.json,
        masks=mask_options(args),
    )
    return 0 if doctor.run(options, console()) else 1


def _data_options(args: argparse.Namespace) -> DataOptions | None:
    from varlen_sft.tools.doctor_data import DataOptions

    if args.data is None:
        return None
    return DataOptions(
        source=args.data,
        sample_processor=args.sample_processor,
        mask_token_ids=tuple(args.mask_token_ids or ()),
        cross_check=args.cross_check,
    )
