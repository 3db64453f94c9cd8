"""Files of every kind, named so that only their content can tell what they are."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import pytest

from varlen_sft.data.conversation import ConversationError
from varlen_sft.data.json_rows import CHUNK
from varlen_sft.data.readers import read_dicts
from varlen_sft.errors import InputError

pa = pytest.importorskip("pyarrow")

from tests.data.columns import arrow, parquet, stream  # noqa: E402

ROWS = [{"text": "a"}, {"text": "é🤖\u2028\n"}, {"text": "c", "score": 1}]
COLUMNS = [{"text": "a", "score": None}, {"text": "é🤖\u2028\n", "score": None}, ROWS[2]]


def lines(rows: Iterable[dict]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def put(folder: Path, data: bytes | str, name: str = "rows.txt") -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def problem(path: Path, **options) -> str:
    with pytest.raises(InputError) as caught:
        list(read_dicts(path, **options))
    return str(caught.value)


# -- what is what


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (lines(ROWS), ROWS),
        (json.dumps(ROWS, indent=1).encode(), ROWS),
        (b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode() + b"\n", ROWS),
        (gzip.compress(lines(ROWS)), ROWS),
        (gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])), ROWS),
        (gzip.compress(json.dumps(ROWS).encode()), ROWS),
        (zstd(lines(ROWS)), ROWS),
        (zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:])), ROWS),
        (parquet(COLUMNS), COLUMNS),
        (arrow(COLUMNS), COLUMNS),
        (stream(COLUMNS), COLUMNS),
    ],
    ids=["lines", "array", "bom", "gz", "gz2", "gz-array", "zst", "zst2", "parquet", "file", "ipc"],
)
@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.jsonl"])
def test_the_content_decides_and_not_the_name(tmp_path, data, expected, name):
    if data.startswith(b"\xef\xbb\xbf"):
        assert [row for _, row in read_dicts(put(tmp_path, data, name))] == expected
    else:
        rows = list(read_dicts(put(tmp_path, data, name)))
        assert [row for _, row in rows] == expected
        assert [number for number, _ in rows] == [1, 2, 3]


def test_rows_of_json_lines_are_physical_lines(tmp_path):
    row = '{"text": "a"}'
    data = "\ufeff\n \r\n" + row + "\r\n\n" + row.replace(": ", ":\r ")  # a lone \r ends no line
    assert list(read_dicts(put(tmp_path, data))) == [(3, ROWS[0]), (5, ROWS[0])]
    assert list(read_dicts(put(tmp_path, "\ufeff" + row))) == [(1, ROWS[0])]
    assert list(read_dicts(put(tmp_path, ""))) == []


def test_arrays_of_any_shape(tmp_path):
    assert list(read_dicts(put(tmp_path, " [ ] \n"))) == []
    long = [{"text": '\\"]}[{' * (CHUNK // 4), "n": [1.5e3, -1, None, True]}, {"text": "b"}] * 3
    for text in (json.dumps(long), json.dumps(long, indent="\t"), json.dumps(long) + " " * CHUNK):
        assert list(read_dicts(put(tmp_path, text))) == list(enumerate(long, 1))


@pytest.mark.parametrize("shift", range(14))
def test_an_array_is_read_whatever_a_chunk_cuts(tmp_path, shift):
    rows = [{"p": "x" * (CHUNK - 30 + shift)}, -12345678, "é🤖\\u00e9\n", False, -1.5e-7, {"a": 1}]
    path = put(tmp_path, json.dumps(rows, ensure_ascii=shift % 2 == 0))
    assert list(read_dicts(path)) == list(enumerate(rows, 1))


def test_chatterbot_yaml(tmp_path):
    data = "categories:\n- x\nconversations:\n- - Hi\n  - Hello\n  - Bye\n- - yes\n- no\n"
    rows = list(read_dicts(put(tmp_path, data, "rows.json")))
    speakers = [[m["role"] for m in row["messages"]] for _, row in rows[:2]]
    assert speakers == [["user", "assistant", "user"], ["user"]]
    assert [m["content"] for m in rows[0][1]["messages"]] == ["Hi", "Hello", "Bye"]
    assert rows[1][1]["messages"][0]["content"] is True  # as YAML has it, refused later
    assert str(rows[2][1]) == "must be a list of texts, got a boolean"


def test_yaml_runs_nothing(tmp_path):
    data = f"conversations:\n- - !!python/object/apply:os.mkdir ['{tmp_path}/made']\n"
    assert "not YAML: could not determine a constructor" in problem(put(tmp_path, data))
    assert not (tmp_path / "made").exists()


# -- what cannot be read


def test_lines_that_are_no_json_are_named_and_passed(tmp_path):
    data = b'{"text": "a"}\n{"text": [}\n{"\xff\n' + b"[" * 100_000 + b'\n{"text": "b"}\n'
    data += b'{"a": 1, "b": {"c": 1, "d": 2, "c": 3}}\n'
    rows = list(read_dicts(put(tmp_path, data)))
    assert rows[0] == (1, {"text": "a"}) and rows[4] == (5, {"text": "b"})
    assert all(isinstance(row, ConversationError) for _, row in rows[1:4])
    assert str(rows[1][1]) == "not JSON: Expecting value at column 11"
    assert str(rows[2][1]) == "not UTF-8: invalid start byte at byte 3"
    assert str(rows[3][1]).startswith("not JSON that can be read: maximum recursion depth")
    assert str(rows[5][1]) == "the key 'c' stands twice in one object"


BAD_FILES = {
    '[{"a": 1}, {"a": }, {"a": 2}]': "row 2: not JSON: Expecting value at character 18 of the file",
    '[{"a": 1}, {"a": 2}': "row 2: not JSON: expected ']', got 'the end of the file' at character "
    "20 of the file",
    '[{"a": 1}, {"a": "xy': "row 2: not JSON: Unterminated string starting at at character 18 of "
    "the file",
    '[{"a": 1} {"a": 2}]': "row 1: not JSON: expected ']', got '{' at character 11 of the file",
    '[{"a": 1}] [2]': "row 1: text after the end of the array: '[2]'",
    "[": "row 1: not JSON: Expecting value at character 2 of the file",
    "[" * 100_000: "row 1: not JSON that can be read: maximum recursion depth exceeded while "
    "decoding a JSON array from a unicode string",
    '[{"a": 1}, {"a": 1, "a": 2}]': "row 2: the key 'a' stands twice in one object",
    b'["\xff"]': "row 1: not UTF-8: invalid start byte",
    "PK\x03\x04": "is a zip archive",
    b"\x80\x04\x95": "is a pickle, which could run code when it is read",
    "BZh91": "is compressed with bzip2, only gzip and zstd are read",
    b"MMIDIDX\x00\x00": "is a Megatron index without its data: expected PREFIX.idx beside "
    "PREFIX.bin",
    gzip.compress(parquet(COLUMNS)): "is Parquet or Arrow inside gzip or zstd: unpack it first",
    gzip.compress(lines(ROWS))[:-4]: "cannot be read: Compressed file ended before the "
    "end-of-stream marker was reached",
    "conversations: 3\n": "YAML without a list 'conversations', as the ChatterBot corpus has it",
    "name: [\n": "not YAML: while parsing",
    zstd(lines(ROWS))[:-4]: "cannot be read: ",
    b"PAR1" + b"\0" * 100: "cannot be read: ",
    parquet(COLUMNS)[:-1]: "cannot be read: ",
    arrow(COLUMNS)[:-1]: "cannot be read: ",
    stream(COLUMNS)[:-8]: "an Arrow stream without its end: it is truncated",
}


@pytest.mark.parametrize("data", BAD_FILES, ids=lambda data: repr(data[:20]))
def test_a_file_that_cannot_be_read_is_named(tmp_path, data):
    path = put(tmp_path, data)
    expected = BAD_FILES[data]
    comma = ", " if expected.startswith("row") else ": "
    assert problem(path).startswith(f"{path}{comma}{expected}")


def test_an_error_far_into_an_array_has_its_place_in_the_file(tmp_path):
    text = json.dumps([{"text": "x" * 1000}] * 200)[:-1]
    path = put(tmp_path, text + ", {]")
    assert problem(path) == (
        f"{path}, row 201: not JSON: Expecting property name enclosed in double quotes at "
        f"character {len(text) + 4} of the file"
    )


def test_a_file_that_is_damaged_further_on_gives_the_rows_before(tmp_path):
    rows = [{"text": os.urandom(3000).hex()} for _ in range(50)]
    whole = gzip.compress(lines(rows))
    found = read_dicts(put(tmp_path, whole[: len(whole) // 2]))
    assert list(islice(found, 10)) == list(enumerate(rows[:10], 1))
    with pytest.raises(InputError, match=r"rows.txt, row \d+: damaged after this row: Compressed"):
        list(found)
    damaged = bytearray(arrow(rows))
    at = damaged.find(b"\xff\xff\xff\xff", len(damaged) // 2)
    damaged[at + 8 : at + 40] = b"\xff" * 32
    with pytest.raises(InputError, match=r"rows.txt, row \d+: damaged after this row: "):
        list(read_dicts(put(tmp_path, bytes(damaged))))


def test_what_is_not_there_is_named_before_the_first_row(tmp_path):
    with pytest.raises(InputError) as caught:
        read_dicts(tmp_path / "none.jsonl")
    assert str(caught.value) == f"{tmp_path}/none.jsonl: no such file"
    with pytest.raises(InputError, match="is a folder, expected a file or a folder of datasets"):
        read_dicts(tmp_path)
    with pytest.raises(InputError, match="is a file and has no split 'train'"):
        read_dicts(put(tmp_path, "{}"), split="train")


def test_yaml_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("varlen_sft.data.readers.MAX_YAML_BYTES", 1 << 20)
    path = put(tmp_path, "conversations:\n" + "- - a\n  - b\n" * 100_000)
    assert problem(path) == f"{path}: YAML of more than 1 MiB is not read"


# -- memory

ROW_BYTES, FILE_ROWS = 1 << 14, 6400


def large_text(path: Path, around: Callable = open, array: bool = False) -> Path:
    text = os.urandom(ROW_BYTES // 2).hex()
    with around(path, "wb") as file:
        for number in range(FILE_ROWS):
            lead = ("[", ",")[number > 0] if array else ""
            file.write(f'{lead}{{"text": "{number:07}{text}"}}\n'.encode())
        file.write(b"]" if array else b"")
    return path


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_a_hundred_megabytes_of_json_are_read_in_one(tmp_path, array):
    path = large_text(tmp_path / "rows", array=array)
    assert path.stat().st_size > 100e6
    tracemalloc.start()
    try:
        count = sum(len(row["text"]) == ROW_BYTES + 7 for _, row in read_dicts(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == FILE_ROWS
    assert peak < 1e6
