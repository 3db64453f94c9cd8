"""Writes a prepared data set: everything beside its place first, then moved there in one go.

The manifest is moved last and the old one taken away first, so a set with a manifest is whole, and
whoever is stopped halfway leaves no set that looks like one. Until all new files are complete and
on the disk, nothing of an older set is touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from varlen_sft.data.files import HashedFile, sync_folder
from varlen_sft.data.masked_rows import with_mask
from varlen_sft.data.megatron import HEADER, MAGIC, VERSION
from varlen_sft.data.sample import Sample
from varlen_sft.data.store import (
    FORMAT,
    LAYOUTS,
    MANIFEST,
    SIDECARS,
    TOKEN_DTYPE,
    file_of,
    layout_suffixes,
)
from varlen_sft.data.store import VERSION as STORE_VERSION
from varlen_sft.errors import InputError

REJECTS = ".rejects.jsonl"
_INT32_CODE = 4
_BLOCK = 1 << 20
"""Samples of the index that are written at a time."""


class StoreWriter:
    """Takes samples in their order and leaves a prepared set.

    Args:
        prefix: of the set.
        folder: where files lie until they are complete; on the same file system.
        layout: see ``store``.

    Raises:
        OSError: a file cannot be written.
    """

    def __init__(self, prefix: Path, folder: Path, layout: str) -> None:
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        self.prefix, self.layout = prefix, layout
        self.samples = self.tokens = self.targets = self._second = 0
        self._folder = folder
        self._files = {s: HashedFile(folder / f"new{s}") for s in layout_suffixes(layout)}
        self._lengths = HashedFile(folder / "new.lengths")
        self._rejects: HashedFile | None = None
        self._rejected = 0  # lines of it

    def add(
        self,
        lengths: np.ndarray,  # (n,) tokens of each sample
        input_ids: np.ndarray,  # (T,) of all of them
        token_weights: np.ndarray,  # (T,)
        roles: np.ndarray,  # (T,)
    ) -> None:
        """Append n samples.

        Raises:
            InputError: a weight that is neither 0 nor 1, which the layout tokens+mask cannot hold.
        """
        arrays = {".weights": token_weights, ".roles": roles}
        for suffix, dtype in SIDECARS.items():
            if suffix in self._files:
                self._files[suffix].write(arrays[suffix].astype(dtype).tobytes())
        ids = input_ids.astype(TOKEN_DTYPE)
        if self.layout == "sidecar":
            self._files[".bin"].write(ids.tobytes())
        else:
            self._files[".bin"].write(with_mask(lengths, ids, token_weights).tobytes())
        entries = lengths if self.layout == "sidecar" else 2 * lengths.astype(np.int64)
        if len(entries) and entries.max() > np.iinfo(np.int32).max:
            raise InputError(f"a sample has {lengths.max()} tokens, more than an index can say")
        self._lengths.write(entries.astype("<i4").tobytes())
        trained, ends = token_weights > 0, np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        self.samples += len(lengths)
        self.tokens += int(ends[-1]) if len(ends) else 0
        self.targets += int(trained.sum()) - int(trained[starts].sum())
        self._second += int(trained[starts[lengths > 1] + 1].sum())

    def reject(self, line: Mapping[str, Any]) -> None:
        """Append a line to the rejects."""
        if self._rejects is None:
            self._rejects = HashedFile(self._folder / f"new{REJECTS}")
        self._rejected += 1
        self._rejects.write((json.dumps(line, ensure_ascii=False) + "\n").encode(errors="replace"))

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write index and manifest, and move everything to its place.

        Args:
            manifest: its fields, but for those that the files decide; ``counts`` gets some more.
        """
        self._lengths.close()
        self._write_index()
        for file in self._whole().values():
            file.close()
        whole = {
            **manifest,
            "format": FORMAT,
            "version": STORE_VERSION,
            "layout": self.layout,
            "rejects": self._rejected,
            "counts": {
                **manifest.get("counts", {}),
                "samples": self.samples,
                "tokens": self.tokens,
                "targets": self.targets,
            },
            "readers": self._readers(),
            "files": {suffix: file.facts() for suffix, file in self._whole().items()},
        }
        head = HashedFile(self._folder / f"new{MANIFEST}")
        head.write(json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")
        head.close()
        self._move(head)

    def discard(self) -> None:
        """Close and remove what finish has not moved."""
        for file in (*self._whole().values(), self._lengths):
            file.discard()

    def _whole(self) -> dict[str, HashedFile]:
        return self._files if self._rejects is None else {**self._files, REJECTS: self._rejects}

    def _readers(self) -> dict[str, dict[str, Any]]:
        """How many targets each kind of reader will train, and which."""
        ours = {"targets": self.targets, "trains": "what is meant, by weight"}
        if self.layout == "sidecar":
            text = (
                "every token, prompts too, and the first token of a sample as if it followed the "
                "sample before: it does not know the weights"
            )
            plain = {"targets": self.tokens - 1, "trains": text}
            return {"varlen_sft": ours, "Megatron GPTDataset": plain}
        return {
            "varlen_sft": ours,
            "Megatron SFT, mask[i] with the label tokens[i + 1]": {
                **ours,
                "trains": "what is meant",
            },
            "a reader of mask[1:] with the labels tokens[1:]": {
                "targets": self.targets - self._second,
                "trains": "the token before each that is meant: such a reader is off by one",
            },
            "Megatron GPTDataset": {
                "targets": 2 * self.tokens - 1,
                "trains": "every token, and the mask as if it were tokens: not for this reader",
            },
        }

    def _write_index(self) -> None:
        file = self._files[".idx"]
        file.write(HEADER.pack(MAGIC, VERSION, _INT32_CODE, self.samples, self.samples + 1))
        mapped: Any = np.zeros(0, "<i4")
        if self.samples:
            mapped = np.memmap(self._lengths.path, dtype="<i4", mode="r")
        blocks = range(0, self.samples, _BLOCK)
        for start in blocks:
            file.write(mapped[start : start + _BLOCK].tobytes())
        end = 0
        for start in blocks:
            sizes = mapped[start : start + _BLOCK].astype("<i8") * TOKEN_DTYPE.itemsize
            ends = end + np.cumsum(sizes)
            file.write((ends - sizes).tobytes())
            end = int(ends[-1])
        for start in range(0, self.samples + 1, _BLOCK):
            stop = min(start + _BLOCK, self.samples + 1)
            file.write(np.arange(start, stop, dtype="<i8").tobytes())

    def _move(self, head: HashedFile) -> None:
        file_of(self.prefix, MANIFEST).unlink(missing_ok=True)
        sync_folder(self.prefix.parent)
        new = self._whole()
        for suffix in (*SIDECARS, REJECTS):
            if suffix not in new:
                file_of(self.prefix, suffix).unlink(missing_ok=True)
        for suffix, file in new.items():
            os.replace(file.path, file_of(self.prefix, suffix))
        sync_folder(self.prefix.parent)
        os.replace(head.path, file_of(self.prefix, MANIFEST))
        sync_folder(self.prefix.parent)
        self._lengths.path.unlink()


def write_store(
    prefix: str | os.PathLike[str],
    samples: Iterable[Sample],
    *,
    layout: str = "sidecar",
    fingerprint: str = "",
) -> None:
    """Write samples that were made elsewhere as a prepared set.

    Args:
        fingerprint: what Store gives back; by default a hash of the samples.

    Raises:
        InputError: no samples, or what StoreWriter.add refuses.
    """
    prefix = Path(prefix)
    with tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent) as folder:
        writer = StoreWriter(prefix, Path(folder), layout)
        try:
            digest = hashlib.sha256()
            for sample in samples:
                arrays = sample.input_ids, sample.token_weights, sample.roles
                writer.add(np.array([len(sample)]), *arrays)
                digest.update(b"".join([len(sample).to_bytes(8, "little"), *map(bytes, arrays)]))
            if not writer.samples:
                raise InputError("no samples to write", file=prefix)
            writer.finish({"fingerprint": fingerprint or digest.hexdigest()})
        finally:
            writer.discard()
