"""One run at a time on a PREFIX: locks that end with the process that holds them.

The folder of parts holds ``lock``, which a run takes for itself and shards share, and for each
shard a ``lock.i-of-n``. The kernel drops them when their process is gone, however it went, so none
is ever in the way of a later run; on NFS the server does.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

from varlen_sft.errors import RunError

LOCK = "lock"
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


@contextmanager
def locked(folder: Path, shard: tuple[int, int] | None = None) -> Iterator[None]:
    """Hold a folder of parts, which is made if there is none and removed if it ends up empty.

    Args:
        shard: ``(i, n)`` if others may work on other shards meanwhile.

    Raises:
        RunError: another run holds it, which is named; or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with ExitStack() as stack:
        try:
            stack.callback(_remove_empty, made)
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(_open(folder / LOCK, shared=shard is not None))
            if shard is not None:
                stack.enter_context(_open(folder / f"{LOCK}.{shard[0]}-of-{shard[1]}"))
        except OSError as error:
            raise RunError(f"{folder} cannot be written: {error}") from None
        stack.callback(_leave, folder, file)
        yield


def empty(folder: Path) -> None:
    """Remove what is in a folder of parts, but for its locks; OSError."""
    for path in sorted(folder.iterdir()):  # parts before the plan that tells of what they are
        if path.is_dir():
            shutil.rmtree(path)
        elif not _is_lock(path):
            path.unlink()


def _open(path: Path, shared: bool = False) -> TextIO:
    """The locked file; RunError if another process has it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _lock(file, shared)
            # Who held it may have removed it between the two calls: then it locks nobody out.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                _sign(file, shared)
                return file
        except BlockingIOError:
            raise _busy(path, file) from None
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            raise
        file.close()


def _lock(file: TextIO, shared: bool) -> None:
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{file.name}: this file system has no locks ({error.strerror}); make sure that no "
            "other run is at work there",
            RuntimeWarning,
            stacklevel=4,
        )


def _sign(file: TextIO, shared: bool) -> None:
    """Say who has it; a shard does so in the lock of its own."""
    file.truncate(0)
    file.write("" if shared else f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def _busy(path: Path, file: TextIO) -> RunError:
    with file:
        file.seek(0)
        holder = file.read() or "on a shard"
    return RunError(
        f"{path.parent}: another prepare or merge is at work here ({holder}): wait for it, or take "
        "another PREFIX"
    )


def _leave(folder: Path, file: TextIO) -> None:
    """Remove the locks if nothing else is left and nobody else is there."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # others may share it
        locks = list(folder.iterdir())
        if all(map(_is_lock, locks)):
            for path in locks:
                path.unlink()
            folder.rmdir()


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that were made for nothing, the innermost first."""
    with suppress(OSError):
        for folder in folders:
            if folder.exists():
                folder.rmdir()


def _is_lock(path: Path) -> bool:
    return path.name == LOCK or path.name.startswith(f"{LOCK}.")
