"""What the commands share: how options are written, and the console."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ROLES = ("none", "system", "user", "assistant", "tool")
"""Those of ``data.sample``, which would import numpy."""


def new_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a command; ``run`` gets its options and returns the exit code."""
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def adder(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> Callable[..., None]:
    """A short way to add an option with one value, whose help tells its default."""

    def add(flag: str, text: str, kind: Callable, default: object, metavar: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)

    return add


def positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """An argparse type: a number above 0."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
        return value

    return parse


def console() -> Console:
    """Where a command prints."""
    from rich.console import Console

    made = Console()
    # A pipe has no width: tables are not cut to a guess.
    return made if made.is_terminal else Console(width=110)
