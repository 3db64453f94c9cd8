"""How ``torch.distributed.checkpoint`` plans, writes and reads our files.

It decides which rank writes which part, and cuts the parts anew for other ranks. Here are its
storage, and the copy of a state that is written while training goes on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from varlen_sft.data.files import sync_folder
from varlen_sft.train.checkpoint_files import (
    DTYPES,
    INDEX,
    SUMS,
    VERSION,
    Part,
    describe,
    metadata_of,
    write_parts,
    write_text,
)

__all__ = ["Reader", "Stage", "StagedPlanner", "Writer"]


@dataclass(frozen=True)
class Staged:
    """This rank's part of a tensor, on the CPU, and what the planner has to know of it."""

    items: list[WriteItem]
    local: Tensor


class Stage:
    """Copies a state to the CPU, each time into the same memory, which is page-locked for CUDA."""

    def __init__(self) -> None:
        self._kept: dict[str, Staged] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Staged]:
        """A copy that training may go on beside. The one before it is overwritten."""
        self._kept = {name: self._place(name, tensor) for name, tensor in tensors.items()}
        devices = set()
        for name, tensor in tensors.items():
            source = _local(tensor)
            self._kept[name].local.copy_(source, non_blocking=source.is_cuda)
            devices.add(source.device)
        for device in devices - {torch.device("cpu")}:
            torch.accelerator.synchronize(device)
        return self._kept

    def _place(self, name: str, tensor: Tensor) -> Staged:
        kept, source = self._kept.get(name), _local(tensor)
        if kept and kept.local.shape == source.shape and kept.local.dtype == source.dtype:
            return kept
        items = create_default_local_save_plan({name: tensor}, False).items
        made = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
        return Staged(items, made)


class StagedPlanner(DefaultSavePlanner):
    """Plans for ``Staged`` parts; tensors that all ranks hold are shared out among them."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([item for part in self.state_dict.values() for item in part.items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].local


class Writer(StorageWriter):
    """Writes one checkpoint; every file is on the disk before ``publish`` is called.

    Args:
        folder: made anew by rank 0. All ranks must see it.
        rank: of this process.
        facts: goes into the index. Rank 0's is taken.
        documents: JSON by file name. Rank 0's are taken.
        publish: called on rank 0 when all files of all ranks are complete.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        facts: Mapping[str, Any],
        documents: Mapping[str, Any],
        publish: Callable[[], None],
    ) -> None:
        self.folder, self.rank = folder, rank
        self.facts, self.documents, self.publish = facts, documents, publish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # The one call on rank 0 that comes before any rank writes.
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts = [_part(item, planner.resolve_data(item)) for item in plan.items]
        path = self.folder / f"rank-{self.rank:05}.safetensors"
        places = write_parts(path, parts) if parts else []
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(item.index, part.data.nbytes, place)
                for item, part, place in zip(plan.items, parts, places, strict=True)
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        places = {done.index: done.storage_data for part in results for done in part}
        sums = {place.file: place.sha256 for place in places.values()}
        for name in sums:
            if not (self.folder / name).is_file():
                raise OSError(f"{self.folder} must be a folder that all ranks share, lacks {name}")
        tensors = describe(metadata, places)
        index = {"version": VERSION, **self.facts, "files": sorted([*sums, *self.documents])}
        documents = {**self.documents, INDEX: {**index, "tensors": tensors}}
        for name, document in documents.items():
            sums[name] = write_text(self.folder / name, json.dumps(document, indent=1) + "\n")
        lines = (f"{sums[name]}  {name}\n" for name in sorted(sums))
        write_text(self.folder / SUMS, "".join(lines))
        sync_folder(self.folder)
        self.publish()


class Reader(StorageReader):
    """Reads parts of tensors into the tensors of this rank.

    Args:
        folder: of a checkpoint.
        index: of ``read_index``.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self._tensors = folder, index["tensors"]
        self._parts = {
            MetadataIndex(name, torch.Size(part["offsets"])): (DTYPES[facts["dtype"]], part)
            for name, facts in self._tensors.items()
            for part in facts["parts"]
        }
        self._files: dict[str, np.ndarray] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return metadata_of(self._tensors)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            part = self._read(item.storage_index)
            cut = zip(item.storage_offsets, item.lengths, strict=True)
            source = part[tuple(slice(start, start + length) for start, length in cut)]
            target = planner.resolve_tensor(item).detach()
            target.copy_(source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, index: MetadataIndex) -> Tensor:
        dtype, part = self._parts[index]
        name, size = part["file"], math.prod(part["shape"]) * dtype.itemsize
        if name not in self._files:
            # Private pages: torch takes no memory that cannot be written to.
            self._files[name] = np.memmap(self.folder / name, np.uint8, mode="c")
        data = self._files[name][part["start"] : part["start"] + size]
        return torch.from_numpy(data).view(dtype).view(part["shape"])


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _part(item: WriteItem, data: Any) -> Part:
    assert item.tensor_data is not None and item.tensor_data.chunk is not None
    chunk = item.tensor_data.chunk
    return Part(item.index.fqn, chunk.offsets, chunk.sizes == item.tensor_data.size, data)
