"""Rows of columnar files: Parquet, Arrow files and streams, folders of datasets.save_to_disk.

Columnar files give every object of a column the same keys, with null where an object has none, and
so do tool calls of different functions. Nulls inside nested objects are therefore left out: a
template would render them. What must hold a null is kept as JSON text, which is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from varlen_sft.errors import InputError

BATCH = 128
"""Rows turned into Python objects at a time."""

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"

Rows = Iterator[tuple[int, Any]]


def parquet_rows(path: Path) -> Rows:
    """``(number, row)`` from 1, read page by page, so that large row groups cost no memory.

    Raises:
        InputError: the file is damaged.
    """
    import pyarrow.parquet

    # Without pre_buffer, and with a small buffer, no column of a row group is held whole.
    file = _tried(
        path, lambda: pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 18)
    )
    return _rows(path, file.iter_batches(batch_size=BATCH, use_threads=False), file.schema_arrow)


def arrow_rows(paths: list[Path]) -> Rows:
    """``(number, row)`` from 1 of Arrow IPC files or streams, one after another, memory-mapped.

    Raises:
        InputError: a file is damaged.
    """
    opened = [_arrow_batches(path) for path in paths]
    numbered = chain.from_iterable(_rows(p, batches, schema) for p, (batches, schema) in opened)
    return ((number, row) for number, (_, row) in enumerate(numbered, 1))


def saved_rows(folder: Path, split: str | None) -> Rows:
    """``(number, row)`` from 1 of a folder that datasets.save_to_disk wrote.

    Args:
        folder: the folder, of one data set or of several splits.
        split: which of several; may be None if there is but one.

    Raises:
        InputError: an unknown split, or a folder that is damaged. File names in it that lead
            anywhere else are refused.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = _read_json(folder / "dataset_dict.json").get("splits")
        folder = folder / choose_split(folder, _plain_names(folder, splits), split)
    elif split is not None:
        raise InputError(f"has no splits, so no split {split!r}", file=folder)
    state = _read_json(folder / "state.json")
    if state.get("_indices_data_files"):
        raise InputError("has an indices mapping: save it after flatten_indices()", file=folder)
    entries = state.get("_data_files")
    listed = [e.get("filename") if isinstance(e, dict) else e for e in entries or []]
    return arrow_rows([folder / name for name in _plain_names(folder, listed)])


def choose_split(where: object, names: Iterable[str], split: str | None) -> str:
    """The split that is asked for, or the only one; InputError that names them all if neither."""
    known = list(names)
    if split is None and len(known) == 1:
        return known[0]
    if split not in known:
        asked = "one must be named" if split is None else f"{split!r} is none of them"
        raise InputError(
            f"has the splits {', '.join(known) or 'none'}: {asked} (NAME@SPLIT)", file=str(where)
        )
    return str(split)


def batch_rows(batches: Iterable[Any], schema: Any) -> Iterator[Any]:
    """The rows of Arrow record batches or tables as dicts."""
    names = schema.names
    convert = {field.name: _converter(field.type) for field in schema}
    changed = {name: function for name, function in convert.items() if function}
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            piece = batch.slice(start, BATCH)
            columns = [piece.column(i).to_pylist() for i in range(len(names))]
            for values in zip(*columns, strict=True):
                row = dict(zip(names, values, strict=True))
                for name, function in changed.items():
                    row[name] = function(row[name])
                yield row


def _converter(kind: Any) -> Callable[[Any], Any] | None:
    """What makes plain JSON of a column's values; None where they are already."""
    import pyarrow

    if getattr(kind, "extension_name", None) == "arrow.json":
        return _from_json
    if pyarrow.types.is_struct(kind):
        return _struct([(field.name, _converter(field.type)) for field in kind])
    if any(
        test(kind)
        for test in (
            pyarrow.types.is_list,
            pyarrow.types.is_large_list,
            pyarrow.types.is_fixed_size_list,
        )
    ):
        inner = _converter(kind.value_type)
        return None if inner is None else lambda items: items and [inner(item) for item in items]
    return None


def _struct(fields: list[tuple[str, Callable[[Any], Any] | None]]) -> Callable[[Any], Any]:
    def convert(value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            name: function(value[name]) if function else value[name]
            for name, function in fields
            if value[name] is not None
        }

    return convert


def _from_json(value: str | None) -> Any:
    return None if value is None else json.loads(value)


def _arrow_batches(path: Path) -> tuple[Path, tuple[Any, Any]]:
    import pyarrow

    def open_it() -> tuple[Any, Any]:
        source = pyarrow.memory_map(str(path))
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            return (file.get_batch(i) for i in range(file.num_record_batches)), file.schema
        # Readers take a stream that stops between two batches for a whole one; writers end it.
        source.seek(max(0, source.size() - len(_END_OF_STREAM)))
        if source.read() != _END_OF_STREAM:
            raise InputError("an Arrow stream without its end: it is truncated", file=path)
        source.seek(0)
        stream = pyarrow.ipc.open_stream(source)
        return stream, stream.schema

    return path, _tried(path, open_it)


def _rows(path: Path, batches: Iterable[Any], schema: Any) -> Rows:
    import pyarrow

    names = schema.names
    if len(set(names)) != len(names):
        raise InputError(f"two columns of one name: {', '.join(names)}", file=path)
    number = 0
    rows = batch_rows(batches, schema)
    while True:
        try:
            row = next(rows, None)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            reason = f"damaged after this row: {error}"
            raise InputError(reason, file=path, row=number) from None
        if row is None:
            return
        number += 1
        yield number, row


def _tried(path: Path, open_it: Callable[[], Any]) -> Any:
    import pyarrow

    try:
        return open_it()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError("not a folder of datasets.save_to_disk: no such file", file=path) from None
    except ValueError as error:
        raise InputError(f"not JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise InputError("expected a JSON object", file=path)
    return value


def _plain_names(folder: Path, names: object) -> list[str]:
    if not isinstance(names, list) or not names:
        raise InputError("lists no files", file=folder)
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise InputError(f"lists a file that is not in it: {name!r}", file=folder)
    return names
