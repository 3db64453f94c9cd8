"""``varlen-sft train``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.commands.arguments import console, new_command

if TYPE_CHECKING:
    from varlen_sft.train.config import TrainConfig

EXAMPLE = """\
model:
  name: models/SmolLM2-135M-Instruct  # folder in Hugging Face's format, or hub:OWNER/NAME
data:
  train: chats.jsonl                  # raw, or the PREFIX of a prepared set; or [several, of, them]
  valid: held-out.jsonl
stream:
  max_tokens: 4096                    # of a pack
  packs_per_step: 8                   # of all ranks and micro-batches: the global batch
optim:
  lr: 1.0e-4
run:
  out: runs/chats
  epochs: 2
  valid_every: 100
"""
_INDENTED = "".join(f"  {line}\n" for line in EXAMPLE.splitlines())

DESCRIPTION = f"""\
Fine-tune a model on packs of conversations: from chats to a checkpoint that Hugging Face opens.

CONFIG is YAML, such as:

{_INDENTED}
What is not said has a default. --key value on the command line is over the file; a key is given by
its path (--optim.lr) or its last part (--lr), there as in the file. Names of nanotron, torchtune
and axolotl are understood (train_on_completions_only, packing, remove_cross_attention,
conversation_column_name, hf_dataset, hf_dataset_split, sequence_len, learning_rate, ...). An
unknown key is an error that names the nearest.

Raw sources are tokenised once, into OUT/prepared, and found again as long as rows, template and
settings are the same. OUT holds config.yaml (all keys as they were taken), log.jsonl, checkpoints,
and at the end the model and report.html: curves, data, and the answers that the model gave to the
first held-out conversations at each validation (log.samples, log.sample_tokens). `varlen-sft report
OUT` writes that page at any time. Killed and started again a run goes on from its newest
checkpoint; SIGTERM and Ctrl-C finish the step and save first.

While it runs two lines show the loss, that of each role that is trained and of the tokens that end
an answer, tokens/s, fill, TFLOP/s with their MFU (where the device's peak is known, or given by
--peak_tflops), the share of the time in which the loader was waited for, the memory at its peak
and the time left. --tensorboard true (to OUT/tensorboard) and --wandb PROJECT get these, too.

--mock-data asks whether the loader is the bottleneck: the same steps (50, if there is no run.steps)
on made-up tokens from memory, with lengths and weights of the prepared sets that are there, else
log-normal ones. Nothing is saved but OUT/mock.jsonl; at the end its speed is held against that of
the run in OUT/log.jsonl, and against the time in which that run waited.

On several GPUs, or machines, start it with torchrun: steps hold the same packs on any number.
SIGTERM or Ctrl-C to torchrun reaches every rank: all finish the same step, save, and end with 0.
torchrun itself then ends with a traceback of its SignalException and exit code 1, and ranks that
are not done after 30 s it kills (for longer steps: --shutdown-timeout, where torchrun has it); the
checkpoint before stays. SIGTERM to one rank alone stops all of them as well, and torchrun ends
with 0. A rank that dies or does not answer is named by the others within dist.timeout_s.
"""
EXAMPLES = """\
examples:
  varlen-sft train run.yaml
  varlen-sft train run.yaml --lr 3e-4 --out runs/other
  varlen-sft train --name DIR --train chats.jsonl --out runs/chats --steps 100
every key with its meaning, as this run would take it (of the file above, if no file is named):
  varlen-sft train run.yaml --print_config
LoRA on a model of another family, and a Llama from scratch:
  varlen-sft train run.yaml --name hub:Qwen/Qwen3-0.6B --lora_rank 16
  varlen-sft train run.yaml --random_init
does the run of this file wait for its loader? (some of its steps are in OUT already)
  varlen-sft train run.yaml --mock-data
eight GPUs of one machine:
  torchrun --nproc-per-node=8 -m varlen_sft.cli train run.yaml
"""
_HELP, _PRINT, _DEBUG = ("-h", "--help"), ("--print_config", "--print-config"), ("--debug",)


def add_parser(commands: Any) -> None:
    """Add ``train``; its keys are those of ``train.config``, which are read when it runs."""
    train = new_command(
        commands,
        "train",
        run,
        help="fine-tune a model on packs, on one machine or many",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    train.usage = "varlen-sft train [CONFIG] [--key value ...]"
    train.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML, see above")
    train.add_argument(
        *_PRINT, action="store_true", help="print the configuration, with meanings, and end"
    )
    setattr(train, "parse_known_args", partial(_parse, train))  # noqa: B010


def _parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    namespace: argparse.Namespace | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Flags, the file if it comes first, and all else for ``read_config``: argparse knows no keys.

    With ``nargs="*"`` it would take the value of an unknown key for the file.
    """
    flags = [word for word in arguments if word in (*_HELP, *_PRINT, *_DEBUG)]
    rest = [word for word in arguments if word not in flags]
    file = [rest.pop(0)] if rest and not rest[0].startswith("-") else []
    parsed, _ = argparse.ArgumentParser.parse_known_args(parser, [*file, *flags], namespace)
    parsed.overrides = rest
    return parsed, []


def run(args: argparse.Namespace) -> int:
    """Train, or print the configuration; 0."""
    config = _config(args)
    if args.print_config:
        from varlen_sft.train.config_out import dump

        print(dump(config), end="")
        return 0
    from varlen_sft.tools.prepare import progress_on
    from varlen_sft.tools.run_report import write_run_report
    from varlen_sft.train.run import run as train

    screen = console()
    train(config, screen, partial(progress_on, screen), write_run_report)
    return 0


def _config(args: argparse.Namespace) -> TrainConfig:
    from varlen_sft.train.config_file import parse_config, read_config

    if args.config is None and args.print_config and not args.overrides:
        return parse_config(EXAMPLE)
    return read_config(args.config, args.overrides)
