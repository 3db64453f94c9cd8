"""Options of every command that reads rows and masks them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from varlen_sft.commands.arguments import ROLES, adder
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.masks import MaskOptions

SOURCE = "a file, a folder or hub:NAME, see above"
SOURCES = """\
FILE holds conversations, texts or tokens: JSON lines or JSON (also in gzip or zstd), Parquet,
Arrow, a folder of datasets.save_to_disk, Megatron's .bin/.idx, ChatterBot YAML; or it is
hub:OWNER/NAME. Before it, sft: refuses rows that do not say what is trained, pretrain: trains every
token, search: finds the answers in rows of tokens; after it, @SPLIT picks one of several.
"""
# As in data.masks.MaskOptions, which would import numpy.
SUPERVISION_MODES = ("assistant", "last_assistant", "all", "roles")
HISTORIES = ("as_rendered", "preserve", "per_assistant")
ON_CONTROL = ("error", "text")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """How rows are read: ``sample_processor`` and ``mask_token_ids``."""
    group = parser.add_argument_group("how rows are read")
    add = adder(group)
    add("--sample-processor", "a function that makes a row that is known of one that is not", str,
        None, "MODULE:FUNCTION")  # fmt: skip
    group.add_argument(
        "--mask-token-id",
        dest="mask_token_ids",
        action="append",
        type=int,
        metavar="ID",
        help="never trained in rows of input_ids (an image token); give it again for another",
    )


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """What is trained: the fields of ``data.masks.MaskOptions``; read them by mask_options."""
    group = parser.add_argument_group("what is trained")
    _choice(group, "--supervision-mode", SUPERVISION_MODES, "which messages")
    group.add_argument(
        "--train-role",
        dest="train_roles",
        action="append",
        choices=ROLES[1:],
        help="with --supervision-mode roles; give it again for another",
    )
    _choice(group, "--history", HISTORIES, "where a template rewrites earlier answers")
    adder(group)("--prompt-weight", "of tokens that are no answer", float, 0.0, "W")
    group.add_argument(
        "--equal-sample-weight", action="store_true", help="the weights of a row sum to 1"
    )
    group.add_argument(
        "--mask-special-tokens",
        action="store_true",
        help="special tokens are not trained, but for the stop tokens of answers",
    )
    _choice(group, "--on-control", ON_CONTROL, "an answer that spells a header or a stop token")


def _choice(group: Any, flag: str, known: tuple[str, ...], text: str) -> None:
    shown = f"{text} (default: {known[0]})"
    group.add_argument(flag, choices=known, default=known[0], help=shown)


def mask_options(args: argparse.Namespace) -> MaskOptions:
    """What ``add_mask_options`` asked for; InputError for options that contradict each other."""
    from varlen_sft.data.masks import MaskOptions

    names = MaskOptions.__dataclass_fields__.keys() - {"roles"}
    try:
        return MaskOptions(
            roles=tuple(args.train_roles or ()), **{name: getattr(args, name) for name in names}
        )
    except ValueError as error:
        raise InputError(str(error)) from None
