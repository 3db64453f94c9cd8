"""From sources to a prepared set, in parallel, and from where it was left off.

Input rows are cut into chunks of a fixed number; a worker makes a part of each (``prepare_parts``)
in ``PREFIX.parts``; the parts, in order, are the set (``store_write``). Whatever was killed when,
and however many worked, the parts are the same, and so is the set.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from varlen_sft.data.load import OnError
from varlen_sft.data.prepare_chunks import make_parts, own_rows
from varlen_sft.data.prepare_folder import (
    PARTS,
    gather,
    is_of,
    open_parts,
    read_plan,
    write_total,
)
from varlen_sft.data.prepare_lock import empty, locked
from varlen_sft.data.prepare_parts import part_numbers, part_path, read_header, read_part
from varlen_sft.data.prepare_plan import Plan, PrepareOptions, differences, make_plan
from varlen_sft.data.store import (
    LAYOUTS,
    MANIFEST,
    Store,
    file_of,
    is_prepared,
    layout_suffixes,
    read_manifest,
)
from varlen_sft.data.store_write import StoreWriter
from varlen_sft.errors import InputError, RunError

__all__ = ["PrepareOptions", "Prepared", "Progress", "merge", "prepare"]

Progress = Callable[[Literal["hash", "rows", "write"], int, int | None], None]
"""Told what is being done, how much of it is done and how much there is, about, if that is known:
bytes of the inputs that are hashed, rows that are tokenised, chunks that are written."""


@dataclass(frozen=True)
class Prepared:
    """What a run came to.

    Args:
        state: ``made``; ``there`` if the same was there already; ``shard`` if parts were made.
        fingerprint: of the set.
        manifest: of the set, None for a shard.
        chunks: how many this run had to do with, and of those the ones that were left to be made.
    """

    state: Literal["made", "there", "shard"]
    fingerprint: str
    manifest: dict[str, Any] | None
    chunks: tuple[int, int] = (0, 0)


def prepare(
    options: PrepareOptions, progress: Progress = lambda *_: None, plan: Plan | None = None
) -> Prepared:
    """Tokenise and mask rows in parallel and write a prepared set, or the parts of one shard.

    What an earlier run of the same left unfinished is gone on with.

    Args:
        options: what to prepare.
        progress: see ``Progress``.
        plan: of the same options, but for ``out``, where it is known: inputs are hashed once.

    Raises:
        InputError: an input, model or row cannot be used (with on_error ``error`` the first such
            row); there are no samples; a set, or parts, of another fingerprint are in the way.
        RunError: a worker died, the disk is full, an input was changed meanwhile, or another run
            is at work on the same. The parts that are finished stay; a set that was there stays as
            it was.
    """
    with locked(file_of(options.out, PARTS), options.shard):
        return _prepare(options, progress, plan)


def _prepare(options: PrepareOptions, progress: Progress, plan: Plan | None) -> Prepared:
    if plan is None:
        plan = make_plan(options, lambda done, total: progress("hash", done, total))
    out, folder = options.out, file_of(options.out, PARTS)
    there = _in_the_way(out, plan, options.force)
    if there is not None:
        return there
    open_parts(folder, plan, options.force)
    rows = own_rows(plan, options)

    def done_rows(done: int) -> None:
        progress("rows", done, rows and max(rows, done))

    try:
        counted = make_parts(options, plan, folder, done_rows)
    except InputError:
        if options.shard is None and next(part_numbers(folder), None) is None:
            empty(folder)  # nothing to go on from
        raise
    if options.shard is not None:
        write_total(folder, counted.chunks)
        return Prepared("shard", plan.fingerprint, None, (counted.own, counted.made))
    parts = [part_path(folder, chunk) for chunk in range(counted.chunks)]
    manifest = _assemble(out, folder, plan, parts, progress)
    return Prepared("made", plan.fingerprint, manifest, (counted.own, counted.made))


def merge(
    out: Path,
    folders: Sequence[Path] = (),
    *,
    on_error: OnError = "error",
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Prepared:
    """Put the parts of all shards together: the bytes that one process would have written.

    Args:
        out: prefix of the set.
        folders: where the parts lie; ``PREFIX.parts`` by default.
        on_error: ``error`` refuses parts that left out rows which cannot be used.

    Raises:
        InputError: parts are missing, or of several fingerprints; and as prepare.
        RunError: as prepare.
    """
    with locked(file_of(out, PARTS)):
        return _merge(out, list(folders), on_error, force, progress)


def _merge(
    out: Path, folders: list[Path], on_error: OnError, force: bool, progress: Progress
) -> Prepared:
    own = file_of(out, PARTS)
    folders = folders or [own]
    plans = [read_plan(folder) for folder in folders]
    plan = plans[0]
    for folder, other in zip(folders, plans, strict=True):
        if other.work != plan.work:
            raise InputError(
                f"is of another fingerprint than {folders[0]}, which differs in "
                f"{differences(other.content, plan.content)}",
                file=folder,
            )
    there = _in_the_way(out, plan, force)
    if there is not None:
        return there
    parts = gather(folders)
    for path in parts:
        header = read_header(path, plan.work)
        if on_error == "error" and header and header["first_rejected"]:
            row, reason = header["first_rejected"]
            raise InputError(reason, file=plan.names[header["source"]], row=row)
    open_parts(own, plan, force)
    manifest = _assemble(out, own, plan, parts, progress)
    return Prepared("made", plan.fingerprint, manifest, (len(parts), 0))


def _assemble(
    out: Path, folder: Path, plan: Plan, parts: Sequence[Path], progress: Progress
) -> dict[str, Any]:
    """Write the set of all parts, then remove them."""
    counts, rows = Counter[str](), Counter[int]()
    for stale in folder.glob("new-*"):
        shutil.rmtree(stale)
    try:
        with tempfile.TemporaryDirectory(prefix="new-", dir=folder) as scratch:
            layout = plan.content["settings"]["layout"]
            writer = StoreWriter(out, Path(scratch), layout)
            try:
                for done, path in enumerate(parts, 1):
                    header, arrays = read_part(path, plan.work)
                    writer.add(*arrays)
                    name = plan.names[header["source"]]
                    for row, reason in header["left_out"]:
                        writer.reject({"file": name, "row": row, "reason": reason})
                    counts.update(header["counts"])
                    rows[header["source"]] += header["counts"]["rows"]
                    progress("write", done, len(parts))
                if writer.samples:
                    writer.finish(_manifest(plan, counts, rows))
            finally:
                writer.discard()
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}; what was there is untouched") from None
    if not writer.samples:
        empty(folder)
        raise InputError(
            f"{counts['rows']} rows give no samples ({counts['rejected']} cannot be used), so "
            "nothing was written",
            file=", ".join(plan.names),
        )
    empty(folder)
    return read_manifest(out)


def _manifest(plan: Plan, counts: Counter[str], rows: Counter[int]) -> dict[str, Any]:
    inputs = [{"source": name, "rows": rows[place]} for place, name in enumerate(plan.names)]
    return {
        "fingerprint": plan.fingerprint,
        "made_of": plan.content,
        "inputs": inputs,
        "counts": dict(counts),
    }


def _in_the_way(out: Path, plan: Plan, force: bool) -> Prepared | None:
    """The set that is there already, if it is the one that is wanted."""
    folder = file_of(out, PARTS)
    if force:
        return None
    parts = is_of(folder, plan)
    if not is_prepared(out):
        for suffix in layout_suffixes(LAYOUTS[0]):
            # With these parts beside it, it is what a run left that was killed near its end.
            if not parts and file_of(out, suffix).exists():
                raise InputError(
                    "a file without a manifest is in the way; --force replaces it",
                    file=file_of(out, suffix),
                )
        return None
    manifest = read_manifest(out)
    if manifest["fingerprint"] != plan.fingerprint:
        raise InputError(
            "a set of another fingerprint is in the way (it differs in "
            f"{differences(manifest.get('made_of') or {}, plan.content)}); --force replaces it",
            file=file_of(out, MANIFEST),
        )
    Store(out)  # raises if it is not whole
    if parts:
        empty(folder)  # of a run that was killed when all but this was done
    return Prepared("there", plan.fingerprint, manifest)
