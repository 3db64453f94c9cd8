"""Files and folders of rows, told apart by what they contain and not by their names."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from varlen_sft.data import arrow_rows, megatron, store
from varlen_sft.data.conversation import ConversationError, kind_of
from varlen_sft.data.json_rows import BYTE_ORDER_MARK, json_array, json_lines
from varlen_sft.errors import InputError

Opener = Callable[[], BinaryIO]
LineReader = Callable[[BinaryIO], Iterable[tuple[int, Any]]]

HEAD = 1 << 12
"""Bytes that decide what a file is."""

MAX_YAML_BYTES = 1 << 26
"""YAML cannot be read in pieces, so a larger file is refused."""

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_PARQUET, _ARROW, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_UNREADABLE = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "compressed with bzip2, only gzip and zstd are read",
    b"\xfd7zXZ": "compressed with xz, only gzip and zstd are read",
    b"SQLite format 3": "an SQLite data base",
    b"\x89HDF": "an HDF5 file",
    megatron.MAGIC: "a Megatron index without its data: expected PREFIX.idx beside PREFIX.bin",
    b"\x80\x04": "a pickle, which could run code when it is read",
    b"\x80\x02": "a pickle, which could run code when it is read",
}
# A mapping's key, a list, a comment or a document's start; JSON begins with none of them.
_YAML = re.compile(rb"(---|#|%YAML|- |[A-Za-z_]+:(\s|$))")


def read_dicts(
    path: str | os.PathLike[str],
    *,
    split: str | None = None,
    with_mask: bool = False,
    lines: LineReader = json_lines,
) -> Iterator[tuple[int, Any]]:
    """Stream ``(number, row)``; a row is a JSON object, or a ConversationError where it is none.

    Read are, in constant memory: JSON lines and JSON arrays, also inside gzip or zstd; Parquet;
    Arrow IPC files and streams; folders of ``datasets.save_to_disk``; Megatron's ``.bin/.idx``, by
    its prefix or either file, with their weights if `varlen-sft prepare` made them. YAML of the
    ChatterBot corpus is read whole. Rows count from 1; those of JSON lines are physical lines. The
    file is opened at once, before the first row.

    Args:
        path: file, folder or prefix.
        split: of a folder with several.
        with_mask: see ``megatron.megatron_rows``; for other files it changes nothing.
        lines: what reads JSON lines; ``json_rows.raw_lines`` leaves them as bytes.

    Raises:
        InputError: with file, and row where there is one: it cannot be opened, is none of the
            above, or is damaged so that no further row can be found.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path, split)
    if split is not None:
        raise InputError(f"is a file and has no split {split!r}", file=path)
    prefix = megatron.prefix_of(path)
    if prefix is not None:
        if store.is_prepared(prefix):
            return store.store_rows(prefix)
        return megatron.megatron_rows(prefix, with_mask=with_mask)
    return _file(path, lines)


def is_there(path: Path) -> bool:
    """Whether there is something to read: a file, a folder, or a Megatron prefix."""
    return path.exists() or megatron.prefix_of(path) is not None


def _folder(path: Path, split: str | None) -> Iterator[tuple[int, Any]]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _need("pyarrow", "a folder of datasets.save_to_disk", path)
        return arrow_rows.saved_rows(path, split)
    raise InputError("is a folder, expected a file or a folder of datasets.save_to_disk", file=path)


def _file(path: Path, lines: LineReader) -> Iterator[tuple[int, Any]]:
    head = _head(path, lambda: path.open("rb"))
    for magic, kind in _UNREADABLE.items():
        if head.startswith(magic):
            raise InputError(f"is {kind}", file=path)
    if head.startswith(_PARQUET):
        _need("pyarrow", "Parquet", path)
        return arrow_rows.parquet_rows(path)
    if head.startswith((_ARROW, _ARROW_STREAM)):
        _need("pyarrow", "Arrow", path)
        return arrow_rows.arrow_rows([path])
    return _text(path, _opener(path, head), lines)


def _opener(path: Path, head: bytes) -> Opener:
    """Opens the text of a file, through its decompressor if it is compressed."""
    if head.startswith(_GZIP):
        return lambda: io.BufferedReader(gzip.GzipFile(path, "rb"))
    if head.startswith(_ZSTD):
        _need("pyarrow", "zstd", path)
        return lambda: _open_zstd(path)
    return lambda: path.open("rb")


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


def _text(path: Path, opener: Opener, lines: LineReader) -> Iterator[tuple[int, Any]]:
    head = _head(path, opener)
    if head.startswith((_PARQUET, _ARROW, _ARROW_STREAM)):
        raise InputError("is Parquet or Arrow inside gzip or zstd: unpack it first", file=path)
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"["):
        read: LineReader = json_array
    elif _YAML.match(text):
        _need("yaml", "YAML", path)
        read = chatterbot_rows
    else:
        read = lines
    return _guarded(path, opener, read)


def _head(path: Path, opener: Opener) -> bytes:
    try:
        with opener() as file:
            return file.read(HEAD)
    except FileNotFoundError:
        raise InputError("no such file", file=path) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot be read: {reason}", file=path) from None


def _guarded(
    path: Path,
    opener: Opener,
    read: LineReader,
) -> Iterator[tuple[int, Any]]:
    """The rows of a text file, with its name on what goes wrong."""
    number = 0
    try:
        with opener() as file:
            for number, row in read(file):
                yield number, row
    except InputError as error:
        raise InputError(error.reason, file=path, row=error.row) from None
    except (OSError, EOFError, zlib.error) as error:
        reason = f"damaged after this row: {getattr(error, 'strerror', None) or error}"
        raise InputError(reason, file=path, row=number) from None


def chatterbot_rows(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """``(number, row)`` of YAML like the ChatterBot corpus: lists of user and bot in turn.

    Raises:
        InputError: not YAML, or without a list ``conversations`` of lists.
    """
    import yaml

    data = file.read(MAX_YAML_BYTES + 1)
    if len(data) > MAX_YAML_BYTES:
        raise InputError(f"YAML of more than {MAX_YAML_BYTES >> 20} MiB is not read")
    try:
        found = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"not YAML: {' '.join(str(error).split())}") from None
    lists = found.get("conversations") if isinstance(found, dict) else None
    if not isinstance(lists, list):
        raise InputError("YAML without a list 'conversations', as the ChatterBot corpus has it")
    for number, lines in enumerate(lists, 1):
        if not isinstance(lines, list):
            yield number, ConversationError(f"must be a list of texts, got {kind_of(lines)}")
            continue
        yield (
            number,
            {
                "messages": [
                    {"role": ("user", "assistant")[place % 2], "content": line}
                    for place, line in enumerate(lines)
                ]
            },
        )


def _need(module: str, kind: str, path: Path) -> None:
    try:
        __import__(module)
    except ImportError:
        reason = f"is {kind}, which needs {module}: pip install 'varlen-sft[data]'"
        raise InputError(reason, file=path) from None
