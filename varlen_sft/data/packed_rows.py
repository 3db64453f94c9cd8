"""Megatron-Bridge's packed rows: a document of int32 words is a pack of several samples.

Words: the magic, the version, the number of samples, where each begins, then one word per token,
its id in the lower 31 bits. The highest bit says whether the *next* token is a target: entry i goes
with label i, which is token i + 1. (Layout as its module ``data/packing/indexed.py`` writes it.)
"""

from __future__ import annotations

import numpy as np

from varlen_sft.errors import InputError

MAGIC = 0x53465442  # SFTB; no vocabulary has such an id
VERSION = 1
_HEADER = 3


def is_packed(words: np.ndarray) -> bool:
    """Whether a document is a packed row."""
    return words.dtype.itemsize == 4 and len(words) > 0 and int(words[0]) == MAGIC


def split_packed(words: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The samples of a packed row, as rows of ``input_ids`` and ``loss_mask`` (of tokens as such).

    Args:
        words: (W,) int32.

    Raises:
        InputError: another magic or version, or starts that do not rise from 0 within the tokens.
    """
    if not is_packed(words):
        raise InputError("expected a packed row like those before it ('SFTB'), found other tokens")
    if len(words) < _HEADER or int(words[1]) != VERSION:
        found = int(words[1]) if len(words) > 1 else "none"
        raise InputError(f"a packed row ('SFTB') must be of version {VERSION}, is of {found}")
    count = int(words[2])
    starts = words[_HEADER : _HEADER + max(count, 0)].astype(np.int64)
    tokens = words[_HEADER + max(count, 0) :].astype("<i4").view("<u4")
    edges = np.append(starts, len(tokens))
    if count < 1 or len(starts) != count or starts[0] != 0 or (np.diff(edges) < 1).any():
        raise InputError(
            f"the {count} samples of a packed row must begin at 0 and rise within its "
            f"{len(tokens)} tokens, they begin at {starts[:8].tolist()}"
        )
    ids, trained = (tokens & 0x7FFFFFFF).astype(np.int32), tokens >> 31
    mask = np.concatenate(([0], trained[:-1])).astype(np.int32)
    mask[starts] = 0  # its bit is the last one of the sample before
    return [
        {"input_ids": ids[a:b], "loss_mask": mask[a:b]}
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
    ]
