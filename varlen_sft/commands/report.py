"""``varlen-sft report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from varlen_sft.commands.arguments import new_command

DESCRIPTION = """\
Write OUT/report.html: a run of `varlen-sft train` on one page.

Curves of loss (training, held out, by role), learning rate, gradient norm, throughput, fill and
loader stall; what the data came to and what was left out; and the answers that the model gave to
held-out conversations at each validation. One file without scripts that loads nothing; it can be
sent, printed, and read on a phone.

The page is made of OUT/log.jsonl alone, whether the run has ended, was killed, or still goes on.
`train` writes it at its end.
"""
EXAMPLES = """\
examples:
  varlen-sft report runs/chats
"""


def add_parser(commands: Any) -> None:
    """Add ``report`` and its options."""
    report = new_command(
        commands,
        "report",
        run,
        help="write a run's report.html anew, from its log",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    report.add_argument("out", type=Path, metavar="OUT", help="folder of the run (run.out)")


def run(args: argparse.Namespace) -> int:
    """Write the page; 0."""
    from varlen_sft.tools.run_report import write_run_report

    print(f"written: {write_run_report(args.out)}")
    return 0
