"""``varlen-sft check --batch``: a batch that was written to a file, and what is wrong with it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.errors import InputError
from varlen_sft.tools.check_batch import BatchView
from varlen_sft.tools.check_mistake import Mistake, ModelFacts
from varlen_sft.tools.check_setup import inspect_view
from varlen_sft.words import count

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["read_batch", "run"]

HOW = (
    "json.dump({key: value.tolist() if hasattr(value, 'tolist') else value "
    "for key, value in batch.items()}, file)"
)


def run(batch: Path, model: Path | None, out: Path | None, console: Console) -> bool:
    """Inspect a batch, print what was found, write it to ``out`` as JSON.

    Args:
        batch: see ``read_batch``.
        model: a checkpoint folder, of which only the small files are read; None for none.
        out: where the JSON goes; None for nowhere.

    Returns:
        Whether nothing is certainly wrong.

    Raises:
        InputError: a file that cannot be read, or a batch that makes no sense.
    """
    facts = ModelFacts() if model is None else ModelFacts.from_folder(model)
    fields = read_batch(batch)
    samples = fields.pop("samples", None)
    try:
        view = BatchView.of(fields, samples)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(str(error), file=batch) from error
    mistakes = inspect_view(view, facts)
    _screen(console, batch, view, mistakes)
    if out is not None:
        out.write_text(json.dumps(_result(view, mistakes), indent=2), encoding="utf-8")
    return not any(mistake.certain for mistake in mistakes)


def read_batch(path: Path) -> dict[str, Any]:
    """Tensors or lists by name, from ``.safetensors`` or ``.json``.

    A JSON file may hold ``samples`` besides: a list of lists of token ids, or of objects with
    ``input_ids`` and ``labels``.

    Raises:
        InputError: no such file, another format, or one that is damaged.
    """
    if not path.is_file():
        raise InputError("no such file", file=path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            read = load_file(path)
            # Such a file holds tensors alone: one of no axes was a number.
            return {key: value if value.dim() else value.item() for key, value in read.items()}
        except (SafetensorError, OSError) as error:
            raise InputError(f"not a readable safetensors file: {error}", file=path) from error
    if path.suffix != ".json":
        raise InputError(
            f"a batch is read from .safetensors or .json, got {path.suffix or 'no suffix'!r} (a "
            f"pickle would run code); write it with {HOW}",
            file=path,
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file=path) from error
    if not isinstance(fields, dict):
        raise InputError("must hold an object of lists by name", file=path)
    return fields


def _screen(console: Console, path: Path, view: BatchView, mistakes: list[Mistake]) -> None:
    rows, length = view.input_ids.shape
    console.print(
        f"{path}: {count(rows, 'row')} of {length:,} tokens, "
        f"{count(len(view.spans), 'sample')} by {view.known_by}\n",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    for mistake in mistakes:
        look = "bold red" if mistake.certain else "bold yellow"
        title, _, rest = str(mistake).partition(": ")
        console.print(title, style=look, highlight=False, markup=False)
        console.print(f"  {rest}\n", highlight=False, markup=False)
    wrong = sum(mistake.certain for mistake in mistakes)
    suspected = len(mistakes) - wrong
    words = [count(wrong, "mistake")] if wrong else ["no mistake found"]
    words += [f"{suspected} suspected"] if suspected else []
    console.print(", ".join(words), highlight=False, markup=False)


def _result(view: BatchView, mistakes: list[Mistake]) -> dict[str, Any]:
    rows, length = view.input_ids.shape
    return {
        "rows": rows,
        "columns": length,
        "known_by": view.known_by,
        "samples": [{"row": s.row, "start": s.start, "end": s.end} for s in view.spans],
        "mistakes": [asdict(mistake) for mistake in mistakes],
    }
