"""Files that are complete and on the disk before they stand in their place."""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears whole, on the disk, or not at all; OSError."""
    # Random, since hosts that share a folder can have processes of one number.
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


class HashedFile:
    """A file that is written once, front to back, and its sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; OSError."""
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)

    def close(self) -> None:
        """Write it out to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close and remove it, unless it was moved."""
        with suppress(OSError):  # what is left in its buffer may still not fit on the disk
            self._file.close()
        self.path.unlink(missing_ok=True)

    def facts(self) -> dict[str, Any]:
        """Its bytes and sha256, for a manifest."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Write the names in a folder out to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
