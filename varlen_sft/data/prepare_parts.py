"""What is left of one chunk of input rows: a file that is whole or not there.

Its name is the chunk's number. It holds nothing of when, where or beside how many others it was
made, so whoever makes it makes the same bytes.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from varlen_sft.data.files import write_whole
from varlen_sft.data.sample import Sample
from varlen_sft.errors import RunError

_HEAD = struct.Struct("<8sQ")
_MAGIC = b"VLSFTPT1"
_DTYPES = ("<i4", "<i4", "<f4", "u1")  # lengths, input_ids, token_weights, roles
_SUFFIX = ".part"


def part_path(folder: Path, chunk: int) -> Path:
    """Where the part of a chunk lies."""
    return folder / f"{chunk:08d}{_SUFFIX}"


def part_numbers(folder: Path) -> Iterator[int]:
    """The chunks that have a part in a folder, in no order."""
    return (int(path.stem) for path in folder.glob(f"*{_SUFFIX}") if path.stem.isdecimal())


def write_part(path: Path, header: dict[str, Any], samples: Sequence[Sample]) -> None:
    """Write a part beside its place, and move it there when it is on the disk.

    Args:
        header: JSON, what is to be known of the chunk.

    Raises:
        OSError: it cannot be written; nothing is left then.
    """
    lengths = np.array([len(sample) for sample in samples])
    columns = [
        np.concatenate([np.zeros(0, dtype), *(getattr(sample, name) for sample in samples)])
        for name, dtype in zip(("input_ids", "token_weights", "roles"), _DTYPES[1:], strict=True)
    ]
    arrays = zip((lengths, *columns), _DTYPES, strict=True)
    payload = b"".join(array.astype(dtype).tobytes() for array, dtype in arrays)
    facts = {"samples": len(samples), "tokens": int(lengths.sum()), "crc32": zlib.crc32(payload)}
    head = json.dumps({**header, **facts}, sort_keys=True).encode()
    write_whole(path, b"".join((_HEAD.pack(_MAGIC, len(head)), head, payload)))


def read_header(path: Path, work: str) -> dict[str, Any] | None:
    """The header of a part; None if there is no such file, or it is not as long as it says.

    Args:
        work: see ``Plan.work``; a part of other work counts as none.
    """
    try:
        with path.open("rb") as file:
            header = _header(file.read(_HEAD.size), file, path.stat().st_size)
    except FileNotFoundError:
        return None
    return header if header is not None and header.get("work") == work else None


def read_part(path: Path, work: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The header, and lengths (n,), input_ids, token_weights and roles (T,).

    Raises:
        RunError: it is gone or damaged; a damaged one is removed, to be made again.
    """
    header = read_header(path, work)
    if header is None:
        raise RunError(
            f"{path} is gone or damaged since it was made: run what made it again, which makes it "
            "anew"
        )
    data = path.read_bytes()
    payload = data[len(data) - _payload_size(header) :]
    if zlib.crc32(payload) != header["crc32"]:
        path.unlink()
        raise RunError(
            f"{path} was damaged and is removed: run what made it again, which makes it anew"
        )
    arrays, start = [], 0
    for dtype, count in zip(_DTYPES, _counts(header), strict=True):
        arrays.append(np.frombuffer(payload, dtype=dtype, count=count, offset=start))
        start += arrays[-1].nbytes
    return header, arrays


def _header(head: bytes, file: Any, size: int) -> dict[str, Any] | None:
    if len(head) < _HEAD.size or head[:8] != _MAGIC:
        return None
    length = _HEAD.unpack(head)[1]
    try:
        header = json.loads(file.read(length)) if length < size else {}
        return header if size == _HEAD.size + length + _payload_size(header) else None
    except (ValueError, KeyError):
        return None


def _counts(header: dict[str, Any]) -> tuple[int, ...]:
    return (header["samples"], header["tokens"], header["tokens"], header["tokens"])


def _payload_size(header: dict[str, Any]) -> int:
    counts = zip(_counts(header), _DTYPES, strict=True)
    return sum(count * np.dtype(dtype).itemsize for count, dtype in counts)
