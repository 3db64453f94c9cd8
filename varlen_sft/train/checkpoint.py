"""Checkpoints of a run: written while it goes on, whole or not there at all, and checked.

A state is copied to the CPU, and a thread writes the copy beside its place: each rank its part,
through ``torch.distributed.checkpoint`` on a process group of its own. When all ranks are done,
rank 0 gives the folder its name. A run that is killed at any instant goes on from the newest folder
that has a name; one whose files are not what was written is told and passed over.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from varlen_sft import __version__
from varlen_sft.errors import InputError, RunError
from varlen_sft.train.checkpoint_files import read_document, read_index, require_same
from varlen_sft.train.checkpoint_folder import (
    checkpoints,
    clean,
    damage,
    locked,
    path_of,
    prune,
    publish,
    set_aside,
)
from varlen_sft.train.checkpoint_ranks import Ranks, in_thread, quiet
from varlen_sft.train.checkpoint_state import (
    ModelState,
    RandomState,
    RunIds,
    Stateful,
    joined,
    parted,
)
from varlen_sft.train.checkpoint_storage import Reader, Stage, Staged, Writer

__all__ = ["Checkpointer", "ModelState", "RandomState", "RunIds", "Stateful"]

_GRACE_S = 30.0  # what a run that fails waits for a checkpoint that is being written


class Checkpointer:
    """Writes a run's checkpoints and finds the one to go on from. A context manager.

    Every method is called by all ranks. Leaving the context waits for the write under way; after an
    error no longer than half a minute, and not at all for a rank that is gone.

    Args:
        folder: of this run alone; all ranks see it. It is locked for as long as the object lives.
        keep: so many newest checkpoints stay. While one is written there must be room for one more.
        every: steps between checkpoints, for ``due``; None: whoever calls ``save`` decides.
        process_group: gloo, of all ranks, used by nobody else; made if None.
        timeout_s: what a rank that waits for the write under way waits for a sign of the others.

    Raises:
        ValueError: keep or every below 1.
        RunError: another run holds the folder, or it cannot be written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        every: int | None = None,
        process_group: dist.ProcessGroup | None = None,
        timeout_s: float = 50.0,
    ) -> None:
        if keep < 1 or (every is not None and every < 1):
            raise ValueError(f"keep and every must be at least 1, got {keep} and {every}")
        self.folder, self.keep, self.every = Path(folder), keep, every
        self._ranks = Ranks(process_group, timeout_s)
        self._stage = Stage()
        self._writing: Future[None] | None = None
        self._good: Path | None = None
        self._held = ExitStack()
        self._ranks.on_first(self._open)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is made after this step."""
        return self.every is not None and step % self.every == 0

    @property
    def failed(self) -> bool:
        """Whether the write under way has ended with an error, which ``wait`` raises."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def save(self, state: Mapping[str, Stateful], step: int) -> None:
        """Copy the state, and write the copy while the caller goes on.

        It waits for the write before this one, if that is still under way.

        Args:
            state: objects by name. What is no tensor is taken from rank 0.
            step: steps that are behind.

        Raises:
            RunError: the write before this one failed.
            TypeError: a state that is not made of tensors and JSON.
            ValueError: a name with a dot.
        """
        self.wait()
        quiet()
        tensors, documents = _taken_apart(state)
        writer = self._writer(step, sorted(state), documents)
        staged = self._stage.copy(tensors)
        self._writing = in_thread(lambda: self._write(staged, writer))

    def wait(self) -> None:
        """Until the write under way, if there is one, is complete.

        Raises:
            RunError: it failed, on whichever rank; the checkpoints before it are as they were.
            RuntimeError: of the process group, where a rank is gone.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            self._ranks.wait(writing)

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are what was written; None if there is none at all.

        Newer ones that are damaged are named in a warning, and set aside under another name.

        Raises:
            RunError: there are some, but all are damaged.
            InputError: the newest is of another version.
        """
        found = self._ranks.on_first(lambda: checkpoints(self.folder))
        for _, path in reversed(found):
            wrong = self._ranks.first_of(damage(path, (self._ranks.rank, self._ranks.size)))
            if wrong is None:
                self._good = path
                return path
            aside = self._ranks.on_first(partial(set_aside, path))
            if self._ranks.rank == 0:
                warnings.warn(
                    f"{path} is damaged: {wrong}; it is passed over, and is now {aside.name}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        if found:
            raise RunError(f"{self.folder}: all checkpoints are damaged, there is none to go on")
        return None

    def load(self, state: Mapping[str, Stateful], path: str | Path) -> int:
        """Put every object where it was; the number of ranks may be another.

        Args:
            state: objects by name, of models and optimisers of the same shapes.
            path: of a checkpoint.

        Returns:
            The steps that were behind.

        Raises:
            InputError: a damaged checkpoint, one of another version, another model or other frozen
                weights, or one of this folder that is not the newest: a later run would take that.
        """
        path = Path(path)
        self._require_good(path)
        index = read_index(path)
        documents = {name: read_document(path, name) for name in state}
        live = {name: part.state_dict() for name, part in state.items()}
        wanted: dict[str, Tensor] = {}
        for name, part in state.items():
            if isinstance(part, ModelState):
                part.require_base(documents[name], path)
            tensors, each_rank = parted(name, live[name])[0], isinstance(part, RandomState)
            wanted |= require_same(name, tensors, index, path, each_rank=each_rank)
        self._ranks.load(wanted, Reader(path, index))
        for name, part in state.items():
            part.load_state_dict(joined(name, documents[name], live[name], wanted))
        return index["step"]

    def close(self) -> None:
        """Wait for the write under way, and let go of the folder."""
        with self._held:
            self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, *_: object
    ) -> None:
        if error is None:
            return self.close()
        # Of a process group: a rank is gone, and the write will not end.
        is_lost = isinstance(error, RuntimeError) and not isinstance(error, RunError)
        with self._held, suppress(Exception):  # the error that is on its way says more
            if self._writing is not None and not (is_lost and self._ranks.size > 1):
                self._writing.result(timeout=_GRACE_S)

    def _open(self) -> None:
        self._held.enter_context(locked(self.folder))
        clean(self.folder)

    def _require_good(self, path: Path) -> None:
        newer = self._ranks.on_first(lambda: _newer(self.folder, path))
        if newer is not None:
            raise InputError(f"{newer} is newer: remove it to go on from here", file=path)
        if path != self._good:
            wrong = self._ranks.first_of(damage(path, (self._ranks.rank, self._ranks.size)))
            if wrong is not None:
                raise InputError(f"is damaged: {wrong}", file=path)

    def _writer(self, step: int, objects: list[str], documents: dict[str, Any]) -> Writer:
        final = path_of(self.folder, step)
        made = final.with_name(f"{final.name}.tmp")

        def put() -> None:
            publish(made, final)
            prune(self.folder, self.keep, step)

        versions = {"varlen_sft": __version__, "torch": torch.__version__}
        facts = {"step": step, "ranks": self._ranks.size, "objects": objects}
        return Writer(made, self._ranks.rank, {**facts, "written_by": versions}, documents, put)

    def _write(self, staged: Mapping[str, Staged], writer: Writer) -> None:
        try:
            self._ranks.save(staged, writer)
        except BaseException:
            if self._ranks.rank == 0:  # a full disk has room for the log again
                shutil.rmtree(writer.folder, ignore_errors=True)
            raise


def _taken_apart(state: Mapping[str, Stateful]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors by their full names, and a document for each object that has something else."""
    tensors: dict[str, Tensor] = {}
    documents: dict[str, Any] = {}
    for name, part in state.items():
        found, rest = parted(name, part.state_dict())
        tensors |= found
        if rest:
            documents[f"{name}.json"] = rest
    return tensors, documents


def _newer(folder: Path, path: Path) -> str | None:
    """The newest checkpoint of the folder, if this is one of it and an older one."""
    found = [at for _, at in checkpoints(folder)]
    return found[-1].name if path in found[:-1] else None
