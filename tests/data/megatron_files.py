"""Writes Megatron's two files by hand, so that readers are tested against the layout itself."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from varlen_sft.data.megatron import DTYPES


def write(prefix: Path, tokens: list[list[list[int]]], dtype_code: int = 8, **changes) -> Path:
    """The two files, by the layout in megatron.py; changes replace parts of the index."""
    dtype = np.dtype(DTYPES.get(dtype_code, "float32"))
    sequences = [sequence for document in tokens for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    ends = np.cumsum([0, *lengths]) * dtype.itemsize
    parts = {
        "magic": b"MMIDIDX\x00\x00",
        "version": struct.pack("<Q", 1),
        "code": struct.pack("<B", dtype_code),
        "sequences": struct.pack("<Q", len(lengths)),
        "entries": struct.pack("<Q", len(tokens) + 1),
        "lengths": np.array(lengths, "<i4").tobytes(),
        "pointers": np.array(ends[:-1], "<i8").tobytes(),
        "documents": np.cumsum([0, *map(len, tokens)]).astype("<i8").tobytes(),
        "modes": b"",
    }
    assert not changes.keys() - parts.keys()
    prefix.with_name(prefix.name + ".idx").write_bytes(b"".join((parts | changes).values()))
    flat = np.array([token for sequence in sequences for token in sequence], dtype)
    prefix.with_name(prefix.name + ".bin").write_bytes(flat.tobytes())
    return prefix
