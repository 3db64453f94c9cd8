"""How many rows an input has, about, without reading it: for the time left that a bar shows."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from varlen_sft.data import megatron
from varlen_sft.data.sources import Source

_SAMPLE = 1 << 23
"""Bytes of compressed lines that are unpacked to see how long they are."""

_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_ARROW = (b"ARROW1", b"\xff\xff\xff\xff")


def count_rows(source: Source, files: Sequence[tuple[str, Path, int]], lines: int) -> int | None:
    """Rows of a source, of compressed lines about; None where nobody knows (JSON arrays, YAML).

    Args:
        files: see ``prepare_inputs.input_files``.
        lines: newlines in them, and what follows the last.
    """
    prefix = None if source.hub else megatron.prefix_of(Path(source.name))
    if prefix is not None:
        return megatron.read_index(prefix).num_documents
    counts = [_in_file(path, size, lines) for _, path, size in files if path.suffix != ".json"
              or len(files) == 1]  # fmt: skip
    return None if None in counts else sum(count for count in counts if count is not None)


def _in_file(path: Path, size: int, lines: int) -> int | None:
    """As count_rows; a file that is damaged is told by who reads it, and counts as unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if head.startswith(_PARQUET):
                return _parquet_rows(path)
            if head.startswith(_ARROW):
                return _arrow_rows(path)
            if head.startswith((_GZIP, _ZSTD)):
                file.seek(0)
                return _estimated_lines(file, head, size)
    except (OSError, EOFError, ValueError, zlib.error):  # pyarrow's errors are ValueError, OSError
        return None
    return lines if head.lstrip()[:1] == b"{" else None


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def _arrow_rows(path: Path) -> int:
    import pyarrow

    with pyarrow.memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
        file.seek(0)
        return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(file))


def _estimated_lines(file: BinaryIO, head: bytes, size: int) -> int | None:
    """Lines in all, if they go on as in the beginning; exact where that is the whole file."""
    if head.startswith(_GZIP):
        stream: Any = gzip.GzipFile(fileobj=file)
    else:
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")
    text = stream.read(_SAMPLE)
    if text.lstrip()[:1] != b"{":
        return None
    lines = text.count(b"\n")
    if len(text) < _SAMPLE:
        return lines + (text[-1:] != b"\n")
    return lines * size // max(1, file.tell())
