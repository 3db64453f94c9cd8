"""The files of a source, and its rows as workers take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.data import arrow_rows, megatron
from varlen_sft.data.hub_files import hub_files
from varlen_sft.data.json_rows import raw_lines
from varlen_sft.data.readers import is_there, read_dicts
from varlen_sft.data.sources import Source
from varlen_sft.data.store import MANIFEST, SIDECARS, file_of
from varlen_sft.errors import InputError

_BLOCK = 1 << 22


def input_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """``(number, row)`` of a source as ``readers.read_dicts``, JSON lines left as bytes."""
    if source.hub:
        return arrow_rows.arrow_rows(list(hub_files(source)))
    return read_dicts(
        Path(source.name), split=source.split, with_mask=source.mode == "sft", lines=raw_lines
    )


def row_size(row: Any) -> int:
    """About the bytes of a row's text and tokens; of the same row always the same."""
    if isinstance(row, (bytes, str)):
        return len(row)
    if isinstance(row, Mapping):
        return sum(len(key) + row_size(value) for key, value in row.items())
    if isinstance(row, (list, tuple)):
        return sum(map(row_size, row))
    return getattr(row, "nbytes", 8)  # an array, or a number


def input_files(source: Source) -> list[tuple[str, Path, int]]:
    """Name, path and size of each file of a source; the names do not tell where it lies."""
    if source.hub:
        found = [(path.name, path) for path in hub_files(source)]
    else:
        found = sorted(_local_files(source))
    try:
        return [(name, path, path.stat().st_size) for name, path in found]
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=error.filename) from None


def _local_files(source: Source) -> list[tuple[str, Path]]:
    path = Path(source.name)
    if not is_there(path):
        raise InputError("no such file", file=path)
    prefix = megatron.prefix_of(path)
    if path.is_dir():
        folder = path / source.split if source.split else path
        return [(str(p.relative_to(folder)), p) for p in folder.rglob("*") if p.is_file()]
    if prefix is not None:
        suffixes: Sequence[str] = (".bin", ".idx", *SIDECARS, MANIFEST)
        return [(s, file_of(prefix, s)) for s in suffixes if file_of(prefix, s).is_file()]
    if not path.is_file():
        raise InputError("is no regular file: an input is read twice, its hash first", file=path)
    return [("", path)]


def file_blocks(path: Path) -> Iterator[bytes]:
    """A file, a few megabytes at a time; InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
