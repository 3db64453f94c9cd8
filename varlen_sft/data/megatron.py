"""Megatron's IndexedDataset: token sequences in ``PREFIX.bin``, where they lie in ``PREFIX.idx``.

``PREFIX.bin`` holds the tokens of all sequences, one dtype, one after another. ``PREFIX.idx``, all
of it little-endian:

====== ===== ======= ===============================================================
offset bytes type    content
====== ===== ======= ===============================================================
0      9     bytes   ``MMIDIDX\\0\\0``
9      8     uint64  version, 1
17     1     uint8   code of the dtype, see DTYPES
18     8     uint64  S, the number of sequences
26     8     uint64  D, the number of documents plus 1
34     4 S   int32   tokens of each sequence
       8 S   int64   byte of ``.bin`` at which each sequence begins
       8 D   int64   first sequence of each document; the last entry is S
       S     int8    modes, in multimodal data sets only
====== ===== ======= ===============================================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from varlen_sft.data.masked_rows import split_masked
from varlen_sft.data.packed_rows import is_packed, split_packed
from varlen_sft.errors import InputError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""dtype of ``.bin`` by its code. Megatron has 6 and 7, floats, which hold no tokens."""

_BLOCK = 1 << 20
"""Sequences checked at a time, so that a large index is never in memory whole."""


@dataclass(frozen=True)
class Index:
    """A checked ``.idx``; the arrays are memory-mapped.

    Args:
        prefix: of the two files.
        dtype: of the tokens, little-endian.
        lengths: (S,) int32, tokens.
        pointers: (S,) int64, bytes.
        documents: (D,) int64, sequences.
    """

    prefix: Path
    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    documents: np.ndarray

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1


def prefix_of(path: Path) -> Path | None:
    """The prefix, if path is one, or its ``.idx`` or ``.bin``, and the ``.idx`` is Megatron's."""
    named = path.suffix in (".idx", ".bin")
    if path.is_file() and not named:
        return None
    prefix = path.with_suffix("") if named else path
    try:
        with _with(prefix, ".idx").open("rb") as file:
            return prefix if file.read(len(MAGIC)) == MAGIC else None
    except OSError:
        return None


def read_index(prefix: Path) -> Index:
    """Map and check ``PREFIX.idx``, and the size of ``PREFIX.bin``.

    Raises:
        InputError: another magic, version or dtype code; a size that its header does not explain;
            negative lengths, pointers that are not where the sequences before them end, documents
            that do not grow from 0 to S; a ``.bin`` of another size than the index says.
    """
    path = _with(prefix, ".idx")
    try:
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        size, bin_size = path.stat().st_size, _with(prefix, ".bin").stat().st_size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=error.filename) from None
    dtype, sequences, entries = _header(path, head)
    expected = HEADER.size + 12 * sequences + 8 * entries
    if size == expected + sequences and sequences:
        raise InputError(
            "a multimodal data set (it stores modes), which is not supported", file=path
        )
    if size != expected:
        raise InputError(
            f"must have {expected} bytes for {sequences} sequences and {entries} document entries, "
            f"has {size}",
            file=path,
        )
    index = _map(prefix, path, dtype, sequences, entries)
    end = _check_sequences(path, index)
    _check_documents(path, index)
    if end != bin_size:
        state = "it is truncated" if bin_size < end else "it is not the index's"
        raise InputError(
            f"has {bin_size} bytes, its index accounts for {end}: {state}",
            file=_with(prefix, ".bin"),
        )
    return index


def megatron_rows(prefix: Path, *, with_mask: bool = False) -> Iterator[tuple[int, dict]]:
    """``(number, {"input_ids": (L,) array})`` of each document, from 1; one in memory at a time.

    A document is one row, whatever tokens it holds: an end-of-document token is a token. Packed
    rows (``packed_rows``) give the samples in them, with a ``loss_mask``, numbered on.

    Args:
        prefix: of the files.
        with_mask: documents are tokens followed by a mask (``masked_rows``); rows then have a
            ``loss_mask`` too.

    Raises:
        InputError: see read_index; with row, a document that is not tokens and a mask, or that
            ``.bin`` ends before, since it changed meanwhile; packed rows that are damaged.
    """
    return _documents(read_index(prefix), with_mask)


def _documents(index: Index, with_mask: bool) -> Iterator[tuple[int, dict]]:
    path = _with(index.prefix, ".bin")
    numbered = enumerate(_tokens(path, index), 1)
    first = next(numbered, None)
    if first is None:
        return
    documents = chain([first], numbered)
    if is_packed(first[1]):
        yield from enumerate(_packed(path, documents), 1)
        return
    for number, tokens in documents:
        try:
            yield number, split_masked(tokens) if with_mask else {"input_ids": tokens}
        except InputError as error:
            raise InputError(error.reason, file=path, row=number) from None


def _tokens(path: Path, index: Index) -> Iterator[np.ndarray]:
    """The tokens of each document."""
    with path.open("rb") as file:  # read, not mapped: an empty file cannot be
        for number in range(1, index.num_documents + 1):
            first, last = (int(n) for n in index.documents[number - 1 : number + 1])
            count = int(index.lengths[first:last].sum(dtype=np.int64))
            data = file.read(count * index.dtype.itemsize)
            if len(data) != count * index.dtype.itemsize:
                raise InputError("ends before the end of this document", file=path, row=number)
            yield np.frombuffer(data, dtype=index.dtype)


def _packed(path: Path, documents: Iterable[tuple[int, np.ndarray]]) -> Iterator[dict]:
    """The samples of all packed rows."""
    for number, words in documents:
        try:
            yield from split_packed(words)
        except InputError as error:
            raise InputError(error.reason, file=path, row=number) from None


def _header(path: Path, head: bytes) -> tuple[np.dtype, int, int]:
    if len(head) < HEADER.size:
        raise InputError(f"must have a header of {HEADER.size} bytes, has {len(head)}", file=path)
    magic, version, code, sequences, entries = HEADER.unpack(head)
    if magic != MAGIC:
        raise InputError(f"must begin with {MAGIC!r}, begins with {magic!r}", file=path)
    if version != VERSION:
        raise InputError(f"must be of version {VERSION}, is of {version}", file=path)
    if code not in DTYPES:
        known = ", ".join(f"{code} ({name})" for code, name in DTYPES.items())
        raise InputError(f"has the dtype code {code}, known for tokens are {known}", file=path)
    if not entries:
        raise InputError("has no document entries, expected at least the closing one", file=path)
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, entries


def _map(prefix: Path, path: Path, dtype: np.dtype, sequences: int, entries: int) -> Index:
    def array(kind: str, offset: int, count: int) -> np.ndarray:
        if not count:
            return np.zeros(0, dtype=kind)
        return np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,))

    return Index(
        prefix,
        dtype,
        array("<i4", HEADER.size, sequences),
        array("<i8", HEADER.size + 4 * sequences, sequences),
        array("<i8", HEADER.size + 12 * sequences, entries),
    )


def _check_sequences(path: Path, index: Index) -> int:
    """The number of bytes that the sequences take."""
    end = 0
    for start in range(0, len(index.lengths), _BLOCK):
        lengths = index.lengths[start : start + _BLOCK].astype(np.int64)
        if lengths.min() < 0:
            at = start + int(lengths.argmin())
            raise InputError(f"sequence {at} has the length {lengths.min()}", file=path)
        ends = end + np.cumsum(lengths * index.dtype.itemsize)
        expected = np.concatenate([[end], ends[:-1]])
        wrong = index.pointers[start : start + _BLOCK] != expected
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(
                f"sequence {start + at} must begin at byte {expected[at]}, where the one before it "
                f"ends, its pointer says {index.pointers[start + at]}",
                file=path,
            )
        end = int(ends[-1])
    return end


def _check_documents(path: Path, index: Index) -> None:
    first, last = int(index.documents[0]), int(index.documents[-1])
    if first != 0 or last != len(index.lengths):
        raise InputError(
            f"documents must run from sequence 0 to {len(index.lengths)}, run from {first} to "
            f"{last}",
            file=path,
        )
    for start in range(0, len(index.documents), _BLOCK):
        falls = np.diff(index.documents[start : start + _BLOCK + 1]) < 0
        if falls.any():
            at = start + int(falls.argmax())
            raise InputError(f"document {at + 1} begins before document {at}", file=path)


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
