"""A prepared data set: tokens as Megatron reads them, and beside them what is trained.

========================= ===================================================================
``PREFIX.bin``, ``.idx``  Megatron's IndexedDataset, int32, one sequence per document
``PREFIX.weights``        fp32, one per token, in the order of the samples; layout sidecar only
``PREFIX.roles``          uint8, one per token, ids of ``sample.ROLES``
``PREFIX.manifest.json``  what it was made of, counts, and what each reader of it will train
========================= ===================================================================

Layouts: of ``sidecar`` a document is the tokens of one sample. Of ``tokens+mask`` it is the tokens
and then a mask of its labels (``masked_rows``), as Megatron's readers for fine-tuning take it; that
layout has no other weights.
All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from varlen_sft.data.masked_rows import weights_of
from varlen_sft.data.megatron import Index, read_index
from varlen_sft.data.sample import Sample
from varlen_sft.data.store_manifest import (
    FORMAT,
    LAYOUTS,
    MANIFEST,
    VERSION,
    file_of,
    is_prepared,
    read_manifest,
)
from varlen_sft.errors import InputError

__all__ = [
    "FORMAT",
    "LAYOUTS",
    "MANIFEST",
    "SIDECARS",
    "TOKEN_DTYPE",
    "VERSION",
    "Store",
    "file_of",
    "is_prepared",
    "layout_suffixes",
    "read_manifest",
    "store_rows",
]

TOKEN_DTYPE = np.dtype("<i4")
SIDECARS: dict[str, np.dtype] = {".weights": np.dtype("<f4"), ".roles": np.dtype("u1")}
"""dtype of an entry, by suffix."""

_BLOCK = 1 << 22
"""Tokens whose weights are counted at a time."""


def layout_suffixes(layout: str) -> tuple[str, ...]:
    """The files that a layout has, without the manifest."""
    return (".bin", ".idx", *(s for s in SIDECARS if layout == "sidecar" or s != ".weights"))


class Store:
    """A prepared data set, memory-mapped and read-only.

    Args:
        prefix: of its files, also ``PREFIX.bin``, ``.idx`` or ``.manifest.json``.

    Attributes:
        prefix: as above, a Path.
        manifest: dict.
        fingerprint: of all that decides the samples; equal fingerprints, equal samples.
        layout: one of LAYOUTS.
        lengths: (N,) int32, tokens of each sample.

    Raises:
        InputError: a file is missing, truncated, of another version or another length than the
            index says; the manifest is not one, or of another data set; there are no samples.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = _prefix(prefix)
        self.manifest = read_manifest(self.prefix)
        self.fingerprint: str = self.manifest["fingerprint"]
        self.layout: str = self.manifest["layout"]
        index = read_index(self.prefix)
        self.lengths = _lengths(self.prefix, index, self.layout)
        if not len(self.lengths):
            raise InputError("has no samples", file=file_of(self.prefix, ".idx"))
        self._ends = np.cumsum(self.lengths, dtype=np.int64)
        _check_counts(self.prefix, self.manifest, len(self.lengths), int(self._ends[-1]))
        self._tokens = _mapped(self.prefix, ".bin", TOKEN_DTYPE)
        self._sidecars = {
            suffix: _sidecar(self.prefix, suffix, int(self._ends[-1]))
            for suffix in layout_suffixes(self.layout)
            if suffix in SIDECARS
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.prefix,)  # another process maps the files, too: nothing is copied

    def sample(self, i: int) -> Sample:
        """Sample i of [0, N); its arrays are copies.

        Raises:
            IndexError: there is no such sample.
            InputError: weights that are negative or not finite.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample must be in [0, {len(self)}), got {i}")
        end, length = int(self._ends[i]), int(self.lengths[i])
        start = end - length
        roles = self._sidecars[".roles"][start:end].copy()
        if self.layout == "sidecar":
            ids = self._tokens[start:end].astype(np.int32)
            weights = self._sidecars[".weights"][start:end].astype(np.float32)
        else:
            ids, mask = self._tokens[2 * start : 2 * end].astype(np.int32).reshape(2, length)
            weights = weights_of(mask).astype(np.float32)
        try:
            return Sample(ids, weights, roles)
        except ValueError as error:
            raise InputError(str(error), file=self.prefix, row=i + 1) from None

    @cached_property
    def supervised(self) -> np.ndarray:
        """(N,) int64, targets of each sample: tokens after its first that weigh more than 0.

        The first use reads all weights, a block at a time.
        """
        counts = np.empty(len(self), dtype=np.int64)
        first = 0
        while first < len(self):
            before = int(self._ends[first] - self.lengths[first])
            last = max(first + 1, int(np.searchsorted(self._ends, before + _BLOCK, "right")))
            starts = self._ends[first:last] - self.lengths[first:last] - before
            trained = self._trained(before, int(self._ends[last - 1]), first, last)
            counts[first:last] = np.add.reduceat(trained, starts, dtype=np.int64)
            first = last
        return counts

    def verify(self) -> None:
        """Read everything and compare with the manifest's sha256 of each file.

        Raises:
            InputError: names the file that was changed.
        """
        for suffix in layout_suffixes(self.layout):
            path = file_of(self.prefix, suffix)
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != self.manifest["files"][suffix]["sha256"]:
                raise InputError("was changed: its sha256 is not the manifest's", file=path)

    def _trained(self, start: int, end: int, first: int, last: int) -> np.ndarray:
        """(end - start,) bool, of the tokens [start, end) of the samples [first, last): as many in
        each sample as it has targets."""
        lengths = self.lengths[first:last]
        ends = self._ends[first:last] - start
        if self.layout == "sidecar":
            trained = self._sidecars[".weights"][start:end] > 0
            trained[ends - lengths] = False
        else:
            in_mask = np.repeat(np.tile([False, True], last - first), np.repeat(lengths, 2))
            trained = self._tokens[2 * start : 2 * end][in_mask] > 0
            trained[ends - 1] = False
        return trained


def store_rows(prefix: str | os.PathLike[str]) -> Iterator[tuple[int, dict]]:
    """``(number, {"input_ids", "loss_mask"})`` of a prepared set, from 1.

    Raises:
        InputError: see Store.
    """
    store = Store(prefix)
    samples = (store.sample(i) for i in range(len(store)))
    return (
        (number, {"input_ids": sample.input_ids, "loss_mask": sample.token_weights})
        for number, sample in enumerate(samples, 1)
    )


def _prefix(prefix: str | os.PathLike[str]) -> Path:
    name = os.fspath(prefix)
    for suffix in (".bin", ".idx", MANIFEST):
        if name.endswith(suffix) and is_prepared(name.removesuffix(suffix)):
            return Path(name.removesuffix(suffix))
    return Path(name)


def _lengths(prefix: Path, index: Index, layout: str) -> np.ndarray:
    path = file_of(prefix, ".idx")
    if index.dtype != TOKEN_DTYPE:
        raise InputError(f"must hold int32 tokens, holds {index.dtype.name}", file=path)
    if not np.array_equal(index.documents, np.arange(len(index.lengths) + 1)):
        raise InputError("must have one sequence per document", file=path)
    lengths = index.lengths.astype(np.int32)
    if layout == "tokens+mask":
        if (lengths % 2).any():
            at = int((lengths % 2).argmax())
            raise InputError(
                f"document {at} must be tokens and as many mask entries, has {lengths[at]} entries",
                file=path,
            )
        lengths //= 2
    if len(lengths) and lengths.min() < 1:
        raise InputError(f"sample {int(lengths.argmin())} is empty", file=path)
    return lengths


def _check_counts(prefix: Path, manifest: dict[str, Any], samples: int, tokens: int) -> None:
    for name, found in (("samples", samples), ("tokens", tokens)):
        said = manifest["counts"].get(name)
        if said != found:
            raise InputError(
                f"does not match its files: it counts {said} {name}, the index {found}",
                file=file_of(prefix, MANIFEST),
            )


def _sidecar(prefix: Path, suffix: str, tokens: int) -> np.ndarray:
    path, dtype = file_of(prefix, suffix), SIDECARS[suffix]
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from None
    if size != tokens * dtype.itemsize:
        raise InputError(
            f"must have {tokens * dtype.itemsize} bytes for {tokens} tokens, has {size}", file=path
        )
    return _mapped(prefix, suffix, dtype)


def _mapped(prefix: Path, suffix: str, dtype: np.dtype) -> np.ndarray:
    return np.memmap(file_of(prefix, suffix), dtype=dtype, mode="r").view(np.ndarray)
