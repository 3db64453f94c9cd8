"""The manifest of a prepared set: what it was made of, and what the other files are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from varlen_sft.errors import InputError

FORMAT = "varlen_sft prepared data"
VERSION = 2
LAYOUTS = ("sidecar", "tokens+mask")
MANIFEST = ".manifest.json"


def file_of(prefix: str | os.PathLike[str], suffix: str) -> Path:
    """``PREFIX`` with a suffix after it; a dot in its name stays."""
    return Path(os.fspath(prefix) + suffix)


def is_prepared(prefix: str | os.PathLike[str]) -> bool:
    """Whether a manifest lies beside the prefix."""
    return file_of(prefix, MANIFEST).is_file()


def read_manifest(prefix: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest beside a prefix, with all that Store needs of it.

    Raises:
        InputError: there is none, it is not JSON, of another version, or lacks a field.
    """
    path = file_of(prefix, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such file: not a prepared data set, or `varlen-sft prepare` has not finished it",
            file=path,
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"must have the format {FORMAT!r}", file=path)
    if manifest.get("version") != VERSION:
        raise InputError(
            f"must be of version {VERSION}, is of {manifest.get('version')!r}", file=path
        )
    if manifest.get("layout") not in LAYOUTS:
        raise InputError(
            f"layout must be one of {LAYOUTS}, is {manifest.get('layout')!r}", file=path
        )
    kinds = {"fingerprint": str, "counts": dict, "files": dict}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise InputError(f"{name!r} is missing, or no {kind.__name__}", file=path)
    return manifest
