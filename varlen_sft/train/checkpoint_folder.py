"""The folder of a run's checkpoints: what stands in it is whole, and one run at a time writes.

step-00000200/     a checkpoint
step-00000300.tmp  being written, or left by a run that was killed; the next run removes it
step-00000300.replaced.tmp  of the same step, while another takes its name
step-00000300.damaged  set aside: its files are not what was written
lock               held by the run
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from varlen_sft.data.files import sync_folder
from varlen_sft.errors import RunError
from varlen_sft.train.checkpoint_files import INDEX, SUMS, read_index

__all__ = ["checkpoints", "clean", "damage", "locked", "path_of", "prune", "publish", "set_aside"]

_REPLACED = ".replaced.tmp"
_NAME = re.compile(r"step-(\d{8,})")
_SUM = re.compile(r"([0-9a-f]{64})  ([^/\n]+)")


def path_of(folder: Path, step: int) -> Path:
    """Of the checkpoint after so many steps."""
    return folder / f"step-{step:08}"


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of all that are complete, the oldest first."""
    if not folder.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def publish(made: Path, final: Path) -> None:
    """Give a checkpoint its name, in one move: before it there is none, after it there is all."""
    if final.exists():
        # Of the same step, by a run that was then set back. If the process is killed before the
        # next move, ``clean`` gives it its name back.
        final.rename(final.with_name(f"{final.name}{_REPLACED}"))
    made.rename(final)
    sync_folder(final.parent)


def prune(folder: Path, keep: int, step: int) -> None:
    """Remove all but the newest of those up to a step; OSError."""
    old = [path for at, path in checkpoints(folder) if at <= step][:-keep]
    for path in old:
        # Killed halfway, it must not look like a checkpoint.
        path.rename(path.with_name(f"{path.name}.old.tmp"))
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what no run will finish or needs any more; OSError."""
    for path in sorted(folder.glob("step-*.tmp")):
        final = path.with_name(path.name.removesuffix(_REPLACED))
        if final == path or final.exists():
            shutil.rmtree(path)
        else:
            path.rename(final)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nobody takes it for a good one; OSError."""
    aside = path.with_name(f"{path.name}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def damage(path: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with the files of a checkpoint, in words.

    Args:
        path: of the checkpoint.
        share: (k, n): read every n-th of its files, from the k-th, so that ranks share the work.

    Returns:
        None if they are what was written.

    Raises:
        InputError: a checkpoint of another version.
    """
    try:
        sums = dict(_sums(path / SUMS))
    except (OSError, ValueError) as error:
        return str(error)
    # By each rank, before what they share out: none may raise where another returns.
    if wrong := _changed(path, [INDEX], sums):
        return wrong
    files = sorted({*sums, *read_index(path)["files"]})
    return _changed(path, files[share[0] :: share[1]], sums)


def _changed(path: Path, names: Sequence[str], sums: Mapping[str, str]) -> str | None:
    """The first of these files that is not what was written."""
    for name in names:
        if name not in sums:
            return f"{SUMS} does not list {name}"
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return str(error)
        if found != sums[name]:
            return f"{name} does not have the checksum of {SUMS}"
    return None


def _sums(path: Path) -> Iterator[tuple[str, str]]:
    """(name, sha256) of each line of a file as sha256sum writes it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _SUM.fullmatch(line)
        if match is None:
            raise ValueError(f"{path.name} has a line that is no checksum: {line[:80]!r}")
        yield match[2], match[1]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if there is none. The kernel lets go when the process ends.

    Raises:
        RunError: another run holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"{folder}: another run writes its checkpoints here ({file.read()}): wait for it, "
                "or take another folder"
            ) from None
        except OSError as error:
            raise RunError(f"{folder} cannot be locked: {error}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
