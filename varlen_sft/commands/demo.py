"""``varlen-sft demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive

DESCRIPTION = """\
Fine-tune a real Llama (SmolLM2-135M-Instruct) on real conversations, without one pad token.

What it does: converts the model once into the cache ($VARLEN_SFT_CACHE, or the XDG cache folder);
writes conversations as JSON lines; tokenises them with the model's chat template, supervising the
assistant's answers and their stop tokens only; packs them; trains for about three minutes; and
measures the same conversations as a padded Hugging Face batch and as a pack.

It leaves a Hugging Face checkpoint, the conversations, and a log in --out.
"""
EXAMPLES = """\
examples:
  varlen-sft demo                                  everything, about six minutes on two cores
  varlen-sft demo --steps 5 --rounds 1             a quick look
  varlen-sft demo --data chats.jsonl --minutes 10  your own conversations

a line of --data: {"messages": [{"role": "user", "content": "..."},
                                {"role": "assistant", "content": "..."}]}
"""


def add_parser(commands: Any) -> None:
    """Add ``demo`` and its options."""
    demo = new_command(
        commands,
        "demo",
        run,
        help="fine-tune a real Llama on real conversations, from nothing to a checkpoint",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    add = adder(demo)
    add("--out", "folder for checkpoint, data and log", Path, Path("runs/demo"), "DIR")
    add("--model", "HF checkpoint folder of a Llama, instead of SmolLM2", Path, None, "DIR")
    add("--data", "JSON lines of conversations, instead of the demo's own", Path, None, "FILE")
    add("--minutes", "how long to train", positive(float), 3.0, "M")
    add("--steps", "how many steps to train, instead of --minutes", positive(int), None, "N")
    demo.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="what the model computes in; weights are kept in fp32 either way (default: bf16)",
    )
    add("--max-tokens", "capacity of a pack, in tokens", positive(int), 2048, "T")
    add("--lr", "peak learning rate", positive(float), 3e-4, "LR")
    add("--seed", "of data, order of packs and comparison", int, 0, "SEED")
    add("--rounds", "timed rounds of padded against packed", positive(int), 3, "N")


def run(args: argparse.Namespace) -> int:
    """Run the demo; 0."""
    from varlen_sft.tools import demo

    wanted = {name: getattr(args, name) for name in demo.DemoOptions.__dataclass_fields__}
    demo.run(demo.DemoOptions(**wanted), console())
    return 0
