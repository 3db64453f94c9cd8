"""``varlen-sft check``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive
from varlen_sft.errors import InputError

DESCRIPTION = """\
Prove on a model that packing changes nothing but the cost.

Packs conversations in random order and compares with Hugging Face's own model, which runs each of
them alone: the most likely next token and the logits of every position, the tokens that `generate`
writes, loss and every gradient; that order, neighbours and a pad tail change nothing; that no
gradient crosses an edge. Bounds are derived from the error of Hugging Face's own model against the
next higher precision.

A Llama is compared as LlamaForSFT, any other supported family as Hugging Face's model after
varlen_sft.patch; each implementation that runs here is asked. Hugging Face's own padded and packed
batches are measured beside it.

Prints a row per property and names the first layer that differs. Exits with 0 when everything
holds, 1 when something does not, 2 for bad input.

With --batch it reads a batch of your own set-up instead and names the well-known mistakes in it: a
mask beside packed ids, positions not reset, zero-padded position ids, boundary labels that are
trained, labels shifted twice, pad = eos masked by value, RoPE that depends on the longest of the
batch. FILE is .safetensors, or .json as json.dump({k: v.tolist() if hasattr(v, "tolist") else v
for k, v in batch.items()}, file) writes it; add "lengths" or "samples" (token ids of each) and
nothing is guessed. MODEL then gives its stop tokens, pad token and RoPE; no weights are read. The
same in a script, also with the model itself: varlen_sft.tools.check_setup.inspect_batch.
"""
EXAMPLES = """\
examples:
  varlen-sft check                               SmolLM2-135M-Instruct, about two minutes
  varlen-sft check FOLDER --data chats.jsonl     your own model and conversations
  varlen-sft check FOLDER --dtype bf16 --html check.html
  varlen-sft check FOLDER --batch batch.json     a batch of your own collator
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
        help="HF checkpoint folder (default: SmolLM2-135M-Instruct, as in the demo)",
    )
    add("--data", "JSON lines of conversations, instead of generated ones", Path, None, "FILE")
    check.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="(default: fp32)")
    add("--conversations", "how many are packed", positive(int), 50, "N")
    add("--prompts", "how many HF answers", positive(int), 10, "N")
    add("--generated", "tokens of each answer", positive(int), 64, "N")
    add("--seed", "of conversations and their order", int, 0, "SEED")
    add("--batch", "inspect this batch instead, see above", Path, None, "FILE")
    add("--json", "write all figures", Path, None, "FILE")
    add("--html", "write a page with errors per layer and position", Path, None, "FILE")


def run(args: argparse.Namespace) -> int:
    """Run the check; 0 when everything holds, else 1."""
    if args.batch is not None:
        return _run_batch(args)
    from varlen_sft.tools import check
    from varlen_sft.tools.demo_model import smollm2_folder

    wanted = {name: getattr(args, name) for name in check.CheckOptions.__dataclass_fields__}
    wanted["model"] = args.model or smollm2_folder()
    return 0 if check.run(check.CheckOptions(**wanted), console()) else 1


def _run_batch(args: argparse.Namespace) -> int:
    """Inspect a batch; 0 when nothing is certainly wrong, else 1."""
    from varlen_sft.tools import check_batch_file

    if args.data is not None or args.html is not None:
        raise InputError("--batch inspects one batch: it takes MODEL and --json, no other file")
    return 0 if check_batch_file.run(args.batch, args.model, args.json, console()) else 1
