"""The command line. Each command imports what it needs when it runs; ``--help`` imports nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from varlen_sft import __version__
from varlen_sft.commands import (
    bench,
    check,
    convert,
    demo,
    doctor,
    merge,
    plan,
    prepare,
    report,
    show,
    train,
)
from varlen_sft.errors import InputError, RunError

COMMANDS = (demo, check, doctor, show, prepare, merge, convert, plan, train, report, bench)
"""In the order in which ``--help`` lists them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if a check or a run failed and 2 for bad input, told in one line; 130 after Ctrl-C.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        return args.run(args)
    except (InputError, RunError) as error:
        return _fail(error, args.debug)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("varlen_sft"):
            raise
        return _fail(
            InputError(f"{error.name} is not installed; pip install 'varlen-sft[demo]' brings it"),
            args.debug,
        )
    except KeyboardInterrupt:
        print("\nvarlen-sft: stopped", file=sys.stderr)
        return 130


def _fail(error: InputError | RunError, debug: bool) -> int:
    if debug:
        raise error
    print(f"varlen-sft: error: {error}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="varlen-sft",
        description="Padding-free supervised fine-tuning of Llama-like models.",
    )
    parser.add_argument("--version", action="version", version=f"varlen-sft {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    for made in commands.choices.values():
        made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
