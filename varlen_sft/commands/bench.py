"""``varlen-sft bench``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import adder, console, new_command, positive
from varlen_sft.errors import InputError

DESCRIPTION = """\
Measure on your own model and data.

--ablation CONFIG: what completions-only and isolation each do. Four runs of the configuration of
`varlen-sft train`, from the same weights, on the same samples in the same packs: trained on answers
alone or on every token, with attention inside each sample or over the whole pack. Told are the
curves of the loss, the loss of held-out answers (data.valid, or else the packs that come after
the last step), real and supervised tokens/s, and TFLOP/s by an honest count and a naive one, which
takes every pack for one full document of scored rows. Nothing of the run's folder is changed, but
that raw sources are prepared in it, as the run itself would.
"""
EXAMPLES = """\
examples:
  varlen-sft bench --ablation run.yaml
  varlen-sft bench --ablation run.yaml --steps 200 --out runs/ablation
  varlen-sft bench --ablation run.yaml --lr 3e-4 --max_tokens 2048    keys of train, over the file
how much the loader costs is told by: varlen-sft train run.yaml --mock-data
"""
STEPS = 30


def add_parser(commands: Any) -> None:
    """Add ``bench`` and its options; other keys are those of ``train.config``."""
    bench = new_command(
        commands,
        "bench",
        run,
        help="measure what masks and isolation do, on your model and data",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    bench.usage = "varlen-sft bench --ablation CONFIG [--steps N] [--out DIR] [--key value ...]"
    bench.allow_abbrev = False  # else --mask would be taken for a key of the configuration
    add = adder(bench)
    add("--ablation", "a configuration of `varlen-sft train`", Path, None, "CONFIG")
    add("--steps", "of each run", positive(int), STEPS, "N")
    text = "for ablation.json and ablation.html (default: ablation in the run's folder)"
    add("--out", text, Path, None, "DIR")
    setattr(bench, "parse_known_args", partial(_parse, bench))  # noqa: B010


def _parse(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str],
    namespace: argparse.Namespace | None = None,
) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and all else for ``read_config``: argparse knows no keys."""
    parsed, rest = argparse.ArgumentParser.parse_known_args(parser, arguments, namespace)
    parsed.overrides = rest
    return parsed, []


def run(args: argparse.Namespace) -> int:
    """Run the four, print and write what they came to; 0."""
    if args.ablation is None:
        raise InputError("what is to be measured? --ablation CONFIG")
    from varlen_sft.tools import ablation
    from varlen_sft.tools.prepare import progress_on
    from varlen_sft.train.config_file import read_config

    config = read_config(args.ablation, args.overrides)
    screen = console()
    out = args.out or config.run.out / "ablation"
    ablation.run(config, args.steps, out, screen, partial(progress_on, screen))
    return 0
