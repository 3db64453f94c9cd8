"""The files of a source, and its rows as workers take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.data import megatron
from varlen_sft.data.json_rows import raw_lines
from varlen_sft.data.readers import is_there, read_dicts
from varlen_sft.data.sources import Source
from varlen_sft.data.store import MANIFEST, SIDECARS, file_of
from varlen_sft.errors import InputError

_BLOCK = 1 << 22


def input_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """``(number, row)`` of a source as ``readers.read_dicts``, JSON lines left as bytes."""
    return read_dicts(
        Path(source.name), split=source.split, with_mask=source.mode == "sft", lines=raw_lines
    )


def input_files(source: Source) -> list[tuple[str, Path, int]]:
    """Name, path and size of each file of a source; the names do not tell where it lies."""
    path = Path(source.name)
    if not is_there(path):
        raise InputError("no such file", file=path)
    prefix = megatron.prefix_of(path)
    if path.is_dir():
        folder = path / source.split if source.split else path
        found = [(str(p.relative_to(folder)), p) for p in folder.rglob("*") if p.is_file()]
    elif prefix is not None:
        suffixes: Sequence[str] = (".bin", ".idx", *SIDECARS, MANIFEST)
        found = [(s, file_of(prefix, s)) for s in suffixes if file_of(prefix, s).is_file()]
    else:
        found = [("", path)]
    try:
        return [(name, path, path.stat().st_size) for name, path in sorted(found)]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=error.filename) from None


def file_blocks(path: Path) -> Iterator[bytes]:
    """A file, a few megabytes at a time; InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None


def count_rows(source: Source, lines: int) -> int | None:
    """Rows of a source, at most, if its kind is quick to count."""
    path = Path(source.name)
    prefix = megatron.prefix_of(path)
    if prefix is not None:
        return megatron.read_index(prefix).num_documents
    if path.is_dir():
        return None
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(path).num_rows
    text = head.lstrip()[:1] == b"{"
    return lines if text else None
