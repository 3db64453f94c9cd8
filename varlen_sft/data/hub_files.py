"""A data set of the hub as files: those that `datasets` keeps of it in its cache.

They are Arrow files with all of its rows, so that they can be hashed and read again, which a stream
from the hub cannot. Without a network the cache is all that is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from varlen_sft.data.arrow_rows import choose_split
from varlen_sft.data.sources import Source
from varlen_sft.errors import InputError


@lru_cache
def hub_files(source: Source) -> tuple[Path, ...]:
    """The Arrow files of one split, in the order of its rows; downloads what is not there yet.

    Code that a data set brings along is never run.

    Raises:
        InputError: `datasets` is missing; it cannot be loaded; several splits and none is named; a
            part of a split, which has no files of its own.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("needs datasets: pip install datasets", file=str(source)) from None
    if source.split is not None and not source.split.isidentifier():
        raise InputError(
            f"the split {source.split!r} is no whole one: load it, save_to_disk, and name that "
            "folder",
            file=str(source),
        )
    parts = source.name.split("/")
    name, config = "/".join(parts[:2]), "/".join(parts[2:]) or None
    try:
        data = load_dataset(name, config, split=source.split)
    except Exception as error:  # whatever hub, network or file format raise
        raise InputError(f"cannot be loaded: {error}", file=str(source)) from error
    if isinstance(data, Mapping):
        data = data[choose_split(source, data, source.split)]
    files = tuple(Path(entry["filename"]) for entry in data.cache_files)
    if not files:
        raise InputError("has no rows in the cache of datasets", file=str(source))
    return files
