"""The command line. Each command imports what it needs when it runs; ``--help`` imports nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from varlen_sft import __version__
from varlen_sft.errors import InputError, RunError

if TYPE_CHECKING:
    from rich.console import Console

DEMO = """\
Fine-tune a real Llama (SmolLM2-135M-Instruct) on real conversations, without one pad token.

What it does: converts the model once into the cache ($VARLEN_SFT_CACHE, or the XDG cache folder);
writes conversations as JSON lines; tokenises them with the model's chat template, supervising the
assistant's answers and their stop tokens only; packs them; trains for about three minutes; and
measures the same conversations as a padded Hugging Face batch and as a pack.

It leaves a Hugging Face checkpoint, the conversations, and a log in --out.
"""
DEMO_EXAMPLES = """\
examples:
  varlen-sft demo                                  everything, about six minutes on two cores
  varlen-sft demo --steps 5 --rounds 1             a quick look
  varlen-sft demo --data chats.jsonl --minutes 10  your own conversations

a line of --data: {"messages": [{"role": "user", "content": "..."},
                                {"role": "assistant", "content": "..."}]}
"""


CHECK = """\
Prove on a model that packing changes nothing but the cost.

Packs conversations in random order and compares with Hugging Face's own model, which runs each of
them alone: the most likely next token and the logits of every position, the tokens that `generate`
writes, loss and every gradient; that order, neighbours and a pad tail change nothing; that no
gradient crosses an edge. Bounds are derived from the error of Hugging Face's own model against the
next higher precision.

Prints a row per property and names the first layer that differs. Exits with 0 when everything
holds, 1 when something does not, 2 for bad input.
"""
CHECK_EXAMPLES = """\
examples:
  varlen-sft check                               SmolLM2-135M-Instruct, about two minutes
  varlen-sft check FOLDER --data chats.jsonl     your own model and conversations
  varlen-sft check FOLDER --dtype bf16 --html check.html
"""


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
    demo = commands.add_parser(
        "demo",
        help="fine-tune a real Llama on real conversations, from nothing to a checkpoint",
        description=DEMO,
        epilog=DEMO_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_demo_options(demo)
    demo.set_defaults(run=_demo)
    check = commands.add_parser(
        "check",
        help="prove that a pack computes what its conversations compute alone",
        description=CHECK,
        epilog=CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_check_options(check)
    check.set_defaults(run=_check)
    for command in (demo, check):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _adder(parser: argparse.ArgumentParser) -> Callable[..., None]:
    def add(flag: str, text: str, kind: Callable, default: object, metavar: str) -> None:
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(flag, type=kind, default=default, metavar=metavar, help=text + shown)

    return add


def _add_check_options(check: argparse.ArgumentParser) -> None:
    add = _adder(check)
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


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    add = _adder(demo)
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


def _demo(args: argparse.Namespace) -> int:
    from varlen_sft.tools.demo import DemoOptions, run

    wanted = {name: getattr(args, name) for name in DemoOptions.__dataclass_fields__}
    run(DemoOptions(**wanted), _console())
    return 0


def _check(args: argparse.Namespace) -> int:
    from varlen_sft.tools.check import CheckOptions, run
    from varlen_sft.tools.demo_model import smollm2_folder

    wanted = {name: getattr(args, name) for name in CheckOptions.__dataclass_fields__}
    wanted["model"] = args.model or smollm2_folder()
    return 0 if run(CheckOptions(**wanted), _console()) else 1


def _console() -> Console:
    from rich.console import Console

    console = Console()
    # A pipe has no width: tables are not cut to a guess.
    return console if console.is_terminal else Console(width=110)


if __name__ == "__main__":
    sys.exit(main())
