"""The files of a checkpoint: safetensors per rank, an index of what lies where, JSON documents.

Nothing is pickled: whoever reads safetensors and JSON can read a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from varlen_sft.data.files import HashedFile
from varlen_sft.errors import InputError

__all__ = ["DTYPES", "INDEX", "SUMS", "Part", "Place"]
__all__ += ["describe", "metadata_of", "read_document", "read_index", "require_same"]
__all__ += ["write_parts", "write_text"]

INDEX, SUMS = "checkpoint.json", "SHA256SUMS"
VERSION = 1
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in safetensors files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 2**20  # bytes written and hashed at a time: a core's cache holds them between the two


class Part(NamedTuple):
    """What one rank writes of a tensor."""

    name: str
    offsets: Sequence[int]  # of the part in the tensor
    whole: bool
    data: Tensor  # on the CPU


class Place(NamedTuple):
    """Where a part was written, and what the whole file came to."""

    file: str
    start: int  # byte of the file
    sha256: str


def write_parts(path: Path, parts: Sequence[Part]) -> list[Place]:
    """Write a safetensors file, whole and on the disk.

    Returns:
        The place of each part.

    Raises:
        TypeError: a dtype that such a file cannot hold.
        OSError: the disk is full, say; then there is no file.
    """
    # The largest elements first: every part lies on a multiple of its element's size.
    order = sorted(range(len(parts)), key=lambda k: -parts[k].data.dtype.itemsize)
    header, starts = _header([parts[k] for k in order])
    file = HashedFile(path)
    try:
        file.write(header)
        for k in order:
            data = _bytes_of(parts[k].data).data
            for at in range(0, len(data), _BLOCK):
                file.write(data[at : at + _BLOCK])
        file.close()
    except BaseException:
        file.discard()
        raise
    start_of = dict(zip(order, starts, strict=True))
    return [Place(path.name, start_of[k], file.facts()["sha256"]) for k in range(len(parts))]


def write_text(path: Path, text: str) -> str:
    """Write a file, whole and on the disk; OSError. Returns its sha256."""
    file = HashedFile(path)
    try:
        file.write(text.encode())
        file.close()
    except BaseException:
        file.discard()
        raise
    return file.facts()["sha256"]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a checkpoint.

    Raises:
        InputError: there is none, or it is of another version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"not the index of a checkpoint: {error!r}", file=path) from None
    if version != VERSION:
        raise InputError(f"must be of version {VERSION}, is of {version!r}", file=path)
    return index


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """What an object's state holds beside tensors."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def require_same(
    name: str,
    tensors: Mapping[str, Tensor],
    index: Mapping[str, Any],
    folder: Path,
    *,
    each_rank: bool = False,
) -> dict[str, Tensor]:
    """The tensors of an object that a checkpoint has, which are all, and no others.

    Args:
        name: of the object.
        tensors: of the object as it is.
        index: of the checkpoint.
        folder: of the checkpoint, for errors.
        each_rank: the checkpoint has tensors of every rank it had, and may lack this one's.

    Raises:
        InputError: the object is missing; a tensor is missing, unknown, or of another shape or
            dtype.
    """
    if name not in index["objects"]:
        raise InputError(f"the checkpoint lacks {name}", file=folder)
    there = {key for key in index["tensors"] if key.startswith(f"{name}.")}
    if each_rank:
        tensors = {key: value for key, value in tensors.items() if key in there}
    elif odd := sorted(there ^ tensors.keys()):
        what = "has unknown" if odd[0] in there else "lacks"
        more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
        raise InputError(f"the checkpoint {what} {odd[0]}{more}", file=folder)
    for key, value in tensors.items():
        facts = index["tensors"][key]
        was, now = (facts["dtype"], facts["shape"]), (_NAMES.get(value.dtype), list(value.shape))
        if was != now:
            raise InputError(f"{key} must be {now[0]} of shape {now[1]}, is {was[0]} of {was[1]}",
                             file=folder)  # fmt: skip
    return dict(tensors)


def describe(metadata: Metadata, places: Mapping[MetadataIndex, Place]) -> dict[str, Any]:
    """For the index: of each tensor its dtype, its shape, and where its parts are."""
    tensors = {}
    for name, facts in metadata.state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        parts = []
        for chunk in facts.chunks:
            place = places[MetadataIndex(name, chunk.offsets)]
            parts.append({"file": place.file, "start": place.start,
                          "offsets": list(chunk.offsets), "shape": list(chunk.sizes)})  # fmt: skip
        dtype = _NAMES[facts.properties.dtype]
        tensors[name] = {"dtype": dtype, "shape": list(facts.size), "parts": parts}
    return tensors


def metadata_of(tensors: Mapping[str, Any]) -> Metadata:
    """What ``describe`` wrote, as the planner reads it."""
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[facts["dtype"]]),
                torch.Size(facts["shape"]),
                [
                    ChunkStorageMetadata(torch.Size(part["offsets"]), torch.Size(part["shape"]))
                    for part in facts["parts"]
                ],
            )
            for name, facts in tensors.items()
        }
    )


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """(n,) uint8: what a tensor's memory holds, in order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _header(parts: Sequence[Part]) -> tuple[bytes, list[int]]:
    """The first bytes of a safetensors file, and where in the file each part begins."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for part in parts:
        if part.data.dtype not in _NAMES:
            raise TypeError(f"{part.name} must be of a dtype of safetensors, is {part.data.dtype}")
        ends.append(ends[-1] + part.data.nbytes)
        entries[_key(part)] = {
            "dtype": _NAMES[part.data.dtype],
            "shape": list(part.data.shape),
            "data_offsets": ends[-2:],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, [first + start for start in ends[:-1]]


def _key(part: Part) -> str:
    """The name of a whole tensor; of a part with its place, as a[8:16,0:4]."""
    if part.whole:
        return part.name
    cut = (f"{at}:{at + size}" for at, size in zip(part.offsets, part.data.shape, strict=True))
    return f"{part.name}[{','.join(cut)}]"
