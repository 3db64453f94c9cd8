"""``varlen-sft check``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive

DESCRIPTION = """\
Prove on a model that packing changes nothing but the cost.

Packs conversations in random order and compares with Hugging Face's own model, which runs each of
them alone: the most likely next token and the logits of every position, the tokens that `generate`
writes, loss and every gradient; that order, neighbours and a pad tail change nothing; that no
gradient crosses an edge. Bounds are derived from the error of Hugging Face's own model against the
next higher precision.

Prints a row per property and names the first layer that differs. Exits with 0 when everything
holds, 1 when something does not, 2 for bad input.
"""
EXAMPLES = """\
examples:
  varlen-sft check                               SmolLM2-135M-Instruct, about two minutes
  varlen-sft check FOLDER --data chats.jsonl     your own model and conversations
  varlen-sft check FOLDER --dtype bf16 --html check.html
"""


def add_parser(commands: Any) -> None:
    """Add ``check`` and its options."""
    check = new_command(
        commands,
        "check",
        run,
        help="prove that a pack computes what its conversations compute alone",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add = adder(check)
    check.add_argument(
        "model",
        nargs="?",
        type=Path,
        metavar="MODEL",
        help="HF checkpoint folder of a Llama (default: SmolLM2-135M-Instruct, as in the demo)",
    )
    add("--data", "JSON lines of conversations, instead of generated ones", Path, None, "FILE")
    check.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    add("--conversations", "how many are packed", positive(int), 50, "N")
    add("--prompts", "how many HF answers", positive(int), 10, "N")
    add("--generated", "tokens of each answer", positive(int), 64, "N")
    add("--seed", "of conversations and their order", int, 0, "SEED")
    add("--json", "write all figures", Path, None, "FILE")
    add("--html", "write a page with errors per layer and position", Path, None, "FILE")


def run(args: argparse.Namespace) -> int:
    """Run the check; 0 when everything holds, else 1."""
    from varlen_sft.tools import check
    from varlen_sft.tools.demo_model import smollm2_folder

    wanted = {name: getattr(args, name) for name in check.CheckOptions.__dataclass_fields__}
    wanted["model"] = args.model or smollm2_folder()
    return 0 if check.run(check.CheckOptions(**wanted), console()) else 1
