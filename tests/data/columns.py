"""Rows as bytes of columnar files."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet


def parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow(rows: list[dict], new: Callable = pa.ipc.new_file) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


def stream(rows: list[dict]) -> bytes:
    return arrow(rows, pa.ipc.new_stream)
