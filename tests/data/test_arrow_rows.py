"""Columnar files: what their types add is taken away again, and damage is named."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from varlen_sft.data.readers import read_dicts
from varlen_sft.errors import InputError

pa = pytest.importorskip("pyarrow")

from tests.data.columns import parquet, stream  # noqa: E402

COLUMNS = [
    {"text": "a", "score": None},
    {"text": "é🤖\u2028\n", "score": None},
    {"text": "c", "score": 1},
]
ROW_BYTES, FILE_ROWS = 1 << 14, 6400


def put(folder: Path, data: bytes) -> Path:
    path = folder / "rows"
    path.write_bytes(data)
    return path


def problem(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(read_dicts(path, **options))
    return str(caught.value)


def test_columns_add_nulls_to_objects_and_none_is_left(tmp_path):
    rows = [
        {"calls": [{"f": {"city": "Köln"}, "n": [1]}, {"f": {"x": 0}}], "meta": None, "top": None},
        {"calls": [], "meta": {"a": "b"}, "top": "t"},
    ]
    for data in (parquet(rows), stream(rows)):
        assert [row for _, row in read_dicts(put(tmp_path, data))] == rows


def test_json_text_in_arrow_keeps_its_nulls(tmp_path):
    json_type = pa.json_()
    texts = pa.array(['{"a": null, "b": [1]}', None], json_type.storage_type)
    table = pa.table(
        {
            "flat": pa.ExtensionArray.from_storage(json_type, texts),
            "listed": pa.array([[{"x": 1, "y": None}], None]),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path = put(tmp_path, sink.getvalue().to_pybytes())
    assert [row for _, row in read_dicts(path)] == [
        {"flat": {"a": None, "b": [1]}, "listed": [{"x": 1}]},
        {"flat": None, "listed": None},
    ]


def test_two_columns_of_one_name_are_refused(tmp_path):
    table, sink = (
        pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]),
        pa.BufferOutputStream(),
    )
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    path = put(tmp_path, sink.getvalue().to_pybytes())
    assert problem(path) == f"{path}: two columns of one name: a, a"


# -- folders that datasets saved


def saved(folder: Path, shards: list[list[dict]], names: list[str] | None = None) -> Path:
    folder.mkdir(parents=True)
    names = names or [f"data-{k:05d}-of-{len(shards):05d}.arrow" for k in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        (folder / name).write_bytes(stream(rows))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_a_saved_data_set(tmp_path):
    folder = saved(tmp_path / "set", [COLUMNS[:1], COLUMNS[1:]])
    assert list(read_dicts(folder)) == list(enumerate(COLUMNS, 1))
    assert problem(folder, split="train") == f"{folder}: has no splits, so no split 'train'"


def test_saved_splits(tmp_path):
    for split, rows in (("train", COLUMNS[:1]), ("test", COLUMNS[1:])):
        saved(tmp_path / split, [rows])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert list(read_dicts(tmp_path, split="test")) == list(enumerate(COLUMNS[1:], 1))
    known = f"{tmp_path}: has the splits train, test: "
    assert problem(tmp_path) == known + "one must be named (NAME@SPLIT)"
    assert problem(tmp_path, split="../x") == known + "'../x' is none of them (NAME@SPLIT)"
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert list(read_dicts(tmp_path)) == list(enumerate(COLUMNS[1:], 1))
    (tmp_path / "dataset_dict.json").write_text('{"splits": [".."]}')
    assert problem(tmp_path) == f"{tmp_path}: lists a file that is not in it: '..'"


@pytest.mark.filterwarnings("default")  # what another package warns of is not asked here
def test_what_datasets_itself_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"messages": [{"role": "user", "calls": [{"x": {"a": k}} if k % 2 else {"y": "b"}]}]}
        for k in range(5)
    ]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    assert list(read_dicts(tmp_path / "one")) == list(enumerate(rows, 1))
    datasets.DatasetDict(train=data, test=data.select([3, 0])).save_to_disk(tmp_path / "two")
    assert list(read_dicts(tmp_path / "two", split="test")) == [(1, rows[3]), (2, rows[0])]
    mixed = [{"a": [{"b": None}, 3]}, {"a": [{"b": "x"}]}]
    as_json = datasets.Dataset.from_list(mixed, on_mixed_types="use_json")
    as_json.save_to_disk(tmp_path / "three")
    assert list(read_dicts(tmp_path / "three")) == list(enumerate(mixed, 1))


def test_a_saved_data_set_names_no_file_elsewhere(tmp_path):
    folder = saved(tmp_path / "set", [COLUMNS])
    (tmp_path / "secret.arrow").write_bytes(stream(COLUMNS))
    for name in ("../secret.arrow", str(tmp_path / "secret.arrow"), "", None):
        state = {"_data_files": [{"filename": name}]}
        (folder / "state.json").write_text(json.dumps(state))
        assert problem(folder) == f"{folder}: lists a file that is not in it: {name!r}"
    (folder / "state.json").write_text('{"_data_files": []}')
    assert problem(folder) == f"{folder}: lists no files"
    (folder / "state.json").write_text("[]")
    assert problem(folder) == f"{folder}/state.json: expected a JSON object"
    (folder / "state.json").write_text("{")
    assert "state.json: not JSON: Expecting property name" in problem(folder)
    (folder / "state.json").write_text('{"_indices_data_files": ["a"]}')
    assert "has an indices mapping: save it after flatten_indices()" in problem(folder)


# -- memory


@pytest.mark.parametrize("kind", ["parquet", "stream"])
def test_a_hundred_megabytes_of_columns_are_read_in_few(tmp_path, kind):
    import pyarrow.parquet

    path = tmp_path / "rows"
    table = pa.table({"text": [os.urandom(ROW_BYTES // 2).hex() for _ in range(FILE_ROWS)]})
    if kind == "parquet":  # one row group, which must not be read whole
        pyarrow.parquet.write_table(table, path, compression="none", use_dictionary=False)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    assert path.stat().st_size > 100e6
    expected = table.column(0)[FILE_ROWS - 1].as_py()
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)  # counts from here
    tracemalloc.start()
    try:
        for number, row in read_dicts(path):  # noqa: B007
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(default)
    assert (number, row["text"]) == (FILE_ROWS, expected)
    assert peak < 10e6 and pool.max_memory() < 25e6
